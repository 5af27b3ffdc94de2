"""Export to the ``.keras`` format, for Python programs with this package installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from transfer.exports.verification import resized
from transfer.layers.classifier import Classifier


def save(classifier: Classifier, path: Path) -> None:
    """Write a classifier as a Keras model that maps images in 0..255 of any size to logits.

    ``keras.models.load_model`` reads it in a program that has imported ``transfer``.
    """
    classifier.save(path)


def load(path: Path) -> Callable[[list[bytes]], np.ndarray]:
    """A function that maps encoded image files to probabilities with the loaded Keras model."""
    classifier = keras.models.load_model(path)
    predict = tf.function(classifier.probabilities_of_resized, autograph=False)

    def run(files: list[bytes]) -> np.ndarray:
        pixels = np.stack([resized(classifier, file) for file in files])
        return predict(tf.constant(pixels)).numpy()

    return run
