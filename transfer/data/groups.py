"""Groups of images that belong together, e.g. all of a patient, a camera or a video.

Images of a group are alike: a classifier that was trained on some of them is not tested by the
others. So a group stays on one side of a hold-out, and in one fold of a cross-validation.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph

logger = logging.getLogger(__name__)


def groups_by_pattern(pattern: str, names: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    r"""Groups of images by a regular expression that is searched for in their names.

    The group is the text that the first parentheses of the pattern match, or the whole match if
    there are none, or they take no part in it. An image whose name does not match is a group of its
    own; their number is logged as a warning.

    Args:
        pattern: a regular expression, such as ``patient(\d+)``.
        names: maps the name of a split to the names of its images.

    Returns:
        For each split, the number of the group of each image, int64; equal in all splits.

    Raises:
        ValueError: if the pattern is not a regular expression, or matches no name.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"group_by={pattern} is not a regular expression: {error}") from error
    number_of: dict[str, int] = {}

    def number(name: str) -> int:
        match = compiled.search(name)
        if match is None:
            return -1
        text = match[min(1, compiled.groups)]
        return number_of.setdefault(match[0] if text is None else text, len(number_of))

    numbers = np.fromiter((number(name) for part in names.values() for name in part), np.int64)
    single = np.flatnonzero(numbers < 0)
    if len(single):
        all_names = itertools.chain.from_iterable(names.values())
        first = next(itertools.islice(all_names, int(single[0]), None))
        if not number_of:
            raise ValueError(f"group_by={pattern} matches no name of an image, such as {first!r}")
        logger.warning(
            f"group_by={pattern} does not match {len(single)} of {len(numbers)} names, such as "
            f"{first!r}; each of these images is a group of its own"
        )
    ends = np.cumsum([len(part) for part in names.values()])[:-1]
    return dict(zip(names, np.split(with_singles(numbers), ends), strict=True))


def with_singles(numbers: np.ndarray) -> np.ndarray:
    """The same group numbers, with a new number in place of each -1."""
    single = numbers < 0
    first = int(numbers.max(initial=-1)) + 1
    return np.where(single, first + np.cumsum(single) - 1, numbers)


def connected(groups: np.ndarray, others: Sequence[Sequence[int]]) -> list[list[int]]:
    """Groups of two or more positions that are connected by either kind of group.

    Args:
        groups: group number of each position, int64 ``[num_examples]``.
        others: lists of positions that also belong together, such as near-duplicates.
    """
    _, groups = np.unique(groups, return_inverse=True)
    num_groups = int(groups.max(initial=-1)) + 1
    firsts = np.repeat([group[0] for group in others], [len(group) for group in others])
    ends = groups[firsts.astype(int)], groups[np.array([p for g in others for p in g], int)]
    graph = scipy.sparse.coo_matrix((np.ones(len(ends[0])), ends), (num_groups, num_groups))
    component = scipy.sparse.csgraph.connected_components(graph, directed=False)[1][groups]
    order = np.argsort(component, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(component[order])) + 1)
    return sorted(part.tolist() for part in parts if len(part) > 1)


def describe_shared(
    train: np.ndarray | None, held_out: np.ndarray | None, names: Sequence[str]
) -> list[str]:
    """A warning if groups of held-out images have training images.

    Args:
        train: group numbers of the training images, int64; ``None`` if they have none.
        held_out: group numbers of the held-out images, int64.
        names: names of the held-out images.
    """
    if train is None or held_out is None:
        return []
    is_shared = np.isin(held_out, train)
    if not is_shared.any():
        return []
    num_shared, num_groups = len(np.unique(held_out[is_shared])), len(np.unique(held_out))
    return [
        f"{num_shared} of the {num_groups} groups that are evaluated on are also trained on "
        f"({is_shared.sum()} of {len(held_out)} images, such as "
        f"{names[int(is_shared.argmax())]!r}), so that the accuracy is too high"
    ]
