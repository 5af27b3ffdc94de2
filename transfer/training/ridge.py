"""A linear head in closed form: ridge regression to one-hot targets, calibrated by a temperature.

One eigendecomposition gives the solution for every penalty, and the prediction of each image by the
solution for all others (leave-one-out), without fitting again. Penalty and temperature are those
with the lowest log loss of these predictions.

Leave-one-out of ridge regression: Golub, Heath and Wahba 1979, doi 10.1080/00401706.1979.10489751.
Temperature: Guo et al. 2017, arXiv 1706.04599.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.linalg import eigh, solve
from scipy.optimize import brentq
from scipy.special import logsumexp, softmax
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from transfer.training.linear_head import ABSENT, Solution, for_all_classes

GRID = tuple(10 ** (exponent / 4) for exponent in range(-8, 13))
"""Candidate penalties, relative to the mean eigenvalue of the features' Gram matrix: 0.01 to
1000."""
PENALTY, TEMPERATURE = 1.0, 10.0
"""Penalty, relative as in ``GRID``, and temperature where there are too few examples to choose."""
TEMPERATURES = (1e-2, 1e3)
MAX_GRAM, MAX_BYTES = 5000, 2 * 10**9
_BLOCK = 2**22
"""Values of the features that are converted to float64 at once."""


def is_solvable(num_examples: int, width: int) -> bool:
    """Whether ``fit_ridge`` takes features of this size: up to 2 GB, of which the smaller side is
    at most 5000, for which the decomposition takes a minute or two."""
    return 4 * num_examples * width <= MAX_BYTES and min(num_examples, width) <= MAX_GRAM


def fit_ridge(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    class_weight: Literal["balanced"] | None = None,
    groups: np.ndarray | None = None,
    penalties: Sequence[float] | None = None,
) -> Solution:
    """Fit a linear head in closed form.

    Memory, apart from the features: their size once more if there are more examples than features,
    else float64 ``[num_examples, num_examples]``; see ``is_solvable``. Deterministic.

    Args:
        features: float32 ``[num_examples, width]``. They are centred and scaled to similar
            variances, which the weights of the solution include.
        labels: int ``[num_examples]``, 0 to num_classes - 1. A class without examples is never
            predicted.
        num_classes: number of logits.
        class_weight: ``balanced`` weights classes inversely to their frequency.
        groups: group number of each example, int ``[num_examples]``: images of one patient, or
            views of one image. Each example is predicted from the other groups.
        penalties: candidate L2 penalties, relative to the mean eigenvalue of the Gram matrix of the
            scaled features. Default: ``GRID``.

    Raises:
        ValueError: if there are fewer than two classes with examples, or features are not finite.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from transfer.training.ridge import fit_ridge
        >>> features, labels = load_iris(return_X_y=True)
        >>> solution = fit_ridge(features, labels, num_classes=3)
        >>> solution.kernel.shape
        (4, 3)
    """
    present, classes = np.unique(labels, return_inverse=True)
    if len(present) < 2:
        raise ValueError(f"labels have {len(present)} class; a classifier needs at least 2")
    if not all(np.isfinite(part).all() for part in _parts(features)):
        raise ValueError("features have values that are not finite; expected finite numbers")
    weights = np.ones(len(labels))
    if class_weight is not None:
        weights = compute_sample_weight(class_weight, labels)
    problem = _decompose(features, np.eye(len(present))[classes], weights)
    groups = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    scored = _learnable(classes, groups)
    unit = problem.eigenvalues.sum() / min(features.shape)
    penalty, temperature, scores = PENALTY * unit, TEMPERATURE, {}
    if scored.any():
        members = _members(groups)
        best = np.inf
        for candidate in unit * np.asarray(GRID if penalties is None else penalties):
            found = problem.left_out(candidate, members)[scored]
            t, loss = fit_temperature(found, classes[scored], weights[scored])
            scores[float(candidate)] = loss
            if loss < best:
                best, penalty, temperature = loss, float(candidate), t
    kernel, bias = problem.solution(penalty)
    kernels, biases = for_all_classes(
        temperature * kernel, temperature * bias, present, num_classes
    )
    out_of_sample = None
    if scored.any():
        logits = temperature * problem.left_out(penalty, members)
        out_of_sample = np.repeat(logits.mean(-1, keepdims=True) + ABSENT, num_classes, -1)
        out_of_sample[:, present] = logits
        out_of_sample = out_of_sample.astype(np.float32)
    return Solution(
        kernels,
        biases,
        penalty,
        scores,
        temperature,
        out_of_sample=out_of_sample,
        scored=scored if scored.any() else None,
    )


def fit_temperature(
    scores: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    smoothing: float | None = None,
) -> tuple[float, float]:
    """The factor that turns scores into logits with the lowest log loss, a convex problem.

    As in Platt scaling, the labels are slightly smoothed by default, as if there were one more
    image: without it, scores that are all correct would ask for an infinite factor.

    Args:
        scores: float ``[num_examples, num_classes]``.
        labels: int ``[num_examples]``.
        weights: weight of each example in the loss, float ``[num_examples]``.
        smoothing: label smoothing, 0 to 1. Default: 1 / (num_examples + 2).

    Returns:
        The factor, at least 0.01 and at most 1000, and the mean log loss of the smoothed labels
        (nats).
    """
    if smoothing is None:
        smoothing = 1 / (len(labels) + 2)
    rows = np.arange(len(labels))
    targets = (1 - smoothing) * scores[rows, labels] + smoothing * scores.mean(-1)
    low, high = np.log(TEMPERATURES)

    def slope(log_factor: float) -> float:
        expected = (softmax(np.exp(log_factor) * scores, axis=-1) * scores).sum(-1)
        return float(np.average(expected - targets, weights=weights))

    if slope(low) >= 0:
        factor = TEMPERATURES[0]
    elif slope(high) <= 0:
        factor = TEMPERATURES[1]
    else:
        factor = float(np.exp(brentq(slope, low, high, xtol=1e-4)))
    losses = logsumexp(factor * scores, axis=-1) - factor * targets
    return factor, float(np.average(losses, weights=weights))


@dataclass(frozen=True)
class _Decomposition:
    """Weighted ridge regression on scaled features, for any penalty.

    With Z the centred and scaled features, their rows times the root of the weights: ``left``
    ``[num_examples, rank]`` are the left singular vectors of Z, ``eigenvalues`` its squared
    singular values, ``projected`` ``[rank, num_classes]`` the targets times ``left``. ``right``
    ``[width, rank]`` are the right singular vectors, or ``None`` if the left ones were computed
    first.
    """

    features: np.ndarray
    targets: np.ndarray
    roots: np.ndarray
    means: np.ndarray
    scales: np.ndarray
    left: np.ndarray
    eigenvalues: np.ndarray
    projected: np.ndarray
    right: np.ndarray | None

    @property
    def intercept(self) -> np.ndarray:
        """Weighted mean of the targets."""
        return np.average(self.targets, axis=0, weights=self.roots**2)

    def solution(self, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """Kernel ``[width, num_classes]`` and bias ``[num_classes]`` for unscaled features."""
        shrunk = self.projected / (self.eigenvalues + penalty)[:, None]
        if self.right is not None:
            kernel = self.right @ (np.sqrt(self.eigenvalues)[:, None] * shrunk)
        else:
            dual = self.left @ shrunk
            kernel = np.concatenate([part.T @ dual for part in self._columns()])
        kernel /= self.scales[:, None]
        return kernel, self.intercept - self.means @ kernel

    def left_out(self, penalty: float, members: Sequence[np.ndarray]) -> np.ndarray:
        """Scores of each example by the solution for the others: ``[num_examples, num_classes]``.

        Args:
            penalty: strength of the L2 penalty.
            members: positions of the examples of each group of several, which are left out
                together.
        """
        shrinkage = self.eigenvalues / (self.eigenvalues + penalty)
        roots = self.roots[:, None]
        fitted = self.left @ (shrinkage[:, None] * self.projected).astype(self.left.dtype)
        residuals = roots * (self.targets - self.intercept) - fitted
        share = self.roots / np.sqrt(np.sum(self.roots**2))  # of the intercept in the hat matrix
        leverage = share**2 + np.einsum("ij,ij,j->i", self.left, self.left, shrinkage)
        others = residuals / np.maximum(1 - leverage, 1e-9)[:, None]
        for group in members:
            hat_root = np.column_stack([share[group], self.left[group] * np.sqrt(shrinkage)])
            others[group] = _without(hat_root.astype(np.float64), residuals[group])
        return self.targets - others / roots

    def _columns(self) -> Iterator[np.ndarray]:
        return _columns(self.features, self.roots, self.means, self.scales)


def _without(root: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """Residuals of a group by the solution without it: (I - H)^-1 times its residuals, where H is
    ``root @ root.T``, its part of the hat matrix. Solves in the smaller of the two dimensions."""
    size, rank = root.shape
    if size <= rank:
        return np.asarray(solve(np.eye(size) - root @ root.T, residuals, assume_a="sym"))
    inner = np.eye(rank) - root.T @ root
    return np.asarray(residuals + root @ solve(inner, root.T @ residuals, assume_a="sym"))


def _decompose(features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> _Decomposition:
    scaler = StandardScaler()
    start = 0
    for part in _parts(features):
        scaler.partial_fit(part, sample_weight=weights[start : start + len(part)])
        start += len(part)
    means, scales = scaler.mean_, _scales(scaler.var_)
    roots = np.sqrt(weights)
    centred = roots[:, None] * (targets - np.average(targets, axis=0, weights=weights))
    num_examples, width = features.shape
    if num_examples <= width:
        gram = np.zeros((num_examples, num_examples))
        for part in _columns(features, roots, means, scales):
            gram += part @ part.T
        eigenvalues, left = _eigen(gram)
        right, projected = None, left.T @ centred
    else:
        gram, products = np.zeros((width, width)), np.zeros((width, targets.shape[1]))
        for rows, part in _rows(features, roots, means, scales):
            gram += part.T @ part
            products += part.T @ centred[rows]
        eigenvalues, right = _eigen(gram)
        to_left = right / np.sqrt(eigenvalues)
        projected = to_left.T @ products
        left = np.empty((num_examples, len(eigenvalues)), np.float32)
        for rows, part in _rows(features, roots, means, scales):
            left[rows] = part @ to_left
    return _Decomposition(
        features, targets, roots, means, scales, left, eigenvalues, projected, right
    )


def _scales(variances: np.ndarray) -> np.ndarray:
    """Divisors of the features: their standard deviations plus, in squares, the median of these.

    A unit that is active in few of the training images may be many of their standard deviations
    larger in others. With 5 digits a class and fc7, the log loss is 1.9 with the standard deviation
    alone, 0.5 with this divisor.
    """
    deviations = np.sqrt(variances)
    active = deviations[deviations > 0]
    return np.asarray(np.hypot(deviations, np.median(active) if len(active) else 1.0))


def _eigen(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues that are not zero but for rounding, and their vectors in columns."""
    eigenvalues, vectors = eigh(gram, driver="evd", overwrite_a=True, check_finite=False)
    kept = eigenvalues > 1e-10 * max(eigenvalues[-1], 1e-300)
    return eigenvalues[kept], vectors[:, kept]


