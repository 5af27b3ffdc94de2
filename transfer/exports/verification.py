"""Verification of exports: compares the predictions of an export with those of the classifier."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from transfer.data.dataset import Split
from transfer.exports import preparing
from transfer.images.decoding import is_for_tensorflow, read_image
from transfer.images.preprocess import to_channels
from transfer.layers.classifier import Classifier
from transfer.runs import run_data

NUM_SYNTHETIC = 8
# Maximum absolute difference of a probability.
_TOLERANCES = {"tflite float16": 0.02, "tflite int8": 0.3}
_TOLERANCE = 1e-4
# Minimum fraction of equal labels, among images whose two most probable classes are _CLEAR apart.
_CLEAR = 0.1
_SAME_LABELS = 0.9


@dataclass(frozen=True)
class Samples:
    """Images for the comparison: ``files`` that TensorFlow can decode, and their ``pixels``,
    float32 ``[num_images, height, width, channels]`` in 0..255, resized for the classifier.
    ``source`` is a description of the images."""

    files: list[bytes]
    pixels: np.ndarray
    source: str


def samples_of(classifier: Classifier, files: list[bytes], source: str) -> Samples:
    """Samples from encoded image files of any supported format."""
    files = list(map(_for_tensorflow, files))
    return Samples(files, np.stack([resized(classifier, file) for file in files]), source)


def synthetic(classifier: Classifier) -> Samples:
    """A few fixed random textures of the classifier's image size, from coarse to fine."""
    preprocess = classifier.preprocess
    generator = np.random.default_rng(0)
    files = []
    for number in range(NUM_SYNTHETIC):
        cells = 2 ** (1 + number % 4)
        texture = generator.uniform(0, 255, (cells, cells, 3)).astype(np.float32)
        pixels = tf.image.resize(texture, (preprocess.height, preprocess.width), "bicubic")
        pixels = tf.cast(tf.clip_by_value(tf.round(pixels), 0, 255), tf.uint8)
        files.append(tf.io.encode_png(pixels).numpy())
    return samples_of(classifier, files, "synthetic images")


def files_of(split: Split, count: int) -> list[bytes]:
    """The encoded files of at most ``count`` images, evenly spread over a split."""
    return [example["image"].numpy() for example in run_data.some(split, count).encoded()]


def resized(classifier: Classifier, file: bytes) -> np.ndarray:
    """Decode and resize an image for the classifier, before ``normalize``: float32 ``[height,
    width, channels]`` in 0..255."""
    preprocess = classifier.preprocess
    return preprocess.resize(to_channels(read_image(file), preprocess.channels)).numpy()


def prepared_difference(
    classifier: Classifier, samples: Samples, expected: np.ndarray
) -> float | None:
    """Maximum absolute difference of a probability where the code in the READMEs decodes and
    resizes the samples, ``None`` if Pillow cannot decode one of them.

    Args:
        classifier: the exported classifier.
        samples: the images.
        expected: its probabilities for them, ``[num_images, num_classes]``.
    """
    preprocess = classifier.preprocess
    size, pixels = (preprocess.height, preprocess.width), []
    for data in samples.files:
        file: Any = io.BytesIO(data)
        try:
            pixels.append(preparing.prepare(file, *size, gray=preprocess.channels == 1))
        except Exception:  # Pillow raises arbitrary exceptions
            return None
    found = classifier.probabilities_of_resized(tf.constant(np.concatenate(pixels)))
    return float(np.max(np.abs(np.asarray(found) - expected)))


def compare(actual: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Compare probabilities ``[num_images, num_classes]``.

    Returns:
        ``max_difference`` (maximum absolute difference of a probability), ``same_label`` (fraction
        of images with the same most probable class), and ``same_label_where_clear``, the same for
        images whose two most probable classes are more than 0.1 apart.
    """
    same = actual.argmax(-1) == expected.argmax(-1)
    second, first = np.sort(expected, axis=-1)[:, -2:].T
    clear = first - second > _CLEAR
    return {
        "max_difference": float(np.max(np.abs(actual - expected))),
        "same_label": float(np.mean(same)),
        "same_label_where_clear": float(np.mean(same[clear])) if clear.any() else 1.0,
    }


def rejection_reason(kind: str, compared: dict[str, float]) -> str | None:
    """Why an export must be rejected, given the result of ``compare``; ``None`` if it is good."""
    difference, same = compared["max_difference"], compared["same_label_where_clear"]
    tolerance = _TOLERANCES.get(kind, _TOLERANCE)
    if difference <= tolerance and same >= _SAME_LABELS:
        return None
    return (
        f"{kind} gives other results than the model: probabilities differ by up to "
        f"{difference:.2g} (expected at most {tolerance:g}), {same:.1%} of the clear labels are "
        f"the same (expected {_SAME_LABELS:.0%}); it was not kept"
    )


def timed(
    predict: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray
) -> tuple[np.ndarray, float]:
    """Probabilities, and images per second, measured after a warm-up run."""
    predict(pixels)
    start = time.perf_counter()
    probabilities = predict(pixels)
    return probabilities, len(pixels) / (time.perf_counter() - start)


def _for_tensorflow(file: bytes) -> bytes:
    """The file, re-encoded as PNG if a SavedModel cannot decode its format."""
    if is_for_tensorflow(file):
        return file
    return tf.io.encode_png(read_image(file)).numpy()
