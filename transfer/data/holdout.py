"""Stratified hold-out by a hash of the names."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from transfer.data.names import Names


def stratified_holdout(
    labels: np.ndarray,
    names: Sequence[str],
    share: float,
    groups: Sequence[Sequence[int]] = (),
    *,
    nearest: bool = False,
) -> np.ndarray:
    """Stratified hold-out: boolean ``[len(labels)]``, true for the held-out part of each class.

    Examples are chosen by a hash of their names, so that adding or removing a few images changes
    little. At least one example of each class with two or more is held out, and none of a class
    with only one.

    Args:
        labels: int ``[num_examples]``.
        names: one per example.
        share: fraction of each class to hold out, 0 to 1.
        groups: groups of positions to keep on one side, such as near-duplicates, whatever their
            classes. A group is ordered by the hash of its first name, and stays in the training
            part if it is larger than the number still to be held out. No image is held out of a
            class that is a single group.
        nearest: hold a group out if this brings the numbers of its classes nearer to the share,
            even if they then exceed it. For large groups with images of several classes, few of
            which would fit otherwise.
    """
    order = by_hash(names)
    classes, counts = np.unique(labels, return_counts=True)
    sizes = dict(zip(classes.tolist(), counts.tolist(), strict=True))
    targets = {label: min(max(1, round(share * n)), n - 1) for label, n in sizes.items()}
    maxima = {label: n - 1 for label, n in sizes.items()}
    held_out = np.zeros(len(labels), bool)
    if not groups:
        by_class = order[np.argsort(labels[order], kind="stable")]
        starts = np.cumsum(counts) - counts
        for start, label in zip(starts.tolist(), sizes, strict=True):
            held_out[by_class[start : start + targets[label]]] = True
        return held_out
    grouped = {min(group, key=names.__getitem__): [*group] for group in groups}
    is_first = np.ones(len(labels), bool)
    is_first[[position for group in groups for position in group]] = False
    is_first[[*grouped]] = True
    firsts = order[is_first[order]].tolist()
    taken: Counter[int] = Counter()

    def is_nearer(members: list[int]) -> bool:
        """Whether holding out a group brings the numbers of its classes nearer to their targets."""
        added = Counter(labels[members].tolist())
        rest = {label: targets[label] - taken[label] for label in added}
        distance = sum(map(abs, rest.values()))
        return sum(abs(rest[label] - n) for label, n in added.items()) < distance

    def take(members: list[int], limits: Mapping[int, int]) -> None:
        """Hold out a group if this stays within the limits of all its classes."""
        added = Counter(labels[members].tolist())
        if all(taken[label] + n <= limits[label] for label, n in added.items()):
            held_out[members] = True
            taken.update(added)

    for first, label in zip(firsts, labels[firsts].tolist(), strict=True):
        if first in grouped:
            if not nearest or is_nearer(grouped[first]):
                take(grouped[first], maxima if nearest else targets)
        elif taken[label] < targets[label]:
            held_out[first] = True
            taken[label] += 1
    # If all groups of a class exceed its target, hold out the smallest one.
    smallest_first = sorted((grouped[first] for first in firsts if first in grouped), key=len)
    for label in sorted(sizes):
        for members in smallest_first if targets[label] else ():
            if not taken[label] and label in labels[members]:
                take(members, maxima)
    return held_out


def by_hash(names: Sequence[str]) -> np.ndarray:
    """Positions in the order of the SHA-256 of the names, int64 ``[len(names)]``."""
    encoded = names.encoded() if isinstance(names, Names) else map(os.fsencode, names)
    digests = b"".join(hashlib.sha256(name).digest() for name in encoded)
    words = np.frombuffer(digests, ">u8").reshape(-1, 4).astype(np.uint64)
    return np.lexsort(words.T[::-1])
