"""Export to SavedModel, for TensorFlow Serving and any program with TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from transfer.exports.decoding import decode
from transfer.images.preprocess import to_channels
from transfer.layers.classifier import Classifier


def save(classifier: Classifier, folder: Path) -> None:
    """Write a classifier as a SavedModel with three signatures.

    ========================  ==========================================================
    ``serving_default``       ``image_bytes``: string ``[batch]``, JPEG, PNG, GIF or BMP
                              files, and WebP if TensorFlow can decode it; oriented
                              by their metadata (EXIF, XMP)
    ``pixels``                ``pixels``: uint8 ``[batch, height, width, 3]``
    ``labels``                no inputs; ``labels``: string ``[num_classes]``
    ========================  ==========================================================

    The first two return ``probabilities``, float32 ``[batch, num_classes]``, and ``label``, string
    ``[batch]``, the most probable class.
    """
    module = _Servable(classifier)
    signatures = {
        "serving_default": module.from_files,
        "pixels": module.from_pixels,
        "labels": module.all_labels,
    }
    tf.saved_model.save(module, str(folder), signatures=signatures)


def load(folder: Path) -> Callable[[list[bytes]], np.ndarray]:
    """A function that maps encoded image files to probabilities, using TensorFlow only."""
    signature = tf.saved_model.load(str(folder)).signatures["serving_default"]

    def run(files: list[bytes]) -> np.ndarray:
        return signature(image_bytes=tf.constant(files))["probabilities"].numpy()

    return run


class _Servable(tf.Module):
    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier
        self.labels = tf.constant(classifier.labels)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")])
    def from_files(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        preprocess = self.classifier.preprocess

        def read(encoded: tf.Tensor) -> tf.Tensor:
            return preprocess.resize(to_channels(decode(encoded), preprocess.channels))

        shape = preprocess.shape
        pixels = tf.map_fn(read, image_bytes, fn_output_signature=tf.TensorSpec(shape, tf.float32))
        return self._answer(pixels)

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, "pixels")])
    def from_pixels(self, pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        preprocess = self.classifier.preprocess
        return self._answer(preprocess.resize(to_channels(pixels, preprocess.channels)))

    @tf.function(input_signature=[])
    def all_labels(self) -> dict[str, tf.Tensor]:
        return {"labels": tf.identity(self.labels)}

    def _answer(self, pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = self.classifier.probabilities_of_resized(pixels)
        label = tf.gather(self.labels, tf.argmax(probabilities, -1))
        return {"probabilities": probabilities, "label": label}
