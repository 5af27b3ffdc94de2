"""One training loop for every case: a head on cached features, a part of the network, all of it.

Data contract: a model maps inputs to logits ``[batch, num_classes]``; ``batches(epoch)`` gives an
iterable of ``(inputs, labels)`` for an epoch, in an order that depends on nothing but the epoch, so
that a run that is resumed continues as if it had never stopped. Optimizers and callbacks are Keras'
own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

Batch = tuple[Any, Any]


class NonFiniteLossError(ArithmeticError):
    """The loss became infinite or not a number."""


@dataclass(frozen=True)
class ParameterGroup:
    """Variables that one optimizer updates."""

    optimizer: keras.optimizers.Optimizer
    variables: Sequence[keras.Variable]

    def __post_init__(self) -> None:
        self.optimizer.build(self.variables)


@dataclass(repr=False)
class Trainer:
    """A model with what updates it; ``fit`` may be called again to go on.

    Args:
        model: inputs to logits; called with ``training=True`` while it is trained.
        groups: which optimizer updates which variables; variables in no group stay as they are.
        label_smoothing: 0..1, the share of the target that is spread over all classes.
        class_weights: float ``[num_classes]``, a factor for the loss of each class's examples;
            ``None`` weighs all alike.
        mixup: parameter of the Beta distribution that mixes pairs of examples (arXiv 1710.09412);
            0 mixes none. What is mixed are the inputs of ``model``: images, or activations.
        clip_norm: the gradients of a step, all together, are scaled down to this norm; ``None``
            leaves them as they are.
        frozen: applied to the inputs first, in inference mode and without a gradient.
        seed: of what is drawn at random here, for each step anew.

    ``epoch_seconds`` are the wall times of the epochs of this session, without their validation.
    """

    model: keras.Model
    groups: Sequence[ParameterGroup]
    label_smoothing: float = 0.0
    class_weights: np.ndarray | None = None
    mixup: float = 0.0
    clip_norm: float | None = None
    frozen: Callable[[Any], Any] | None = None
    seed: int = 0
    step: int = 0
    epoch: int = 0
    epoch_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Callbacks (EarlyStopping, ReduceLROnPlateau, TensorBoard) look for these on the model.
        self.model.optimizer = self.groups[0].optimizer
        self.model.stop_training = False
        self._train_step = tf.function(self._step, autograph=False, reduce_retracing=True)

    def _step(
        self, inputs: tf.Tensor, labels: tf.Tensor, step: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """One update; returns the loss, a float32 scalar, and how many predictions were right."""
        if self.frozen is not None:
            inputs = tf.stop_gradient(self.frozen(inputs))
        mix = self._mixing(step)
        with tf.GradientTape() as tape:
            logits = self.model(mix(inputs), training=True)
            loss = self._mean_loss(labels, logits, mix)
        gradients = tape.gradient(loss, [v.value for g in self.groups for v in g.variables])
        if self.clip_norm is not None:
            gradients, _ = tf.clip_by_global_norm(gradients, self.clip_norm)
        remaining = iter(gradients)
        for group in self.groups:
            group.optimizer.apply([next(remaining) for _ in group.variables], group.variables)
        is_right = tf.argmax(logits, -1, labels.dtype) == labels
        return loss, tf.math.count_nonzero(is_right)

    def _mixing(self, step: tf.Tensor) -> Callable[[tf.Tensor], tf.Tensor]:
        """What makes of the examples of a batch the mixtures to train on.

        Each with its counterpart from the other end of the batch, which is in a random order, and
        one share for all of them.
        """
        if not self.mixup:
            return lambda values: values
        seed = tf.stack([tf.cast(self.seed, tf.int64), step])
        first, second = tf.unstack(tf.random.stateless_gamma([2], seed, self.mixup))
        share = first / (first + second)  # Beta(mixup, mixup)
        return lambda values: share * values + (1 - share) * tf.reverse(values, [0])

    def _mean_loss(
        self, labels: tf.Tensor, logits: tf.Tensor, mix: Callable[[tf.Tensor], tf.Tensor]
    ) -> tf.Tensor:
        """Softmax cross-entropy, with the targets smoothed as in arXiv 1512.00567, section 7, and
        class weights as in ``keras.Model.fit``."""
        targets = tf.one_hot(labels, logits.shape[-1])
        targets = targets * (1 - self.label_smoothing) + self.label_smoothing / logits.shape[-1]
        losses = tf.nn.softmax_cross_entropy_with_logits(mix(targets), logits)
        if self.class_weights is not None:
            losses *= mix(tf.gather(tf.constant(self.class_weights, tf.float32), labels))
        return tf.reduce_mean(losses)

    def train_step(self, inputs: Any, labels: Any) -> tuple[float, int]:
        """One update; the loss of the batch before it, and how many predictions were right."""
        loss, num_right = self._train_step(inputs, labels, tf.constant(self.step, tf.int64))
        self.step += 1
        return float(loss), int(num_right)

    def train_epoch(self, batches: Iterable[Batch], callbacks: Any) -> dict[str, float]:
        """One pass over the batches; the epoch's mean loss and accuracy while training.

        Raises:
            NonFiniteLossError: names the step and the learning rate.
        """
        # In Python: Keras' metrics would take longer than a step of a head.
        num_examples = num_right = 0
        loss_sum = 0.0
        logs: dict[str, float] = {}
        for index, (inputs, labels) in enumerate(batches):
            callbacks.on_train_batch_begin(index)
            loss, right = self.train_step(inputs, labels)
            self._check_finite(loss)
            num_examples += len(labels)
            num_right += right
            loss_sum += loss * len(labels)
            logs = {"loss": loss_sum / num_examples, "accuracy": num_right / num_examples}
            callbacks.on_train_batch_end(index, logs)
        return logs

    def fit(
        self,
        batches: Callable[[int], Iterable[Batch]],
        *,
        epochs: int,
        steps_per_epoch: int,
        validate: Callable[[], dict[str, float]] | None = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        verbose: int = 0,
        checkpoint: RunCheckpoint | None = None,
    ) -> None:
        """Train until ``self.epoch == epochs``, or until a callback stops it.

        Args:
            batches: the epoch's number, from 0, to its batches.
            epochs: in all, those of earlier calls included.
            steps_per_epoch: for the progress bar.
            validate: after each epoch; its figures join the logs with a ``val_`` before their
                names.
            callbacks: Keras callbacks.
            verbose: Keras' progress bar, on standard output: 0 none, 1 a bar, 2 a line an epoch.
            checkpoint: saved after each epoch.
        """
        callback_list = keras.callbacks.CallbackList(
            list(callbacks),
            add_progbar=verbose > 0,
            model=self.model,
            verbose=verbose,
            epochs=epochs,
            steps=steps_per_epoch,
        )
        callback_list.on_train_begin()
        try:
            while self.epoch < epochs and not self.model.stop_training:
                callback_list.on_epoch_begin(self.epoch)
                start = time.perf_counter()
                logs = self.train_epoch(batches(self.epoch), callback_list)
                self.epoch_seconds.append(time.perf_counter() - start)
                if validate is not None:
                    logs |= {f"val_{name}": value for name, value in validate().items()}
                    # The last step may have spoilt the weights after its own loss was taken.
                    self._check_finite(logs.get("val_loss", 0.0))
                callback_list.on_epoch_end(self.epoch, logs)
                self.epoch += 1
                if checkpoint is not None:
                    checkpoint.save(self)
        finally:
            callback_list.on_train_end()  # callbacks close their files

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        return [variable for group in self.groups for variable in group.variables]

    def _check_finite(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        rates = sorted({float(g.optimizer.learning_rate) for g in self.groups}, reverse=True)
        shown = " and ".join(f"{rate:g}" for rate in rates)
        raise NonFiniteLossError(
            f"the loss is {loss} at step {self.step} (epoch {self.epoch + 1}) with learning rate "
            f"{shown}; start again with a learning rate ten times smaller, and check that the "
            "preprocessing is the one that the weights expect"
        )


class RunCheckpoint:
    """What a training run needs to go on: weights, optimizer and random states, epoch and step."""

    def __init__(self, directory: Path, *, keep: int = 2):
        self.directory = directory
        self._keep = keep

    def save(self, trainer: Trainer) -> None:
        self._manager(trainer).save(checkpoint_number=trainer.epoch)

    def restore(self, trainer: Trainer) -> bool:
        """Bring a trainer to the last checkpoint; false if there is none."""
        manager = self._manager(trainer)
        if manager.latest_checkpoint is None:
            return False
        manager.checkpoint.restore(manager.latest_checkpoint).assert_consumed()
        trainer.epoch = int(manager.checkpoint.epoch)
        trainer.step = int(manager.checkpoint.step)
        trainer.model.stop_training = bool(manager.checkpoint.stopped)
        return True

    def _manager(self, trainer: Trainer) -> tf.train.CheckpointManager:
        # A flat list, by position: the names of Keras variables differ between two sessions.
        variables = [*trainer.model.variables]
        for group in trainer.groups:
            variables += group.optimizer.variables
        checkpoint = tf.train.Checkpoint(
            variables=[variable.value for variable in variables],
            epoch=tf.Variable(trainer.epoch, dtype=tf.int64),
            step=tf.Variable(trainer.step, dtype=tf.int64),
            stopped=tf.Variable(trainer.model.stop_training),
        )
        return tf.train.CheckpointManager(checkpoint, str(self.directory), self._keep)


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for the order and the augmentation of an epoch, the same in a run that is resumed."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
