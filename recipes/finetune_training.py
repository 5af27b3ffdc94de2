"""One stage of a fine-tuning run, trained step by step."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from sklearn.utils.class_weight import compute_class_weight

from recipes import measure, run_folder, terminal
from recipes.finetune_inputs import Inputs
from recipes.finetune_setup import Job
from recipes.finetune_stages import parameter_groups
from recipes.interruption import Signals
from transfer.backbone import GraphLayer
from transfer.run_checkpoint import RunCheckpoint
from transfer.training import ParameterGroup, Trainer, random_states


@dataclass(frozen=True)
class Progress:
    """How far a run is, earlier sessions included; ``steps_now`` are those of this one.

    ``epoch_s`` is the usual wall time of an epoch of the last stage, without its validation.
    """

    epoch: int = 0
    step: int = 0
    steps_now: int = 0
    trainable: int = 0
    epoch_s: float | None = None


class StageTrainer:
    """What trains a stage, brought to where the run was where it is resumed.

    Args:
        job: the run.
        number: of the stage, from 0.
        frozen, model: the two sides of the stage's cut.
        before: how far the run was at the end of the stage before.
    """

    def __init__(
        self,
        job: Job,
        number: int,
        frozen: GraphLayer | None,
        model: keras.Model,
        before: Progress,
    ):
        config = job.config
        self._job = job
        self._before = before
        self._stage = stage = job.stages[number]
        with job.replicas.strategy.scope():
            groups = parameter_groups(config, job.classifier, stage, job.steps_per_epoch)
        self.trainer = new_trainer(job, model, groups)
        self.trainer.step, self.trainer.epoch = before.step, before.epoch
        if frozen is not None:
            self.trainer.random_states = random_states(frozen)
        self._checkpoint = RunCheckpoint(
            job.out / run_folder.CHECKPOINTS / f"stage-{number}",
            every_s=60 * config.checkpoint_minutes,
            is_mine=job.replicas.is_chief,
        )
        if config.resume:
            with job.replicas.chief_first():
                self._resume(number)
            trainer = self.trainer
            at = (trainer.epoch, trainer.step, trainer.sums, trainer.model.stop_training)
            job.replicas.check_same("checkpoint", at)
        self._first_step = self.trainer.step

    def _resume(self, number: int) -> None:
        trainer = self.trainer
        self._checkpoint.restore(trainer)
        for line in self._checkpoint.damaged:
            terminal.say(f"warning: {line}; going on from the one before")
        if not self.is_done:
            if self._job.replicas.is_chief:
                self._remove_stages(number + 1)
        elif self._job.config.early_stopping is not None:
            # As Keras does at the end of the training, after the last checkpoint.
            trainer.model.set_weights(self._checkpoint.best_weights(trainer))

    def _remove_stages(self, first: int) -> None:
        """Later stages began with what this one must end with first."""
        for later in range(first, len(self._job.stages)):
            folder = self._job.out / run_folder.CHECKPOINTS / f"stage-{later}"
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def is_done(self) -> bool:
        return self.trainer.epoch >= self._last_epoch or self.trainer.model.stop_training

    @property
    def _last_epoch(self) -> int:
        return self._before.epoch + self._stage.epochs

    def fit(self, inputs: Inputs, save: Callable[..., Any], signals: Signals) -> None:
        """Train to the end of the stage; ``save`` writes the model after an epoch."""
        job, trainer, replicas = self._job, self.trainer, self._job.replicas
        if job.config.resume:
            with replicas.chief_first():
                if replicas.is_chief:
                    run_folder.keep_history(job.out, trainer.epoch)
        early_stopping = self._early_stopping()
        trainer.frozen = inputs.frozen
        validate = inputs.evaluator(trainer.model)
        alone = replicas.num_workers == 1
        # One of several workers does not stop by itself: they agree on a step.
        with contextlib.nullcontext() if alone else signals.held():
            trainer.fit(
                inputs.train,
                epochs=self._last_epoch,
                steps_per_epoch=job.steps_per_epoch,
                validate=lambda: scalars(validate()),
                callbacks=early_stopping + (self._writers(save) if replicas.is_chief else []),
                verbose=measure.verbosity() if replicas.is_chief else 0,
                checkpoint=self._checkpoint if replicas.is_chief else None,
                uninterrupted=signals.held if alone else contextlib.nullcontext,
                is_stopped=lambda: not alone and signals.received is not None,
            )

    def _writers(self, save: Callable[..., Any]) -> list[keras.callbacks.Callback]:
        """What writes to the run folder."""
        job, config = self._job, self._job.config
        goes_on = config.resume or self._before.epoch > 0
        callbacks: list[keras.callbacks.Callback] = [
            keras.callbacks.CSVLogger(job.out / run_folder.HISTORY, append=goes_on),
            EpochEvents(job.out / run_folder.EVENTS, write_graph=False),
        ]
        if config.max_to_keep:
            options = {
                "max_to_keep": config.max_to_keep,
                "keep_checkpoint_every_n_hours": config.keep_checkpoint_every_n_hours,
            }
            callbacks.append(
                keras.callbacks.LambdaCallback(
                    on_epoch_end=lambda epoch, logs: save(
                        epoch + 1, step=self.trainer.step, **options
                    )
                )
            )
        return callbacks

    def _early_stopping(self) -> list[keras.callbacks.Callback]:
        patience = self._job.config.early_stopping
        if patience is None:
            return []
        history = run_folder.read_history(self._job.out).get("val_loss", [])
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
            measure.usual(trainer.epoch_seconds),
        )


class ResumedEarlyStopping(keras.callbacks.EarlyStopping):
    """Keras' early stopping, brought to where it was: it is shown the epochs before once more.

    Args:
        history: what it monitors, after each epoch that is done.
        best_weights: those after the best of these.
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
        # As the trainer compares; Keras does so with seven digits.
        return reference is None or value < reference

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        for epoch, value in enumerate(self._history):
            super().on_epoch_end(epoch, {self.monitor: value})
        if self._history:
            self.best_weights = self._best_weights


class EpochEvents(keras.callbacks.TensorBoard):
    """TensorBoard without its work after each step, for which it would write nothing here but take
    as long as the step of a head."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        pass

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        pass


def new_trainer(job: Job, model: keras.Model, groups: list[ParameterGroup]) -> Trainer:
    """A trainer of the run's loss, at the beginning."""
    config = job.config
    return Trainer(
        model,
        groups,
        label_smoothing=config.label_smoothing,
        class_weights=_class_weights(job),
        mixup=config.mixup,
        clip_norm=config.clip_norm,
        seed=config.seed,
        replicas=job.replicas,
    )


def _class_weights(job: Job) -> np.ndarray | None:
    """float ``[num_classes]``; 1 for classes without an example."""
    if job.config.class_weights == "none":
        return None
    labels = job.train.labels
    present = np.unique(labels)
    weights = np.ones(len(job.classifier.labels))
    weights[present] = compute_class_weight("balanced", classes=present, y=labels)
    return weights


def scalars(summary: dict[str, Any]) -> dict[str, float]:
    """The figures that a history can hold."""
    return {name: value for name, value in summary.items() if isinstance(value, float)}
