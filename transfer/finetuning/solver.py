"""Fit the head as a convex problem: ``solver="lbfgs"``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from transfer.activations.extraction import Compiled
from transfer.evaluation.prediction import predict_logits, summarize
from transfer.finetuning.inputs import Inputs
from transfer.finetuning.setup import RunContext
from transfer.finetuning.stage import Progress, scalars
from transfer.runs import run_folder
from transfer.runs.interruption import Signals
from transfer.training.logistic_regression import fit_logistic_regression

logger = logging.getLogger(__name__)


class StageSolver:
    """Replaces ``StageTrainer`` by scikit-learn's logistic regression.

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
        groups = self._context.train.groups
        if groups is not None:
            groups = np.tile(groups, len(labels) // len(groups))  # for every view
        solution = fit_logistic_regression(
            features,
            labels,
            head.num_classes,
            C=options.lbfgs_c,
            groups=groups,
            seed=options.seed,
            class_weight="balanced" if options.class_weights == "balanced" else None,
        )
        solution.assign_to(head)
        logger.info(f"lbfgs: C {1 / solution.penalty:g}, {solution.num_iterations} iterations")
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
        )

    def _features(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """float32 ``[num_examples, width]`` and int64 ``[num_examples]``."""
        to_features = Compiled(self._model.layers[0])  # averages over space if the tap has 4 axes
        return inputs.train_in_order(to_features)
