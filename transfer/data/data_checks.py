"""Checks of labelled images: unreadable images, duplicates, train-test leakage, missing and rare
classes."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transfer.data.dataset import Split
from transfer.data.near_duplicates import near_duplicates

RARE = 10.0
"""A class is rare if another class has at least this many times as many images."""


@dataclass(frozen=True)
class ImageScan:
    """Result of decoding all images of a split once.

    ``fingerprints`` are ``fingerprints.FINGERPRINT`` ``[num_examples]``; ``unreadable``, bool
    ``[num_examples]``, is true for images that cannot be decoded.
    """

    fingerprints: np.ndarray

    @property
    def unreadable(self) -> np.ndarray:
        return ~self.fingerprints["readable"]


def scan(split: Split, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> ImageScan:
    """Read and decode every image once."""
    return ImageScan(split.fingerprints(progress))


def duplicates(images: ImageScan) -> list[list[int]]:
    """Groups of positions of duplicates and near-duplicates; see ``near_duplicates``."""
    return near_duplicates(images.fingerprints)


@dataclass(frozen=True)
class Leaks:
    """Held-out images that are also training images: the same file, under one name or two, or a
    near-duplicate, such as a re-encoded or resized copy. Near-duplicates may also be different
    images that look alike, such as two drawings of a digit."""

    num_identical: int = 0
    num_near: int = 0

    def describe(self) -> list[str]:
        """A warning for each of the two kinds."""
        lines = []
        if self.num_identical:
            lines.append(
                f"{self.num_identical} images are both trained and evaluated on, some perhaps "
                "under two names, so that the accuracy is too high"
            )
        if self.num_near:
            lines.append(
                f"{self.num_near} of the images that are evaluated on look like copies of training "
                "images (near-duplicates), so that the accuracy may be too high"
            )
        return lines


def find_leaks(train: np.ndarray, held_out: np.ndarray) -> Leaks:
    """Count the held-out images that are also training images.

    Args:
        train: fingerprints of the training images, ``fingerprints.FINGERPRINT``
            ``[num_images]``.
        held_out: fingerprints of the held-out images.
    """
    trained = {*map(bytes, train["sha256"])}
    identical = {i for i, digest in enumerate(held_out["sha256"]) if bytes(digest) in trained}
    copies = {
        index - len(train)
        for group in near_duplicates(np.concatenate([train, held_out]))
        for index in group
        if group[0] < len(train) <= index
    }
    return Leaks(len(identical), len(copies - identical))


def describe_balance(
    class_names: Sequence[str], train: np.ndarray, held_out: np.ndarray
) -> list[str]:
    """Warnings about classes without images, about rare classes, and about classes whose names
    differ only in case or Unicode form.

    Args:
        class_names: names in the order of the labels.
        train: labels of the training images, int ``[num_examples]``.
        held_out: labels of the held-out images, int ``[num_examples]``.
    """
    lines = []
    for purpose, labels in (("train on", train), ("evaluate on", held_out)):
        counts = np.bincount(labels, minlength=len(class_names))
        if missing := [name for name, n in zip(class_names, counts, strict=True) if not n]:
            lines.append(f"{_classes_have(missing)} no images to {purpose}: {_some(missing)}")
    counts = np.bincount(train, minlength=len(class_names))
    rare = [
        name for name, n in zip(class_names, counts, strict=True) if n and counts.max() / n >= RARE
    ]
    if rare:
        largest = class_names[int(counts.argmax())]
        lines.append(
            f"{_classes_have(rare)} less than a tenth of the training images of {largest!r}: "
            f"{_some(rare)}; consider class_weights=balanced"
        )
    forms = [unicodedata.normalize("NFC", name).casefold() for name in class_names]
    counts_of = Counter(forms)
    same = [name for name, form in zip(class_names, forms, strict=True) if counts_of[form] > 1]
    if same:
        lines.append(
            f"{len(same)} classes have names that differ only in case or Unicode form: "
            f"{_some(same)}; they are learned as different classes"
        )
    return lines


def _classes_have(names: Sequence[str]) -> str:
    return "1 class has" if len(names) == 1 else f"{len(names)} classes have"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
