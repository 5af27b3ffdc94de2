"""Solve for the head as a convex problem: ``solver="ridge"`` and ``solver="lbfgs"``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import keras
import numpy as np

from transfer.activations.extraction import Compiled
from transfer.evaluation.metrics import expected_calibration_error
from transfer.evaluation.prediction import predict_logits, probabilities, summarize
from transfer.finetuning.inputs import Inputs
from transfer.finetuning.setup import RunContext
from transfer.finetuning.stage import Progress, scalars
from transfer.runs import run_folder
from transfer.runs.interruption import Signals
from transfer.training.linear_head import Solution
from transfer.training.logistic_regression import fit_logistic_regression
from transfer.training.ridge import fit_ridge

logger = logging.getLogger(__name__)


class StageSolver:
    """Replaces ``StageTrainer`` by ridge regression, or scikit-learn's logistic regression.

    Args:
        context: a run with one stage.
        model: maps the activations at the tap to logits, with the classifier's head.
    """

    is_done = False

    def __init__(self, context: RunContext, model: keras.Model):
        self._context = context
        self._model = model
        self.progress = Progress()

    def fit(self, inputs: Inputs, save: Callable[..., Any], signals: Signals) -> None:
        """Assign the solution to the head, and write its metrics to the history."""
        del save, signals  # no epochs, so no intermediate models
        options, head = self._context.options, self._context.classifier.head
        features, labels = self._features(inputs)
        solution = self._solve(features, labels)
        solution.assign_to(head)
        summary = describe(solution, labels)
        if options.solver == "lbfgs":
            logger.info(f"lbfgs: C {1 / solution.penalty:g}, {solution.num_iterations} iterations")
        elif cross_validation := summary.get("cross_validation"):
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
        if not solution.converged:
            logger.warning("lbfgs stopped before it converged: a smaller lbfgs_c converges sooner")
        row = {"epoch": 0.0} | scalars(summarize(*predict_logits(head, [(features, labels)])))
        held_out = scalars(inputs.evaluator(self._model)())
        row |= {f"val_{name}": value for name, value in held_out.items()}
        text = f"{','.join(row)}\n{','.join(map(str, row.values()))}\n"
        if self._context.replicas.is_chief:
            run_folder.write_text(self._context.run_dir / run_folder.HISTORY, text)
        self.progress = Progress(
            epoch=1,
            step=solution.num_iterations,
            trainable=solution.kernel.size + solution.bias.size,
            solution=summary,
        )

    def _solve(self, features: np.ndarray, labels: np.ndarray) -> Solution:
        options, num_classes = self._context.options, self._context.classifier.head.num_classes
        groups, num_images = self._context.train.groups, len(self._context.train)
        num_views = len(labels) // num_images
        if groups is None and num_views > 1:
            groups = np.arange(num_images)  # the views of an image belong together
        groups = None if groups is None else np.tile(groups, num_views)
        is_balanced = options.class_weights == "balanced"
        class_weight: Literal["balanced"] | None = "balanced" if is_balanced else None
        if options.solver == "ridge":
            return fit_ridge(
                features, labels, num_classes, groups=groups, class_weight=class_weight
            )
        return fit_logistic_regression(
            features,
            labels,
            num_classes,
            C=options.lbfgs_c,
            groups=groups,
            seed=options.seed,
            class_weight=class_weight,
        )

    def _features(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """float32 ``[num_examples, width]`` and int64 ``[num_examples]``."""
        to_features = Compiled(self._model.layers[0])  # averages over space if the tap has 4 axes
        return inputs.train_in_order(to_features)


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
    if solution.out_of_sample is None or solution.scored is None:
        return summary
    logits, labels = solution.out_of_sample[solution.scored], labels[solution.scored]
    metrics = summarize(logits, labels)
    confidence = probabilities(logits).max(-1)
    return summary | {
        "cross_validation": {
            "accuracy": metrics["accuracy"],
            "loss": metrics["loss"],
            "calibration_error": expected_calibration_error(
                confidence, logits.argmax(-1) == labels
            ),
            "num_examples": len(labels),
        }
    }