def _parts(features: np.ndarray) -> Iterator[np.ndarray]:
    """The features in float64, a few rows at a time."""
    count = max(1, _BLOCK // features.shape[1])
    for start in range(0, len(features), count):
        yield np.asarray(features[start : start + count], np.float64)


def _rows(
    features: np.ndarray, roots: np.ndarray, means: np.ndarray, scales: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """Centred, scaled and weighted features, a few rows at a time."""
    start = 0
    for part in _parts(features):
        rows = slice(start, start + len(part))
        yield rows, (part - means) / scales * roots[rows, None]
        start += len(part)


def _columns(
    features: np.ndarray, roots: np.ndarray, means: np.ndarray, scales: np.ndarray
) -> Iterator[np.ndarray]:
    """Centred, scaled and weighted features, a few columns at a time."""
    count = max(1, _BLOCK // len(features))
    for start in range(0, features.shape[1], count):
        some = slice(start, start + count)
        yield (features[:, some] - means[some]) / scales[some] * roots[:, None]


def _learnable(classes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Whether an example's class has examples in other groups, bool ``[num_examples]``."""
    pairs = np.unique(np.stack([classes, groups]), axis=1)
    return np.asarray(np.bincount(pairs[0])[classes] > 1)


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """Positions of the members of each group of several."""
    parts = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    return [part for part in parts if len(part) > 1]
