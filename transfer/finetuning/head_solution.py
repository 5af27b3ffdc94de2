"""The head that is the solution of a convex problem on the features of the training images."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import keras
import numpy as np

from transfer.activations.extraction import Compiled
from transfer.evaluation.metrics import calibration_error
from transfer.evaluation.prediction import summarize
from transfer.finetuning.context import RunContext
from transfer.finetuning.inputs import Inputs
from transfer.layers.head import before_head
from transfer.training.linear_head import Solution
from transfer.training.logistic_regression import fit_logistic_regression
from transfer.training.ridge import fit_ridge

logger = logging.getLogger(__name__)


def training_features(inputs: Inputs, model: keras.Model) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of the head for the training images, without augmentation unless ``views`` is set.

    Args:
        inputs: of a stage.
        model: maps them to logits; its last layer is the head.

    Returns:
        float32 ``[num_examples, width]`` and labels int64 ``[num_examples]``.
    """
    return inputs.train_in_order(Compiled(before_head(model)))


def solve(
    context: RunContext,
    solver: str,
    features: np.ndarray,
    labels: np.ndarray,
) -> Solution:
    """Fit a linear head; images of a group, and views of an image, are left out together.

    Args:
        context: the run, for groups, class weights and the options of the solver.
        solver: ``ridge``, or ``lbfgs``: scikit-learn's logistic regression.
        features: float32 ``[num_views * num_images, width]``, view by view.
        labels: int ``[num_views * num_images]``.
    """
    options, num_classes = context.options, context.classifier.head.num_classes
    groups, num_images = context.train.groups, len(context.train)
    num_views = len(labels) // num_images
    if groups is None and num_views > 1:
        groups = np.arange(num_images)  # the views of an image belong together
    groups = None if groups is None else np.tile(groups, num_views)
    is_balanced = options.class_weights == "balanced"
    class_weight: Literal["balanced"] | None = "balanced" if is_balanced else None
    if solver == "ridge":
        return fit_ridge(features, labels, num_classes, groups=groups, class_weight=class_weight)
    return fit_logistic_regression(
        features,
        labels,
        num_classes,
        C=options.lbfgs_c,
        groups=groups,
        seed=options.seed,
        class_weight=class_weight,
    )


def describe(solution: Solution, labels: np.ndarray) -> dict[str, Any]:
    """The ``solver`` part of ``metrics.json``, apart from its name.

    Args:
        solution: the head.
        labels: int ``[num_examples]``, of the examples that it was fitted to.

    Returns:
        ``penalty``, ``temperature`` and, where examples could be left out, ``cross_validation``:
        ``accuracy``, ``loss`` (nats), ``calibration_error`` and ``num_examples``.
    """
    summary: dict[str, Any] = {
        "penalty": solution.penalty,
        "temperature": solution.temperature,
    }
    if (left_out := solution.left_out(labels)) is None:
        return summary
    logits, labels = left_out
    metrics = summarize(logits, labels)
    return summary | {
        "cross_validation": {
            "accuracy": metrics["accuracy"],
            "loss": metrics["loss"],
            "calibration_error": calibration_error(logits, labels),
            "num_examples": len(labels),
        }
    }


def report_ridge(solution: Solution, summary: Mapping[str, Any]) -> None:
    """Log a solution of ridge regression with its summary from ``describe``."""
    if cross_validation := summary.get("cross_validation"):
        logger.info(
            f"ridge: penalty {solution.penalty:.3g}, temperature {solution.temperature:.3g}; "
            f"cross-validated accuracy {cross_validation['accuracy']:.4f}, log loss "
            f"{cross_validation['loss']:.4f}"
        )
    else:
        logger.info(
            f"ridge: penalty {solution.penalty:.3g} and temperature {solution.temperature:.3g} "
            "by default: no class has images that could be left out"
        )
