"""Fingerprints of images: the hash of the file, readability, and a small gray version."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from transfer.core import measurement
from transfer.images.decoding import decode, read_tensor
from transfer.images.orientation import orientation, oriented

_THUMBNAIL = 32
_LEAST_PIXELS = 4 * _THUMBNAIL  # minimum side of a JPEG that is decoded at a reduced scale
_LARGE = 2**26  # elements of an image above which no float copy of it is made
_SAVED_TOGETHER = 4096  # images; decoding them takes about ten seconds
_LARGEST_JPEG = 2**29  # bytes of pixels from which TensorFlow refuses to decode a JPEG

FINGERPRINT = np.dtype(
    [("sha256", "V32"), ("readable", "?"), ("thumbnail", "u1", (_THUMBNAIL, _THUMBNAIL))]
)
"""Fingerprint of an image: SHA-256 of its file, whether it can be decoded, and a gray thumbnail."""


class EncodedImages(Protocol):
    """Interface of ``transfer.data.dataset.Split``."""

    def __len__(self) -> int: ...

    @property
    def names(self) -> Sequence[str]: ...

    def encoded(self) -> tf.data.Dataset: ...

    def where(self, keep: np.ndarray) -> EncodedImages: ...


class Fingerprints:
    """Fingerprints in memory, by the ids of the examples: arrays instead of one object per image.

    ``load`` yields those of the given ids, ``S16`` ``[n]``, that are kept elsewhere, as positions
    and fingerprints; ``save`` keeps new ones there. See
    ``transfer.activations.fingerprints.remembered``.
    """

    load: Callable[[np.ndarray], Iterable[tuple[np.ndarray, np.ndarray]]] | None = None
    save: Callable[[np.ndarray, np.ndarray], None] | None = None

    def __init__(self) -> None:
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []

    def of(
        self,
        images: EncodedImages,
        ids: np.ndarray,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> np.ndarray:
        """The fingerprints of images, ``FINGERPRINT`` ``[len(images)]``, not to be changed. Decodes
        those that are neither in memory nor loaded.

        Args:
            images: the images.
            ids: their ids, ``S16`` ``[len(images)]``.
            progress: wraps the images that are decoded.
        """
        prints = np.zeros(len(ids), FINGERPRINT)
        in_memory = np.zeros(len(ids), bool)
        for known, arrays in self._arrays:
            is_here, rows = _found(ids, known)
            prints[is_here] = arrays[rows[is_here]]
            in_memory |= is_here
        if in_memory.all():
            return prints
        is_known = in_memory.copy()
        rest = np.flatnonzero(~in_memory)
        for positions, rows in self.load(ids[rest]) if self.load is not None else ():
            prints[rest[positions]] = rows
            is_known[rest[positions]] = True
        if not is_known.all():
            new_ids = ids[~is_known]

            def save(positions: np.ndarray, rows: np.ndarray) -> None:
                if self.save is not None and len(positions):
                    self.save(new_ids[positions], rows)

            new = fingerprints(images.where(~is_known), progress, save)
            if is_known.any():
                prints[~is_known] = new
            else:  # no copy: they take a gigabyte per million images
                prints = new
        prints.flags.writeable = False
        self._arrays.append(
            (ids[rest], prints[rest]) if in_memory.any() else (ids, prints),
        )
        return prints


def ids_digest(ids: np.ndarray) -> str:
    """SHA-256 of the ids of images in an order, ``S16`` ``[n]``; reads no images."""
    return hashlib.sha256(ids.tobytes()).hexdigest()


def _found(ids: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which ids are among others, bool ``[len(ids)]``, and their positions there."""
    order = np.argsort(among, kind="stable")
    places = np.searchsorted(among, ids, sorter=order).clip(max=len(among) - 1)
    rows = order[places]
    return among[rows] == ids, rows


