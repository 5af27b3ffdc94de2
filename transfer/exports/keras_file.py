"""Export to the ``.keras`` format as stock layers, for Keras on TensorFlow, JAX and PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

from transfer.layers.classifier import Classifier
from transfer.layers.native.conversion import to_keras
from transfer.layers.native.saving import save_native


def save(classifier: Classifier, path: Path) -> None:
    """Write a classifier as a Keras model of stock layers, which includes its normalization.

    It maps ``pixels``, float32 ``[batch, height, width, channels]`` in 0..255, of the classifier's
    size, to logits, float32 ``[batch, num_classes]``. ``keras.models.load_model`` reads it without
    this package; ``labels.txt`` in the archive has the class names.

    Raises:
        ValueError: if a node of the network cannot be expressed in stock layers.
    """
    try:
        model = to_keras(classifier)
    except ValueError as error:
        raise ValueError(
            f"{error}; Classifier.save writes a .keras file that needs this package to load"
        ) from error
    save_native(model, path, labels=classifier.labels)


def load(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A function that maps resized pixels, float32 ``[batch, height, width, channels]``, to
    probabilities."""
    model = keras.models.load_model(path)

    def run(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(keras.ops.softmax(model.predict_on_batch(pixels)))

    return run
