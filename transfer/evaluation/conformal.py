"""Conformal prediction sets: classes that contain the label with a chosen probability."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from transfer.evaluation.prediction import check_share, probabilities, row_blocks


def min_units(coverage: float) -> int:
    """Number of images, or groups, from which on a coverage can be promised.

    Example:
        >>> from transfer.evaluation.conformal import min_units
        >>> min_units(0.9), min_units(0.99)
        (9, 99)
    """
    return math.ceil(coverage / (1 - coverage) - 1e-9)


def prediction_sets(
    logits: np.ndarray,
    labels: np.ndarray,
    coverage: float,
    groups: np.ndarray | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Sets of classes that contain the label of a share ``coverage`` of new images, measured.

    Split-conformal prediction (arXiv 2107.07511, section 1) with the score 1 - p(label). That
    images are exchangeable is all that is assumed; with groups, that groups are (arXiv 2306.06342,
    section 3), and the coverage is that of an image of a new group, where each group counts alike.

    The sets of new images have the threshold of all of these images. What such sets are worth is
    measured both ways on random halves of the images: the sets of each half have the threshold of
    the other one, so no image is in both the calibration and the measurement.

    Args:
        logits: float ``[num_examples, num_classes]``.
        labels: int ``[num_examples]``.
        coverage: wanted coverage, more than 0 and less than 1.
        groups: group number of each image, int ``[num_examples]``: halves consist of whole groups.
        seed: seed of the halves.

    Returns:
        ``coverage`` as wanted; ``threshold``, the probability from which on a class is in the set
        of a new image; ``is_promised``, whether there are enough images, or groups, for the
        coverage: otherwise the threshold is 0, and sets contain all classes. Of the two halves:
        ``measured_coverage``, the share of images whose label is in their set (with groups, the
        mean of the shares of the groups); ``mean_size`` of the sets, and the shares of images with
        one class (``single``) and with none (``empty``); ``thresholds`` of the sets of each half;
        ``calibrated_on``: the number of images that gave it.

    Raises:
        ValueError: if the coverage is not between 0 and 1, or there are fewer than two images, or
            groups.
    """
    check_share("coverage", coverage)
    in_first = _half(len(labels), groups, seed)
    if in_first.all() or not in_first.any():
        raise ValueError(
            "coverage=P calibrates on one half of the images and measures on the other, for which "
            f"it needs at least two images, or groups; got {len(labels)} images"
        )
    own = np.empty(len(labels))
    for rows in row_blocks(logits):
        p = probabilities(logits[rows])
        own[rows] = p[np.arange(len(p)), labels[rows]]
    units = np.arange(len(labels)) if groups is None else groups

    def threshold_of(chosen: np.ndarray) -> float:
        return _threshold(own[chosen], units[chosen], coverage)

    thresholds = np.array([threshold_of(~in_first), threshold_of(in_first)])
    of_image = np.where(in_first, thresholds[0], thresholds[1])
    sizes = np.empty(len(labels), int)
    for rows in row_blocks(logits):
        sizes[rows] = (probabilities(logits[rows]) >= of_image[rows, None]).sum(-1)
    return {
        "coverage": coverage,
        "threshold": threshold_of(np.ones(len(labels), bool)),
        "is_promised": len(np.unique(units)) >= min_units(coverage),
        "measured_coverage": float(np.average(own >= of_image, weights=_weights(units))),
        "mean_size": float(sizes.mean()),
        "single": float(np.mean(sizes == 1)),
        "empty": float(np.mean(sizes == 0)),
        "thresholds": thresholds.tolist(),
        "calibrated_on": [int((~in_first).sum()), int(in_first.sum())],
    }


def _threshold(own: np.ndarray, units: np.ndarray, coverage: float) -> float:
    """The probability that a share ``coverage`` of new labels reaches.

    Args:
        own: probabilities of the labels of calibration images, float ``[num_examples]``.
        units: number of the unit, an image or a group, of each image, int ``[num_examples]``.
        coverage: the share.
    """
    order = np.argsort(-own, kind="stable")
    # Each unit has the same weight, and so has the new one, whose label may have any probability.
    reached = np.cumsum(_weights(units)[order]) / (len(np.unique(units)) + 1)
    # With a tolerance, so that 0.9 of 9 + 1 is 9 and not 10.
    needed = int(np.searchsorted(reached, coverage - 1e-9))
    return float(own[order][needed]) if needed < len(own) else 0.0


def _weights(units: np.ndarray) -> np.ndarray:
    """For each image 1 divided by the number of images of its unit."""
    _, units, sizes = np.unique(units, return_inverse=True, return_counts=True)
    return np.asarray(1 / sizes[units])


def _half(num_examples: int, groups: np.ndarray | None, seed: int) -> np.ndarray:
    """A random half of the images, or of their groups, bool ``[num_examples]``."""
    units = np.arange(num_examples)
    if groups is not None:
        _, units = np.unique(groups, return_inverse=True)
    num_units = int(units.max()) + 1
    drawn = np.random.default_rng(seed).permutation(num_units) < num_units // 2
    return np.asarray(drawn[units])
