"""Near-duplicates among training images, which a cross-validation must not separate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from transfer.data.dataset import Split
from transfer.data.groups import connected, with_singles

logger = logging.getLogger(__name__)


def keep_together(split: Split, copies: Sequence[Sequence[int]]) -> Split:
    """The same examples, of a source in whose groups near-duplicates are joined, so that a
    cross-validation leaves them out together.

    Near-duplicates that are all that a class has stay apart, as it could not be left out otherwise.

    Args:
        split: examples.
        copies: lists of positions in the split; see ``near_duplicates``.
    """
    own = np.arange(len(split)) if split.groups is None else split.groups
    single = _num_groups(split, _joined(own, copies)) < 2
    copied = np.flatnonzero(single & (_num_groups(split, own) > 1))
    if len(copied):
        names = [repr(split.source.class_names[label]) for label in copied[:5]]
        logger.warning(
            f"all training images of {', '.join(names)}{', ...' * (len(copied) > 5)} are "
            "near-duplicates of each other, so that cross-validated accuracies are too high"
        )
    kept = [group for group in copies if not single[split.labels[list(group)]].any()]
    if not kept:
        return split
    groups = _joined(own, kept)
    numbers = {name: np.full(size, -1, np.int64) for name, size in split.source.sizes.items()}
    start = 0
    for name, indices in split.parts:
        numbers[name][indices] = groups[start : start + len(indices)]
        start += len(indices)
    ends = np.cumsum([len(part) for part in numbers.values()])[:-1]
    every = np.split(with_singles(np.concatenate(list(numbers.values()))), ends)
    of = dict(zip(numbers, every, strict=True))
    return replace(split, source=replace(split.source, groups=of.__getitem__))


def _num_groups(split: Split, groups: np.ndarray) -> np.ndarray:
    """The number of groups of each class, int ``[num_classes]``."""
    labels = np.unique(np.stack([split.labels, groups]), axis=1)[0]
    return np.bincount(labels, minlength=len(split.source.class_names))


def _joined(groups: np.ndarray, copies: Sequence[Sequence[int]]) -> np.ndarray:
    """Group numbers in which all groups that share near-duplicates are one."""
    joined = np.array(groups)
    for members in connected(groups, copies):
        joined[members] = joined[members[0]]
    return joined
