"""Gradient training of one stage of a fine-tuning run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from sklearn.utils.class_weight import compute_class_weight

from transfer.core import files, measurement
from transfer.finetuning.context import RunContext
from transfer.finetuning.head_start import solve_head
from transfer.finetuning.hyperparameters import parameter_groups
from transfer.finetuning.inputs import Inputs
from transfer.graph.mixed_precision import num_products
from transfer.layers.graph_layer import GraphLayer
from transfer.runs import run_folder
from transfer.runs.interruption import Signals
from transfer.training.checkpoints import RunCheckpoint
from transfer.training.loss_scale import LossScale
from transfer.training.trainer import ParameterGroup, Trainer, random_states

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Progress of a run, including earlier sessions; ``steps_now`` are the steps of this session.

    ``epoch_s`` is the typical wall time of an epoch of the last stage, without validation;
    ``solution`` describes a head that was solved for, see ``StageSolver``.
    """

    epoch: int = 0
    step: int = 0
    steps_now: int = 0
    trainable: int = 0
    epoch_s: float | None = None
    solution: Mapping[str, Any] = field(default_factory=dict)


class StageTrainer:
    """Trains a stage by gradient descent; a resumed run continues from its last checkpoint.

    Args:
        context: the run.
        number: number of the stage, from 0.
        frozen, model: the parts of the network before and after the cut.
        before: progress of the run at the end of the previous stage.
    """

    def __init__(
        self,
        context: RunContext,
        number: int,
        frozen: GraphLayer | None,
        model: keras.Model,
        before: Progress,
    ):
        options = context.options
        self._context = context
        self._before = before
        self._stage = stage = context.stages[number]
        with context.replicas.strategy.scope():
            groups = parameter_groups(options, context.classifier, stage, context.steps_per_epoch)
        self.trainer = new_trainer(context, model, groups)
        self.trainer.step, self.trainer.epoch = before.step, before.epoch
        if frozen is not None:
            self.trainer.random_states = random_states(frozen)
        self.solves_head = number == 0 and options.head_start == "ridge"
        self._checkpoint = RunCheckpoint(
            context.run_dir / run_folder.CHECKPOINTS / f"stage-{number}",
            every_s=60 * options.checkpoint_minutes,
            is_mine=context.replicas.is_chief,
        )
        if context.request.resume:
            with context.replicas.chief_first():
                self._resume(number)
            trainer = self.trainer
            state = (trainer.epoch, trainer.step, trainer.sums, trainer.model.stop_training)
            context.replicas.check_same("checkpoint", state)
        self._first_step = self.trainer.step

    def _resume(self, number: int) -> None:
        trainer = self.trainer
        if self._checkpoint.restore(trainer):
            self.solves_head = False
        for line in self._checkpoint.damaged:
            logger.warning(f"{line}; continuing from the previous one")
        if not self.is_done:
            if self._context.replicas.is_chief:
                self._remove_stages(number + 1)
        elif self._context.options.early_stopping is not None:
            # Keras does the same at the end of training, after the last checkpoint.
            trainer.model.set_weights(self._checkpoint.best_weights(trainer))
        else:
            trainer.take_averages()  # the same holds for the trainer

    def _remove_stages(self, first: int) -> None:
        """Remove the checkpoints of later stages, which started from weights that this stage has
        yet to reach."""
        for later in range(first, len(self._context.stages)):
            folder = self._context.run_dir / run_folder.CHECKPOINTS / f"stage-{later}"
            files.remove_folder(folder, files.CHECKPOINT_FILES)

    @property
    def is_done(self) -> bool:
        return self.trainer.epoch >= self._last_epoch or self.trainer.model.stop_training

    @property
    def _last_epoch(self) -> int:
        return self._before.epoch + self._stage.epochs

    def solve_head(self, inputs: Inputs) -> None:
        """Start from a head that was solved for, if ``solves_head``; before ``fit``."""
        solve_head(self._context, inputs, self.trainer.model)

    def fit(self, inputs: Inputs, save: Callable[..., Any], signals: Signals) -> None:
        """Train to the end of the stage; ``save`` writes the model after an epoch."""
        context, trainer, replicas = self._context, self.trainer, self._context.replicas
        if context.request.resume:
            with replicas.chief_first():
                if replicas.is_chief:
                    run_folder.keep_history(context.run_dir, trainer.epoch)
        early_stopping = self._early_stopping()
        trainer.frozen = inputs.frozen
        validate = inputs.evaluator(trainer.model)
        alone = replicas.num_workers == 1
        # Several workers do not stop independently: they agree on a step.
        with contextlib.nullcontext() if alone else signals.held():
            trainer.fit(
                inputs.epochs(self._last_epoch),
                epochs=self._last_epoch,
                steps_per_epoch=context.steps_per_epoch,
                validate=lambda: scalars(validate()),
                callbacks=[
                    *early_stopping,
                    *(self._writers(save) if replicas.is_chief else []),
                    *context.request.callbacks,
                ],
                verbose=context.request.verbose if replicas.is_chief else 0,
                checkpoint=self._checkpoint if replicas.is_chief else None,
                uninterrupted=signals.held if alone else contextlib.nullcontext,
                is_stopped=lambda: not alone and signals.received is not None,
            )

    def _writers(self, save: Callable[..., Any]) -> list[keras.callbacks.Callback]:
        """Callbacks that write to the run folder."""
        context, options = self._context, self._context.options
        is_continued = context.request.resume or self._before.epoch > 0
        callbacks: list[keras.callbacks.Callback] = [
            keras.callbacks.CSVLogger(context.run_dir / run_folder.HISTORY, append=is_continued),
            EpochEvents(context.run_dir / run_folder.EVENTS, write_graph=False),
        ]
        if options.max_to_keep:
            retention = {
                "max_to_keep": options.max_to_keep,
                "keep_checkpoint_every_n_hours": options.keep_checkpoint_every_n_hours,
            }
            callbacks.append(
                keras.callbacks.LambdaCallback(
                    on_epoch_end=lambda epoch, logs: save(
                        epoch + 1, step=self.trainer.step, **retention
                    )
                )
            )
        return callbacks

    def _early_stopping(self) -> list[keras.callbacks.Callback]:
        patience = self._context.options.early_stopping
        if patience is None:
            return []
        history = run_folder.read_history(self._context.run_dir).get("val_loss", [])
        return [
            ResumedEarlyStopping(
                history[self._before.epoch : self.trainer.epoch],
                self._checkpoint.best_weights(self.trainer),
                monitor="val_loss",
                patience=patience,
                restore_best_weights=True,
            )
        ]

    @property
    def progress(self) -> Progress:
        trainer = self.trainer
        return Progress(
            trainer.epoch,
            trainer.step,
            self._before.steps_now + trainer.step - self._first_step,
            sum(int(np.prod(v.shape)) for v in trainer.trainable_variables),
            measurement.usual(trainer.epoch_seconds),
        )


