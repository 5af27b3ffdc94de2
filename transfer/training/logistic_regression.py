"""Logistic regression: fits a linear softmax classifier on fixed features with L-BFGS.

Uses scikit-learn on standardised features. The scaling is then folded into the weights, so that the
result is an ordinary head.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from transfer.training.folds import stratified_folds
from transfer.training.linear_head import Solution, for_all_classes

if TYPE_CHECKING:  # imported where it is used, as in ``folds``
    from sklearn.linear_model import LogisticRegression

GRID = tuple(10 ** (exponent / 2) for exponent in range(-10, -1))
"""Candidate inverse penalty strengths (C), per example: 1e-5 to 0.03. Standardised VGG features
need strong regularization; larger values hardly regularize."""
FOLDS = 3


def fit_logistic_regression(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    C: float | None = None,
    class_weight: Literal["balanced"] | None = None,
    groups: np.ndarray | None = None,
    seed: int = 0,
    max_iter: int = 1000,
) -> Solution:
    """Fit a linear head.

    Args:
        features: float32 ``[num_examples, width]``; a standardised copy of them is made.
        labels: int ``[num_examples]``, 0 to num_classes - 1. A class without examples is never
            predicted.
        num_classes: number of logits.
        C: inverse strength of the L2 penalty. ``None`` selects the value with the lowest log loss
            in stratified cross-validation, or the middle of ``GRID`` if a class has too few
            examples, or groups, for that.
        class_weight: ``balanced`` weights classes inversely to their frequency.
        groups: group number of each example, int ``[num_examples]``; a group is in one fold of the
            cross-validation.
        seed: seed of the cross-validation folds.
        max_iter: maximum number of L-BFGS iterations.

    Raises:
        ValueError: if there are fewer than two classes with examples.
    """
    present = np.unique(labels)
    if len(present) < 2:
        raise ValueError(f"labels have {len(present)} class; a classifier needs at least 2")
    scaler = StandardScaler()
    scaled = scaler.fit_transform(np.asarray(features, np.float32))
    scores: dict[float, float] = {}
    if C is None:
        candidates = [value * len(labels) for value in GRID]
        C = candidates[len(candidates) // 2]
        if folds := stratified_folds(labels, FOLDS, seed=seed, groups=groups):
            scores = _cross_validate(scaled, labels, candidates, folds, class_weight, max_iter)
            C = min(scores, key=scores.__getitem__)
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=C, class_weight=class_weight, max_iter=max_iter)
    converged = _fit(model, scaled, labels)
    kernel, bias = model.coef_.T.astype(np.float64), model.intercept_.astype(np.float64)
    if len(present) == 2:  # binary: scikit-learn has one column, for the second class
        kernel, bias = np.hstack([0 * kernel, kernel]), np.hstack([0 * bias, bias])
    kernel = kernel / scaler.scale_[:, None]
    bias = bias - scaler.mean_ @ kernel
    kernels, biases = for_all_classes(kernel, bias, present, num_classes)
    return Solution(
        kernels,
        biases,
        1 / C,
        {1 / value: loss for value, loss in scores.items()},
        num_iterations=int(model.n_iter_.max()),
        converged=converged,
    )


def _cross_validate(
    features: np.ndarray,
    labels: np.ndarray,
    candidates: Sequence[float],
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    class_weight: Literal["balanced"] | None,
    max_iter: int,
) -> dict[float, float]:
    """Mean log loss of each candidate ``C``; each fit is warm-started from the previous one."""
    from sklearn.linear_model import LogisticRegression

    losses = np.zeros((len(candidates), len(folds)))
    for fold, (train, rest) in enumerate(folds):
        model = LogisticRegression(class_weight=class_weight, max_iter=max_iter, warm_start=True)
        train_features, rest_features = features[train], features[rest]
        for number, C in enumerate(candidates):
            model.C = C * len(train) / len(labels)
            _fit(model, train_features, labels[train])
            probabilities = model.predict_proba(rest_features)
            losses[number, fold] = log_loss(labels[rest], probabilities, labels=model.classes_)
    return dict(zip(candidates, losses.mean(-1).tolist(), strict=True))


def _fit(model: LogisticRegression, features: np.ndarray, labels: np.ndarray) -> bool:
    """Fit the model; returns whether it converged."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features, labels)
    return not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
