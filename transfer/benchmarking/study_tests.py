"""Statistical tests of the rows of a study."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from transfer.benchmarking.study_results import Outcome, Study, by_shots, summarized
from transfer.evaluation import by_group

MAX_GROUP_TESTS = 2000
"""More tests of images in groups than these are left out: each takes a few milliseconds."""


def paired_t_test(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray
) -> float | None:
    """Two-sided p-value of Student's paired t test.

    The Wilcoxon signed-rank test would need six seeds to reach 0.05 at all: with n pairs, its
    smallest two-sided p-value is 2^(1 - n).

    Args:
        first: one value per seed.
        second: the same for the other row.

    Returns:
        1 if all values are equal; ``None`` for fewer than two seeds, and if all differences are
        equal but not zero, as their variance is then unknown.
    """
    difference = np.subtract(first, second)
    if not difference.any() and len(difference) > 1:
        return 1.0
    if len(difference) < 2 or np.ptp(difference) < 1e-12:
        return None
    return float(stats.ttest_rel(first, second).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values adjusted for the number of tests by Holm's step-down method (jstor 4615733).

    ``None`` stays ``None``, and does not count as a test.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = highest
    return adjusted


def pairs(study: Study) -> list[dict[str, Any]]:
    """Tests of all pairs of rows with the same ``shots_per_class``, over the seeds that both have.

    That more training images help is no question, so rows with different numbers of them are not
    compared, and do not count in the adjustment.

    Returns:
        For each pair ``first`` and ``second``, their labels, ``a`` and ``b``, their axes, ``n``
        (seeds), ``difference`` (mean accuracy of the first minus that of the second), ``p`` of the
        paired t test, ``p_holm``, adjusted for the number of pairs with this ``shots_per_class``,
        and ``mcnemar``: maps each seed to the p-value of ``transfer.evaluation.metrics.compare`` on
        the held-out images, not adjusted. It is empty for images in groups if there would be more
        than ``MAX_GROUP_TESTS``.
    """
    results: list[dict[str, Any]] = []
    mcnemar = None if leaves_out_mcnemar(study) else _McNemar(study)
    for rows in by_shots(summarized(study)):
        tests: list[dict[str, Any]] = []
        for first, second in itertools.combinations(rows, 2):
            seeds = [seed for seed in first.outcomes if seed in second.outcomes]
            if not seeds:
                continue
            both = [(first.outcomes[seed], second.outcomes[seed]) for seed in seeds]
            ours, theirs = (
                np.array([run.accuracy for run in runs]) for runs in zip(*both, strict=True)
            )
            p_values = {} if mcnemar is None else dict(zip(seeds, map(mcnemar, both), strict=True))
            tests.append(
                {
                    "first": first.label,
                    "second": second.label,
                    "a": first.axes,
                    "b": second.axes,
                    "n": len(seeds),
                    "difference": float(np.mean(ours - theirs)),
                    "p": paired_t_test(ours, theirs),
                    "mcnemar": p_values,
                }
            )
        for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
            test["p_holm"] = p
        results += tests
    return results


def leaves_out_mcnemar(study: Study) -> bool:
    """Whether ``pairs`` leaves out the tests of single runs, of which there would be too many."""
    if study.groups is None:
        return False
    counts = (
        len(first.outcomes.keys() & second.outcomes.keys())
        for rows in by_shots(summarized(study))
        for first, second in itertools.combinations(rows, 2)
    )
    return sum(counts) > MAX_GROUP_TESTS


class _McNemar:
    """P-values of ``transfer.evaluation.metrics.compare`` for pairs of runs; what several pairs
    need is computed once."""

    def __init__(self, study: Study):
        self._groups = study.groups
        self._right = {id(run): run.predictions == study.labels for run in study.outcomes}

    def __call__(self, runs: tuple[Outcome, Outcome]) -> float:
        first, second = (self._right[id(run)] for run in runs)
        if self._groups is not None:
            return by_group.exchange_test(first.astype(int) - second, self._groups)
        return _exact(int((first & ~second).sum()), int((second & ~first).sum()))


@functools.lru_cache(maxsize=2**16)
def _exact(only_first: int, only_second: int) -> float:
    total = only_first + only_second
    return float(stats.binomtest(only_first, total).pvalue) if total else 1.0
