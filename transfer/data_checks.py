"""What may be wrong with labelled images: unreadable ones, the same one twice, labels that do not
look right, classes that are missing or rare."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
import scipy.sparse.csgraph
import scipy.special
import tensorflow as tf
from sklearn.model_selection import StratifiedKFold

from transfer.data import Split
from transfer.images import decode, why_unreadable
from transfer.linear import GRID, fit_logistic_regression

FOLDS = 5
RARE = 10.0
"""A class is called rare if another has so many times as many images."""

_THUMBNAIL = 32
_HASH = 8  # low frequencies a side of which the hash is made
_BAND_BITS = 16
_SAME = 4.0  # grey levels that two thumbnails may differ by, in the mean
_FLAT = 2.0  # standard deviation below which a thumbnail shows nothing
_READERS = 4


@dataclass(frozen=True)
class Look:
    """What one pass over images found.

    ``digests`` are SHA-256 of the files, ``thumbnails`` float32 ``[num_examples, 32, 32]`` in grey
    levels, and ``unreadable`` says of which there is none: bool ``[num_examples]``.
    """

    digests: list[bytes]
    thumbnails: np.ndarray
    unreadable: np.ndarray


def look(split: Split, progress: Callable[[Iterable], Iterable] = iter) -> Look:
    """Read and decode every image once."""
    count = len(split)
    thumbnails = np.zeros((count, _THUMBNAIL, _THUMBNAIL), np.float32)
    unreadable = np.zeros(count, bool)

    def one(item: tuple[int, Any]) -> bytes:
        index, file = item
        try:
            thumbnails[index] = _thumbnail(file).numpy()
        except tf.errors.InvalidArgumentError:
            unreadable[index] = True
        return hashlib.sha256(file.numpy()).digest()

    digests: list[bytes] = []
    with ThreadPoolExecutor(_READERS) as pool:
        files = (example["image"] for example in progress(split.encoded().prefetch(_READERS)))
        for chunk in _chunks(enumerate(files), 16 * _READERS):  # the pool would read all of them
            digests += pool.map(one, chunk)
    return Look(digests, thumbnails, unreadable)


def digests(split: Split, unreadable: dict[str, str] | None = None) -> list[bytes]:
    """SHA-256 of each file; nothing is decoded.

    Args:
        split: the images.
        unreadable: where given, files that are empty, cut short or not images are added to it by
            name, with the reason.
    """
    found = []
    for example in split.encoded().as_numpy_iterator():
        found.append(hashlib.sha256(example["image"]).digest())
        if unreadable is not None and (reason := why_unreadable(example["image"])):
            unreadable[os.fsdecode(example["name"])] = reason
    return found


def identical(digests: Sequence[bytes]) -> list[list[int]]:
    """Groups of positions with the same file; each sorted, of two or more."""
    by_digest: dict[bytes, list[int]] = defaultdict(list)
    for index, digest in enumerate(digests):
        by_digest[digest].append(index)
    return [group for group in by_digest.values() if len(group) > 1]


def duplicates(found: Look) -> list[list[int]]:
    """Groups of positions with the same picture: the same file, or one of another size or quality.

    Pictures are compared if their perceptual hashes (the signs of the lowest frequencies of a
    cosine transform: Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions",
    2010, section 3.2.1) agree in a quarter, and are the same if their thumbnails differ by at most
    4 grey levels in the mean.
    """
    pairs = [(group[0], other) for group in identical(found.digests) for other in group[1:]]
    shows = ~found.unreadable & (found.thumbnails.std((1, 2)) > _FLAT)
    positions = np.flatnonzero(shows)
    thumbnails = found.thumbnails[positions]
    for group in _candidates(_hashes(thumbnails)) if len(positions) else []:
        # Each against the next ones that are there: groups are small, but where a dataset is odd.
        for number, first in enumerate(group[:-1]):
            rest = group[number + 1 :]
            differences = np.abs(thumbnails[rest] - thumbnails[first]).mean((1, 2))
            pairs += [
                (int(positions[first]), int(positions[other]))
                for other in rest[differences <= _SAME]
            ]
    return _groups(pairs, len(found.digests))


def doubtful_labels(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Out-of-fold probabilities, and the order in which labels should be looked at.

    Each image is judged by a logistic regression on the features of others (5 folds). Those come
    first that are most surely of another class than their label says (Northcutt et al., "Confident
    Learning", arXiv 1911.00068, on why they must be others).

    Args:
        features: float32 ``[num_examples, width]``.
        labels: int ``[num_examples]``.

    Returns:
        float64 ``[num_examples, num_classes]``, and the positions of the images whose label is not
        the most probable one, int.

    Raises:
        ValueError: if a class has fewer than two images.
    """
    count = int(np.bincount(labels)[np.unique(labels)].min())
    if count < 2:
        raise ValueError("labels can be checked where each class has at least 2 images")
    num_classes = int(labels.max()) + 1
    p = np.zeros((len(labels), num_classes))
    folds = StratifiedKFold(min(FOLDS, count), shuffle=True, random_state=0)
    strength = GRID[len(GRID) // 2]
    for train, rest in folds.split(labels, labels):
        head = fit_logistic_regression(
            features[train], labels[train], num_classes, C=strength * len(train)
        )
        logits = features[rest].astype(np.float64) @ head.kernel + head.bias
        p[rest] = scipy.special.softmax(logits, axis=-1)
    own = p[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(p.argmax(-1) != labels)
    return p, wrong[np.argsort((own - p.max(-1))[wrong], kind="stable")]


def describe_balance(
    class_names: Sequence[str], train: np.ndarray, held_out: np.ndarray
) -> list[str]:
    """Warnings about classes without images, and about rare ones.

    Args:
        class_names: in the order of the labels.
        train: labels, int ``[num_examples]``.
        held_out: labels of the others.
    """
    lines = []
    for what, labels in (("train on", train), ("evaluate on", held_out)):
        counts = np.bincount(labels, minlength=len(class_names))
        if missing := [name for name, n in zip(class_names, counts, strict=True) if not n]:
            lines.append(f"{len(missing)} classes have no images to {what}: {_some(missing)}")
    counts = np.bincount(train, minlength=len(class_names))
    rare = [
        name for name, n in zip(class_names, counts, strict=True) if n and counts.max() / n >= RARE
    ]
    if rare:
        most = class_names[int(counts.argmax())]
        lines.append(
            f"{len(rare)} classes have less than a tenth of the training images of {most!r}: "
            f"{_some(rare)}; consider --class-weights balanced"
        )
    return lines


@tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
def _thumbnail(file: tf.Tensor) -> tf.Tensor:
    image = tf.image.resize(decode(file), [_THUMBNAIL, _THUMBNAIL], antialias=True)
    return tf.reduce_mean(image, -1)


def _hashes(thumbnails: np.ndarray) -> np.ndarray:
    """uint64 ``[num_examples]``."""
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


def _chunks(items: Iterable, size: int) -> Iterable[list]:
    chunk: list = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    yield chunk


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
