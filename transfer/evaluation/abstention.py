"""What a classifier gains if it may abstain: the risk-coverage curve, and the confidence from which
on a chosen risk is kept."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from transfer.evaluation.prediction import check_share

MAX_POINTS = 100
"""Maximum number of points of a risk-coverage curve in ``evaluation.json``."""
CONFIDENCE = 0.95
"""Confidence with which ``risk_threshold`` bounds the risk."""


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


def min_without_error(risk: float, confidence: float = CONFIDENCE) -> int:
    """Number of images without an error that bound the risk with a confidence.

    Example:
        >>> from transfer.evaluation.abstention import min_without_error
        >>> min_without_error(0.05), min_without_error(0.01)
        (59, 299)
    """
    return math.ceil(math.log(1 - confidence) / math.log1p(-risk) - 1e-9)


def risk_threshold(
    confidence: np.ndarray,
    right: np.ndarray,
    risk: float,
    groups: np.ndarray | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The lowest confidence at which the error rate among the images that are kept is at most
    ``risk``, with ``CONFIDENCE`` over the draw of these images.

    Selective classification with guaranteed risk (arXiv 1705.08500) by fixed-sequence testing with
    several starts (arXiv 2110.01052): from the most confident half of the images on, and from the
    most confident quarter, eighth and so on, one image after the other is added as long as the
    Clopper-Pearson bound of the error rate is at most the risk. The starts share the probability of
    an error equally; there are as many as could pass without a wrong image. They are fixed before
    any label is seen. Assumes that images are independent, and that the error rate among the images
    above a threshold does not rise with the threshold.

    Args:
        confidence: probability of the predicted class of each image, float ``[num_examples]``.
        right: whether it is the label, bool ``[num_examples]``.
        risk: error rate among the images that are kept, more than 0 and less than 1.
        groups: group number of each image, int ``[num_examples]``. Images of a group are not
            independent, so that one of each is drawn for the tests. The risk is that of an image
            of a new group, where each group counts alike.
        seed: seed of this draw.

    Returns:
        ``risk``; ``threshold``, the confidence from which on images are kept, ``None`` if there is
        none that keeps the risk; ``bound``, the upper bound of the error rate there; ``coverage``,
        the share of images that are kept, and their ``accuracy``; ``calibrated_on``, the number of
        images in the tests; ``needed``, the number that suffices without an error. Without a
        threshold, ``coverage`` is 0, ``accuracy`` ``None``, and ``bound`` the lowest at a start.

    Raises:
        ValueError: if the risk is not between 0 and 1.

    Example:
        >>> import numpy as np
        >>> from transfer.evaluation.abstention import risk_threshold
        >>> confidence = np.linspace(0.99, 0.5, 200)
        >>> found = risk_threshold(confidence, confidence > 0.7, risk=0.05)
        >>> print(f"{found['threshold']:.3f} {found['coverage']:.3f} {found['bound']:.3f}")
        0.698 0.595 0.039
    """
    check_share("risk", risk)
    drawn = np.arange(len(right)) if groups is None else _one_of_each(groups, seed)
    order = drawn[np.argsort(-confidence[drawn], kind="stable")]
    ordered, num_wrong = confidence[order], np.cumsum(~right[order])
    # Images of equal confidence are kept together.
    kept = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)) + 1
    starts = _starts(len(order), risk)
    bounds = _upper_bounds(num_wrong[kept - 1], kept, 1 - (1 - CONFIDENCE) / len(starts))
    bound, number = 1.0, 0
    for start in starts:
        tested = np.flatnonzero(kept >= start)
        passed = tested[np.cumsum(bounds[tested] > risk) == 0]
        if len(passed):  # from a later start, the tests would end at the same image, or before
            bound, number = float(bounds[passed[-1]]), int(kept[passed[-1]])
            break
        bound = min([bound, *bounds[tested[:1]].tolist()])
    threshold, accuracy, is_kept = None, None, np.zeros(len(right), bool)
    if number:
        threshold = _between(ordered, number)
        is_kept = confidence >= threshold
        accuracy = float(right[is_kept].mean())
    return {
        "risk": risk,
        "threshold": threshold,
        "bound": bound,
        "coverage": float(is_kept.mean()),
        "accuracy": accuracy,
        "calibrated_on": len(order),
        "needed": min_without_error(risk),
    }


def _starts(num_images: int, risk: float) -> list[int]:
    """The numbers of most confident images from which tests begin, from the largest on."""
    starts: list[int] = []
    while True:
        share = 2 ** -(len(starts) + 1)
        error = (1 - CONFIDENCE) / (len(starts) + 1)
        if num_images * share < min_without_error(risk, 1 - error):
            return starts or [min_without_error(risk)]
        starts.append(math.ceil(num_images * share))


def _upper_bounds(num_wrong: np.ndarray, totals: np.ndarray, confidence: float) -> np.ndarray:
    """One-sided Clopper-Pearson bounds of error rates (doi 10.1093/biomet/26.4.404)."""
    from scipy.special import betaincinv

    num_right = totals - num_wrong
    bounds = betaincinv(num_wrong + 1, np.maximum(num_right, 1), confidence)
    return np.where(num_right > 0, bounds, 1.0)


def _between(ordered: np.ndarray, number: int) -> float:
    """A threshold that the first ``number`` of descending confidences reach, and no other. 0 if all
    reach it, otherwise one of few digits about halfway, so that it does not depend on the last bits
    of probabilities."""
    if number == len(ordered):
        return 0.0
    lowest, next_one = float(ordered[number - 1]), float(ordered[number])
    middle, quarter = (lowest + next_one) / 2, (lowest - next_one) / 4
    rounded = (float(f"{middle:.{digits}g}") for digits in range(1, 18))
    short = next((value for value in rounded if abs(value - middle) <= quarter), middle)
    return short if short > next_one else lowest


def _one_of_each(groups: np.ndarray, seed: int) -> np.ndarray:
    """Positions of one random image of each group."""
    order = np.random.default_rng(seed).permutation(len(groups))
    _, first = np.unique(groups[order], return_index=True)
    return np.asarray(order[first])
