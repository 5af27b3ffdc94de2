"""A softmax classifier on fixed features, solved for instead of trained: logistic regression.

scikit-learn's, on standardised features. The scaling is then put into the weights, so that the
result is a head like any other.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

GRID = tuple(10 ** (exponent / 2) for exponent in range(-10, -1))
"""Inverse strengths of the penalty to choose from, per example: 1e-5 to 0.03. Standardised features
of a VGG want a strong one; what is above is nearly none."""
FOLDS = 3
ABSENT = -30.0
"""Logit of a class without an example, below all others: its probability is e^-30 of theirs."""


@dataclass(frozen=True)
class Solution:
    """The head that minimises the penalised loss.

    ``kernel`` float32 ``[width, num_classes]`` and ``bias`` float32 ``[num_classes]``: logits are
    ``features @ kernel + bias``. ``C`` is scikit-learn's, the inverse strength of the penalty;
    ``scores`` are the mean log losses (nats) of the ``C`` that were tried, empty where it was given
    or could not be chosen. ``converged`` is false if the iterations ran out.
    """

    kernel: np.ndarray
    bias: np.ndarray
    C: float
    scores: dict[float, float]
    num_iterations: int
    converged: bool


def fit_logistic_regression(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    C: float | None = None,
    class_weight: Literal["balanced"] | None = None,
    seed: int = 0,
    max_iter: int = 1000,
) -> Solution:
    """Solve for a head.

    Args:
        features: float32 ``[num_examples, width]``; a standardised copy is made of them.
        labels: int ``[num_examples]``, 0 to num_classes - 1. A class without an example is never
            predicted.
        num_classes: width of the logits.
        C: inverse strength of the L2 penalty. ``None`` chooses the one with the lowest log loss in
            stratified cross-validation, or takes the middle of ``GRID`` where a class has too few
            examples for that.
        class_weight: ``balanced`` lets a class count the more the rarer it is.
        seed: of the folds.
        max_iter: of L-BFGS.

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
        num_folds = min(FOLDS, int(np.bincount(labels)[present].min()))
        if num_folds > 1:
            scores = _cross_validate(
                scaled, labels, candidates, num_folds, class_weight, seed, max_iter
            )
            C = min(scores, key=scores.__getitem__)
    model = LogisticRegression(C=C, class_weight=class_weight, max_iter=max_iter)
    converged = _fit(model, scaled, labels)
    kernel, bias = model.coef_.T.astype(np.float64), model.intercept_.astype(np.float64)
    if len(present) == 2:  # one column: the second class against the first
        kernel, bias = np.hstack([0 * kernel, kernel]), np.hstack([0 * bias, bias])
    kernel = kernel / scaler.scale_[:, None]
    bias = bias - scaler.mean_ @ kernel
    whole = np.zeros((kernel.shape[0], num_classes), np.float32)
    whole[:, present] = kernel
    # As low as can be said without knowing the features to come: below the means of the others.
    whole[:, np.setdiff1d(np.arange(num_classes), present)] = kernel.mean(-1, keepdims=True)
    biases = np.full(num_classes, bias.mean() + ABSENT, np.float32)
    biases[present] = bias
    return Solution(whole, biases, float(C), scores, int(model.n_iter_.max()), converged)


def _cross_validate(
    features: np.ndarray,
    labels: np.ndarray,
    candidates: Sequence[float],
    num_folds: int,
    class_weight: Literal["balanced"] | None,
    seed: int,
    max_iter: int,
) -> dict[float, float]:
    """The mean log loss of each candidate; each solution begins where the one before ended."""
    folds = list(StratifiedKFold(num_folds, shuffle=True, random_state=seed).split(labels, labels))
    losses = np.zeros((len(candidates), num_folds))
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
    """Fit; whether it converged."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features, labels)
    return not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