def fingerprints(
    images: EncodedImages,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    save: Callable[[np.ndarray, np.ndarray], None] = lambda positions, prints: None,
) -> np.ndarray:
    """Read and decode every image once; returns ``FINGERPRINT`` ``[len(images)]``.

    Large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size, which is several times faster.

    Args:
        images: the images.
        progress: wraps the images.
        save: called with the positions and fingerprints of each few thousand images, so that an
            interrupted scan does not lose them; not with those of unreadable images, which may be
            readable later: after another library was installed, or the network is back.
    """
    prints = np.zeros(len(images), FINGERPRINT)
    saved = 0

    def save_until(end: int) -> None:
        positions = saved + np.flatnonzero(prints["readable"][saved:end])
        save(positions, prints[positions])

    examples = images.encoded().map(
        lambda example: (example["name"], example["image"], _thumbnail(example["image"])),
        num_parallel_calls=measurement.num_cpus(),
    )
    # Images that cannot be decoded are left out, and so are those around one that cannot be read.
    names = enumerate(images.names)
    for name, file, thumbnail in progress(examples.ignore_errors().as_numpy_iterator()):
        index = next(index for index, other in names if os.fsencode(other) == name)
        prints[index] = (hashlib.sha256(file).digest(), True, thumbnail)
        if index + 1 - saved >= _SAVED_TOGETHER:
            save_until(index + 1)
            saved = index + 1
    save_until(len(prints))
    failed = ~prints["readable"]
    if failed.any():  # retry at full scale
        rest = images.where(failed).encoded().as_numpy_iterator()
        prints[failed] = [_fingerprint(example["image"]) for example in rest]
        was_read = np.flatnonzero(failed)[prints["readable"][failed]]
        save(was_read, prints[was_read])
    return prints


def _fingerprint(file: bytes) -> tuple[bytes, bool, Any]:
    """SHA-256, readability and thumbnail of an image, decoded at full scale."""
    digest = hashlib.sha256(file).digest()
    try:
        return digest, True, _shrunk(read_tensor(file)).numpy()
    except ValueError:
        return digest, False, 0


@tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
def _thumbnail(file: tf.Tensor) -> tf.Tensor:
    """Thumbnail, uint8 ``[32, 32]``; large JPEGs are decoded at a reduced scale."""
    is_jpeg = tf.equal(tf.strings.substr(file, 0, 2), b"\xff\xd8")
    halvings = tf.cond(is_jpeg, lambda: _spare_halvings(file), lambda: tf.constant(0))

    def decoded(ratio: int) -> Callable[[], tf.Tensor]:
        return lambda: tf.io.decode_jpeg(file, channels=3, ratio=ratio)

    def smaller() -> tf.Tensor:
        image = tf.switch_case(halvings - 1, [decoded(2), decoded(4), decoded(8)])
        code = tf.numpy_function(_orientation, [file], tf.int32, stateful=False)
        return tf.cond(code > 1, lambda: oriented(image, code), lambda: image)

    return _shrunk(tf.cond(halvings > 0, smaller, lambda: decode(file)))


def _orientation(jpeg: bytes) -> np.int32:
    return np.int32(orientation(jpeg))


def _spare_halvings(jpeg: tf.Tensor) -> tf.Tensor:
    """Number of times, 0 to 3, that the sides of a JPEG can be halved while decoding; 0 if it is
    too large to be decoded at full size."""
    shape = tf.io.extract_jpeg_shape(jpeg)[:2]
    is_too_large = 3 * tf.reduce_prod(tf.cast(shape, tf.int64)) >= _LARGEST_JPEG
    sides = tf.reduce_min(shape) // tf.constant([2, 4, 8])
    return tf.reduce_sum(tf.cast((sides >= _LEAST_PIXELS) & ~is_too_large, tf.int32))


def _shrunk(image: tf.Tensor) -> tf.Tensor:
    """uint8 ``[height, width, 3]`` to the thumbnail, uint8 ``[32, 32]``."""

    def resized(pixels: tf.Tensor) -> tf.Tensor:
        return tf.image.resize(pixels, [_THUMBNAIL, _THUMBNAIL], antialias=True)

    def as_floats() -> tf.Tensor:
        return resized(tf.reduce_mean(tf.cast(image, tf.float32), -1, keepdims=True))[..., 0]

    def as_bytes() -> tf.Tensor:
        """Equal up to rounding; slower, but without a float32 copy of the image."""
        return tf.reduce_mean(resized(image), -1)

    small = tf.cond(tf.size(image) < _LARGE, as_floats, as_bytes)
    return tf.cast(tf.clip_by_value(tf.round(small), 0.0, 255.0), tf.uint8)