class ResumedEarlyStopping(keras.callbacks.EarlyStopping):
    """Keras' early stopping for a resumed run: the completed epochs are replayed to restore its
    state.

    Args:
        history: monitored values after each completed epoch.
        best_weights: weights after the best of these epochs.
        monitor, options: see Keras.
    """

    def __init__(
        self,
        history: Sequence[float],
        best_weights: list[np.ndarray] | None,
        *,
        monitor: str,
        **options: Any,
    ):
        super().__init__(monitor, **options)
        self._history = history
        self._best_weights = best_weights

    def _is_improvement(self, value: float, reference: float | None) -> bool:
        # Same comparison as in the trainer; Keras compares in float32.
        return reference is None or value < reference

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        for epoch, value in enumerate(self._history):
            super().on_epoch_end(epoch, {self.monitor: value})
        if self._history:
            self.best_weights = self._best_weights


class EpochEvents(keras.callbacks.TensorBoard):
    """TensorBoard without its per-step hooks, which write nothing here but take as long as a
    training step of a head."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        pass

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        pass


def new_trainer(context: RunContext, model: keras.Model, groups: list[ParameterGroup]) -> Trainer:
    """A new trainer with the loss of the run."""
    options = context.options
    is_scaled = any(
        layer.mixed_precision == "mixed_float16" and num_products(layer.network) > 0
        for layer in model.layers[:-1]  # through which gradients pass
    )
    return Trainer(
        model,
        groups,
        label_smoothing=options.label_smoothing,
        class_weights=_class_weights(context),
        mixup=options.mixup,
        cutmix=options.cutmix,
        clip_norm=options.clip_norm,
        l2_sp=context.l2_sp,
        seed=options.seed,
        replicas=context.replicas,
        loss_scale=LossScale() if is_scaled else None,
    )


def _class_weights(context: RunContext) -> np.ndarray | None:
    """Class weights, float ``[num_classes]``; 1 for classes without examples."""
    if context.options.class_weights == "none":
        return None
    labels = context.train.labels
    present = np.unique(labels)
    weights = np.ones(len(context.classifier.labels))
    weights[present] = compute_class_weight("balanced", classes=present, y=labels)
    return weights


def scalars(summary: dict[str, Any]) -> dict[str, float]:
    """The scalar metrics, which the history can hold."""
    return {name: value for name, value in summary.items() if isinstance(value, float)}
