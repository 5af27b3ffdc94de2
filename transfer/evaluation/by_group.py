"""Intervals and tests for images that come in groups, e.g. several of each patient.

Images of a group are alike, so they count for less than as many independent images: the groups are
the units that are drawn independently.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def effective_size(right: np.ndarray, groups: np.ndarray) -> float:
    """Number of independent images that determine the accuracy as precisely as these images.

    The number of images is divided by the design effect, the variance of the accuracy between
    groups relative to that of independent images (Rao and Scott, doi 10.2307/2532311), which is at
    least 1, and corrected for few groups by quantiles of the t distribution (Dean and Pagano, doi
    10.1093/jssam/smv024). It is the number of groups if all images are right or all are wrong,
    where the design effect is undefined.

    Args:
        right: whether each image is classified correctly, bool ``[num_examples]``.
        groups: group number of each image, int ``[num_examples]``.
    """
    from scipy.special import stdtrit

    num_examples, accuracy = len(right), float(right.mean())
    _, groups = np.unique(groups, return_inverse=True)
    sizes = np.bincount(groups)
    num_groups = len(sizes)
    if not 0 < accuracy < 1 or num_groups == 1:
        return float(num_groups)
    # Of the ratio estimator, by linearization.
    deviations = np.bincount(groups, right) - accuracy * sizes
    variance = num_groups / (num_groups - 1) * (deviations**2).sum() / num_examples**2
    design_effect = max(1.0, variance * num_examples / (accuracy * (1 - accuracy)))
    few = stdtrit(num_examples - 1, 0.975) / stdtrit(num_groups - 1, 0.975)
    return float(num_examples / design_effect * few**2)


def wilson_interval(accuracy: float, size: float) -> tuple[float, float]:
    """95 % Wilson score interval (doi 10.1080/01621459.1927.10502953), also for an effective
    ``size`` that is not an integer."""
    from scipy.special import ndtri

    z2 = float(ndtri(0.975)) ** 2 / size
    middle, scale = accuracy + z2 / 2, 1 + z2
    half = (z2 * (accuracy * (1 - accuracy) + z2 / 4)) ** 0.5
    # With every image right, the upper end is 1 but for rounding.
    low = 0.0 if accuracy == 0 else max(0.0, (middle - half) / scale)
    high = 1.0 if accuracy == 1 else min(1.0, (middle + half) / scale)
    return low, high


def proportion_interval(is_so: np.ndarray, groups: np.ndarray | None = None) -> list[float]:
    """95 % Wilson score interval of the share of images that have a property.

    Args:
        is_so: whether each image has it, bool ``[num_examples]``, at least one.
        groups: group number of each image, int ``[num_examples]``: the interval is then that of
            the ``effective_size``.

    Example:
        >>> import numpy as np
        >>> from transfer.evaluation.by_group import proportion_interval
        >>> low, high = proportion_interval(np.ones(20, bool))
        >>> print(f"{low:.3f} {high:.3f}")
        0.839 1.000
    """
    size = len(is_so) if groups is None else effective_size(is_so, groups)
    return list(wilson_interval(float(is_so.mean()), size))


def resampler(
    num_examples: int, groups: np.ndarray | None
) -> Callable[[np.random.Generator], np.ndarray]:
    """A function that draws a bootstrap resample, int positions: as many images, or as many groups
    with all of their images (Davison and Hinkley, doi 10.1017/CBO9780511802843, section 3.8)."""
    if groups is None:
        return lambda generator: generator.integers(0, num_examples, num_examples)
    _, groups = np.unique(groups, return_inverse=True)
    order, sizes = np.argsort(groups, kind="stable"), np.bincount(groups)
    starts = np.cumsum(sizes) - sizes

    def resample(generator: np.random.Generator) -> np.ndarray:
        drawn = generator.integers(0, len(sizes), len(sizes))
        counts = sizes[drawn]
        # Positions of the drawn groups in ``order``, one range after the other.
        first = np.repeat(starts[drawn] - (np.cumsum(counts) - counts), counts)
        return order[first + np.arange(counts.sum())]

    return resample


def exchange_test(difference: np.ndarray, groups: np.ndarray) -> float:
    """Two-sided p-value of the hypothesis that two classifiers may be exchanged in each group.

    Exact randomization test: the sum of the differences, with the sign of each group's sum drawn at
    random (whole-block sign flipping, doi 10.1016/j.neuroimage.2015.05.092). With one image per
    group, it is McNemar's exact test.

    Args:
        difference: for each image 1 if only the first classifier is right, -1 if only the second
            is, else 0, int ``[num_examples]``.
        groups: group number of each image, int ``[num_examples]``.
    """
    import scipy.signal
    from scipy.stats import binom

    _, groups = np.unique(groups, return_inverse=True)
    sums = np.bincount(groups, difference).round().astype(int)
    # Probabilities of the sum of the positive sums: 0 to the total of their absolute values.
    p = np.ones(1)
    for size, count in zip(*np.unique(np.abs(sums[sums != 0]), return_counts=True), strict=True):
        step = np.zeros(size * count + 1)
        step[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        p = scipy.signal.convolve(p, step)
    possible = 2 * np.arange(len(p)) - (len(p) - 1)
    return float(np.clip(p[np.abs(possible) >= abs(sums.sum())].sum(), 0.0, 1.0))
