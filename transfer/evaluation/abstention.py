"""What a classifier gains if it may abstain: the risk-coverage curve, and conformal sets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from transfer.evaluation.prediction import probabilities, row_blocks

MAX_POINTS = 100
"""Maximum number of points of a risk-coverage curve in ``evaluation.json``."""


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Accuracy among the images that are kept if those of lower confidence are not predicted.

    Args:
        confidence: probability of the predicted class of each image, float ``[num_examples]``.
        right: whether it is the label, bool ``[num_examples]``.

    Returns:
        ``points``: from the highest threshold to the lowest at most ``MAX_POINTS``, each with the
        ``threshold`` of the confidence (images at it are kept), ``coverage``, the fraction of
        images that are kept, and their ``accuracy``; and ``aurc``, the area under the curve of risk
        (1 minus accuracy) by coverage (arXiv 1805.08206), in which images of equal confidence are
        taken in random order.
    """
    num_examples = len(right)
    order = np.argsort(-confidence, kind="stable")
    thresholds, wrong = confidence[order], np.cumsum(~right[order])
    last = np.flatnonzero(np.append(thresholds[1:] != thresholds[:-1], True))
    # Between the ends of runs of equal confidence, errors are expected to grow linearly.
    kept = np.arange(1, num_examples + 1)
    expected = np.interp(kept, np.append(0, last + 1), np.append(0, wrong[last]))
    chosen = last[np.unique(np.linspace(0, len(last) - 1, MAX_POINTS).round().astype(int))]
    return {
        "aurc": float(np.mean(expected / kept)),
        "points": [
            {
                "threshold": float(thresholds[at]),
                "coverage": (at + 1) / num_examples,
                "accuracy": 1 - wrong[at] / (at + 1),
            }
            for at in chosen.tolist()
        ],
    }


def prediction_sets(
    logits: np.ndarray,
    labels: np.ndarray,
    coverage: float,
    groups: np.ndarray | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Sets of classes that contain the label of a share ``coverage`` of new images, measured.

    Split-conformal prediction (arXiv 2107.07511, section 1) with the score 1 - p(label), both ways
    on random halves of the images: the sets of each half have the threshold of the other one, so no
    image is in both the calibration and the measurement. That images are exchangeable is all that
    is assumed.

    Args:
        logits: float ``[num_examples, num_classes]``.
        labels: int ``[num_examples]``.
        coverage: wanted coverage, more than 0 and less than 1.
        groups: group number of each image, int ``[num_examples]``: halves consist of whole groups.
        seed: seed of the halves.

    Returns:
        ``coverage`` as wanted; ``measured_coverage``, the share of images whose label is in their
        set; ``mean_size`` of the sets, and the shares of images with one class (``single``) and
        with none (``empty``); ``thresholds``: for each half of images, the probability from which
        on a class is in their sets; ``calibrated_on``: the number of images that gave it. With too
        few images to calibrate the threshold is 0, and sets contain all classes.

    Raises:
        ValueError: if the coverage is not between 0 and 1, or there are fewer than two images, or
            groups.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must be more than 0 and less than 1, got {coverage}")
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
    thresholds = np.array(
        [_threshold(own[~in_first], coverage), _threshold(own[in_first], coverage)]
    )
    of_image = np.where(in_first, thresholds[0], thresholds[1])
    sizes = np.empty(len(labels), int)
    for rows in row_blocks(logits):
        sizes[rows] = (probabilities(logits[rows]) >= of_image[rows, None]).sum(-1)
    return {
        "coverage": coverage,
        "measured_coverage": float(np.mean(own >= of_image)),
        "mean_size": float(sizes.mean()),
        "single": float(np.mean(sizes == 1)),
        "empty": float(np.mean(sizes == 0)),
        "thresholds": thresholds.tolist(),
        "calibrated_on": [int((~in_first).sum()), int(in_first.sum())],
    }


def _threshold(own: np.ndarray, coverage: float) -> float:
    """The probability that a share ``coverage`` of new labels reaches, from the probabilities of
    the labels of calibration images."""
    # With a tolerance, so that 0.9 of 9 + 1 is 9 and not 10.
    needed = math.ceil((len(own) + 1) * coverage - 1e-9)
    return 0.0 if needed > len(own) else float(np.sort(own)[::-1][needed - 1])


def _half(num_examples: int, groups: np.ndarray | None, seed: int) -> np.ndarray:
    """A random half of the images, or of their groups, bool ``[num_examples]``."""
    units = np.arange(num_examples)
    if groups is not None:
        _, units = np.unique(groups, return_inverse=True)
    num_units = int(units.max()) + 1
    drawn = np.random.default_rng(seed).permutation(num_units) < num_units // 2
    return np.asarray(drawn[units])
