"""A head that is solved for at once: ``--solver lbfgs``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from recipes import run_folder, terminal
from recipes.finetune_inputs import Inputs
from recipes.finetune_setup import Job
from recipes.finetune_training import Progress, scalars
from recipes.interruption import Signals
from transfer.evaluation import predict, summarize
from transfer.features import Compiled
from transfer.linear import fit_logistic_regression


class StageSolver:
    """Does the work of a ``StageTrainer`` with scikit-learn's logistic regression.

    Args:
        job: the run, of one stage.
        model: from the activations at the tap to the logits, with the classifier's head.
    """

    is_done = False

    def __init__(self, job: Job, model: keras.Model):
        self._job = job
        self._model = model
        self.progress = Progress()

    def fit(self, inputs: Inputs, save: Callable[..., Any], signals: Signals) -> None:
        """Put the solution into the head, and its figures into the history."""
        del save, signals  # there are no epochs to save a model after
        config, head = self._job.config, self._job.classifier.head
        features, labels = self._features(inputs)
        solution = fit_logistic_regression(
            features,
            labels,
            head.num_classes,
            C=config.lbfgs_c,
            seed=config.seed,
            class_weight="balanced" if config.class_weights == "balanced" else None,
        )
        head.classifier.kernel.assign(solution.kernel)
        head.classifier.bias.assign(solution.bias)
        terminal.say(f"lbfgs: C {solution.C:g}, {solution.num_iterations} iterations")
        if not solution.converged:
            terminal.say(
                "lbfgs stopped before it converged: with a smaller --lbfgs-c it is sooner done"
            )
        row = {"epoch": 0.0} | scalars(summarize(*predict(head, [(features, labels)])))
        held_out = scalars(inputs.evaluator(self._model)())
        row |= {f"val_{name}": value for name, value in held_out.items()}
        text = f"{','.join(row)}\n{','.join(map(str, row.values()))}\n"
        if self._job.replicas.is_chief:
            run_folder.write_text(self._job.out / run_folder.HISTORY, text)
        self.progress = Progress(
            epoch=1,
            step=solution.num_iterations,
            trainable=solution.kernel.size + solution.bias.size,
        )

    def _features(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """float32 ``[num_examples, width]`` and int64 ``[num_examples]``."""
        to_features = Compiled(self._model.layers[0])  # averages where a tap has four dimensions
        return inputs.train_in_order(to_features)
