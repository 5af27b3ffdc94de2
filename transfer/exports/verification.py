"""Whether an export gives what the classifier gives: the same images through both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from transfer.data.dataset import Split
from transfer.images.decoding import is_for_tensorflow, read_image
from transfer.images.preprocess import to_channels
from transfer.layers.classifier import Classifier
from transfer.runs import run_data

NUM_SYNTHETIC = 8
# Largest difference of a probability.
_TOLERANCES = {"tflite float16": 0.02, "tflite int8": 0.3}
_TOLERANCE = 1e-4
# Labels must be the same where the two most probable classes are so far apart.
_CLEAR = 0.1
_SAME_LABELS = 0.9


@dataclass(frozen=True)
class Samples:
    """Images to compare on: ``files`` that TensorFlow decodes, and their ``pixels``, float32
    ``[num_images, height, width, channels]`` in 0..255, resized for the classifier. ``source`` says
    in words where they are from."""

    files: list[bytes]
    pixels: np.ndarray
    source: str


def samples_of(classifier: Classifier, files: list[bytes], source: str) -> Samples:
    """Samples from encoded image files of any kind that is read here."""
    files = list(map(_for_tensorflow, files))
    return Samples(files, np.stack([resized(classifier, file) for file in files]), source)


def synthetic(classifier: Classifier) -> Samples:
    """A few random textures of the classifier's size, from coarse to fine; the same each time."""
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
    """The encoded files of a number of images, evenly spread over a split."""
    return [example["image"].numpy() for example in run_data.some(split, count).encoded()]


def resized(classifier: Classifier, file: bytes) -> np.ndarray:
    """Pixels of an encoded image as the classifier's network takes them, before ``normalize``:
    float32 ``[height, width, channels]`` in 0..255."""
    preprocess = classifier.preprocess
    return preprocess.resize(to_channels(read_image(file), preprocess.channels)).numpy()


def compare(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Compare probabilities ``[num_images, num_classes]``.

    Returns:
        ``max_difference`` of a probability, ``same_label`` (share of images with the same most
        probable class), and ``same_label_where_clear``, the same of images whose two most probable
        classes are at least 0.1 apart.
    """
    same = found.argmax(-1) == expected.argmax(-1)
    second, first = np.sort(expected, axis=-1)[:, -2:].T
    clear = first - second > _CLEAR
    return {
        "max_difference": float(np.max(np.abs(found - expected))),
        "same_label": float(np.mean(same)),
        "same_label_where_clear": float(np.mean(same[clear])) if clear.any() else 1.0,
    }


def what_is_wrong(kind: str, compared: dict[str, float]) -> str | None:
    """Why an export must not be kept, given what ``compare`` returned; ``None`` if it may."""
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
    """Probabilities, and images per second; the first run prepares things and does not count."""
    predict(pixels)
    start = time.perf_counter()
    found = predict(pixels)
    return found, len(pixels) / (time.perf_counter() - start)


def _for_tensorflow(file: bytes) -> bytes:
    """The same picture as a file that a SavedModel decodes."""
    if is_for_tensorflow(file):
        return file
    return tf.io.encode_png(read_image(file)).numpy()
