"""Near-duplicates: images with the same picture, whether one file twice, re-encoded or resized."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import scipy.fft
import scipy.sparse.csgraph
import tensorflow as tf

from transfer.images import decode, orientation, oriented

_THUMBNAIL = 32
_LEAST_PIXELS = 4 * _THUMBNAIL  # a side that a JPEG keeps where it is decoded at a smaller scale
_LARGEST_JPEG = 2**29  # bytes of pixels from which TensorFlow refuses to decode one
_HASH = 8  # low frequencies a side of which the hash is made
_BAND_BITS = 16
_SAME = 4.0  # grey levels that two thumbnails may differ by, in the mean
_FLAT = 2.0  # standard deviation below which a thumbnail shows nothing

FINGERPRINT = np.dtype(
    [("sha256", "V32"), ("readable", "?"), ("thumbnail", "u1", (_THUMBNAIL, _THUMBNAIL))]
)
"""Fingerprint of an image: SHA-256 of its file, whether it decodes, and a gray thumbnail."""


class EncodedImages(Protocol):
    """A ``transfer.data.Split``."""

    def __len__(self) -> int: ...

    def encoded(self) -> tf.data.Dataset: ...

    def where(self, keep: np.ndarray) -> EncodedImages: ...


def fingerprints(
    images: EncodedImages, progress: Callable[[Iterable], Iterable] = iter
) -> np.ndarray:
    """Read and decode every image once; returns ``FINGERPRINT`` ``[len(images)]``.

    Large JPEGs are decoded at a half, a quarter or an eighth of their size, which is several times
    as fast.
    """
    found = np.zeros(len(images), FINGERPRINT)
    examples = images.encoded().map(lambda example: example["image"]).enumerate()
    examples = examples.map(
        lambda index, file: (index, file, _thumbnail(file)), num_parallel_calls=tf.data.AUTOTUNE
    )
    for index, file, thumbnail in progress(examples.ignore_errors().as_numpy_iterator()):
        found[index] = (hashlib.sha256(file).digest(), True, thumbnail)
    failed = ~found["readable"]
    if failed.any():  # at least at this scale
        rest = images.where(failed).encoded()
        found[failed] = [_fingerprint(example["image"]) for example in rest]
    return found


def identical(digests: Sequence[bytes]) -> list[list[int]]:
    """Groups of positions with the same file; each sorted, of two or more."""
    by_digest: dict[bytes, list[int]] = defaultdict(list)
    for index, digest in enumerate(digests):
        by_digest[digest].append(index)
    return [group for group in by_digest.values() if len(group) > 1]


def near_duplicates(found: np.ndarray) -> list[list[int]]:
    """Groups of positions with the same picture: the same file, or one of another size or quality.

    Pictures are compared if their perceptual hashes (the signs of the lowest frequencies of a
    cosine transform: Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions",
    2010, section 3.2.1) agree in a quarter, and are the same if their thumbnails differ by at most
    4 gray levels in the mean.

    Args:
        found: ``FINGERPRINT`` ``[num_images]``.

    Returns:
        Sorted groups of two or more; no position is in two of them.
    """
    digests = [digest.tobytes() for digest in found["sha256"]]
    pairs = [(group[0], other) for group in identical(digests) for other in group[1:]]
    thumbnails = found["thumbnail"].astype(np.float32)
    positions = np.flatnonzero(found["readable"] & (thumbnails.std((1, 2)) > _FLAT))
    thumbnails = thumbnails[positions]
    for group in _candidates(_hashes(thumbnails)) if len(positions) else []:
        pairs += [
            (positions[first], positions[other]) for first, other in _links(thumbnails, group)
        ]
    return _groups(pairs, len(found))


def _fingerprint(file: tf.Tensor) -> tuple[bytes, bool, Any]:
    """Of an image that was not decoded at a smaller scale."""
    digest = hashlib.sha256(file.numpy()).digest()
    try:
        return digest, True, _shrunk(decode(file)).numpy()
    except tf.errors.InvalidArgumentError:
        return digest, False, 0


def _thumbnail(file: tf.Tensor) -> tf.Tensor:
    """``images.decode``, of fewer pixels where a JPEG has many; uint8 ``[32, 32]``."""
    is_jpeg = tf.equal(tf.strings.substr(file, 0, 2), b"\xff\xd8")
    halvings = tf.cond(is_jpeg, lambda: _spare_halvings(file), lambda: tf.constant(0))

    def decoded(ratio: int) -> Callable[[], tf.Tensor]:
        return lambda: tf.io.decode_jpeg(file, channels=3, ratio=ratio)

    def smaller() -> tf.Tensor:
        image = tf.switch_case(halvings - 1, [decoded(2), decoded(4), decoded(8)])
        code = orientation(file)
        return tf.cond(code > 1, lambda: oriented(image, code), lambda: image)

    return _shrunk(tf.cond(halvings > 0, smaller, lambda: decode(file)))


def _spare_halvings(jpeg: tf.Tensor) -> tf.Tensor:
    """How often the sides of a JPEG can be halved, up to 3 times; 0 for what cannot be decoded at
    full size."""
    shape = tf.io.extract_jpeg_shape(jpeg)[:2]
    is_too_large = 3 * tf.reduce_prod(tf.cast(shape, tf.int64)) >= _LARGEST_JPEG
    sides = tf.reduce_min(shape) // tf.constant([2, 4, 8])
    return tf.reduce_sum(tf.cast((sides >= _LEAST_PIXELS) & ~is_too_large, tf.int32))


def _shrunk(image: tf.Tensor) -> tf.Tensor:
    """uint8 ``[height, width, 3]`` to the thumbnail, uint8 ``[32, 32]``."""
    gray = tf.reduce_mean(tf.cast(image, tf.float32), -1, keepdims=True)
    small = tf.image.resize(gray, [_THUMBNAIL, _THUMBNAIL], antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(small[..., 0]), 0.0, 255.0), tf.uint8)


def _hashes(thumbnails: np.ndarray) -> np.ndarray:
    """uint64 ``[num_images]``."""
    low = scipy.fft.dctn(thumbnails, axes=(1, 2))[:, :_HASH, :_HASH].reshape(len(thumbnails), -1)
    bits = low > np.median(low, axis=1, keepdims=True) if len(low) else low > 0
    return np.packbits(bits, axis=1).view(np.uint64).ravel()


def _candidates(hashes: np.ndarray) -> list[np.ndarray]:
    """Groups of positions whose hashes share a band of 16 bits, which those of one picture nearly
    always do."""
    groups = []
    for shift in range(0, 64, _BAND_BITS):
        bands = (hashes >> np.uint64(shift)) & np.uint64(2**_BAND_BITS - 1)
        order = np.argsort(bands, kind="stable")
        ends = np.flatnonzero(np.diff(bands[order])) + 1
        groups += [group for group in np.split(order, ends) if len(group) > 1]
    return groups


def _links(thumbnails: np.ndarray, group: np.ndarray) -> Iterable[tuple[int, int]]:
    """Pairs of equal pictures that connect all equal ones of a group; each image is linked once, so
    that a thousand copies are a thousand pairs."""
    rest = group
    while len(rest) > 1:
        reached, rest = [rest[0]], rest[1:]
        while reached and len(rest):
            first = reached.pop()
            is_same = np.abs(thumbnails[rest] - thumbnails[first]).mean((1, 2)) <= _SAME
            yield from ((first, other) for other in rest[is_same])
            reached += [*rest[is_same]]
            rest = rest[~is_same]


def _groups(pairs: Sequence[tuple[int, int]], count: int) -> list[list[int]]:
    """What pairs connect."""
    if not pairs:
        return []
    first, second = np.array(pairs).T
    graph = scipy.sparse.coo_matrix((np.ones(len(pairs)), (first, second)), (count, count))
    _, component = scipy.sparse.csgraph.connected_components(graph, directed=False)
    members: dict[int, list[int]] = defaultdict(list)
    for index in np.unique(np.array(pairs)):
        members[component[index]].append(int(index))
    return sorted(members.values())
