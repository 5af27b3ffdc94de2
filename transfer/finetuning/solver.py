"""Solve for the head as a convex problem: ``solver="ridge"`` and ``solver="lbfgs"``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import keras

from transfer.evaluation.prediction import predict_logits, summarize
from transfer.finetuning.context import RunContext
from transfer.finetuning.head_solution import describe, report_ridge, solve, training_features
from transfer.finetuning.inputs import Inputs
from transfer.finetuning.stage import Progress, scalars
from transfer.runs import run_folder
from transfer.runs.interruption import Signals

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
        features, labels = training_features(inputs, self._model)
        solution = solve(self._context, options.solver, features, labels)
        solution.assign_to(head)
        summary = describe(solution, labels)
        if options.solver == "lbfgs":
            logger.info(f"lbfgs: C {1 / solution.penalty:g}, {solution.num_iterations} iterations")
        else:
            report_ridge(solution, summary)
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
