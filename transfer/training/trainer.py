"""The training loop, for a head on cached features, a part of the network, or all of it.

Data contract: a model maps inputs to logits ``[batch, num_classes]``; ``batches(epoch, first)``
gives an iterable of ``(inputs, labels)`` for an epoch, starting at batch ``first``, in an order
that depends on the epoch only, so that a resumed run gives the same result as an uninterrupted one.
Works with Keras optimizers and callbacks.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from transfer.core.distribution import Replicas, sum_over_replicas
from transfer.core.private_api import averages
from transfer.training.epoch_lines import EpochLines
from transfer.training.l2_sp import L2SP
from transfer.training.loss_scale import LossScale
from transfer.training.mixing import UNMIXED, Mixing, cutmix, mixup
from transfer.training.optimizers import is_for_replicas

Batch = tuple[Any, Any]


class NonFiniteLossError(ArithmeticError):
    """The loss became infinite or NaN."""


class Checkpoint(Protocol):
    """Saves the state of a trainer; see ``checkpoints.RunCheckpoint``."""

    def begin(self) -> None: ...

    def save(self, trainer: Trainer) -> None: ...

    def save_if_due(self, trainer: Trainer) -> None: ...

    def save_best(self, trainer: Trainer) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True)
class ParameterGroup:
    """Variables that one optimizer updates."""

    optimizer: keras.optimizers.Optimizer
    variables: Sequence[keras.Variable]

    def __post_init__(self) -> None:
        self.optimizer.build(self.variables)


@dataclass
class EpochSums:
    """Sums over the completed batches of an epoch; ``loss`` is the sum of the examples' losses."""

    num_batches: int = 0
    num_examples: int = 0
    num_right: int = 0
    loss: float = 0.0

    def add(self, num_examples: int, num_right: int, mean_loss: float) -> None:
        self.num_batches += 1
        self.num_examples += num_examples
        self.num_right += num_right
        self.loss += mean_loss * num_examples

    @property
    def means(self) -> dict[str, float]:
        if not self.num_examples:
            return {}
        return {
            "loss": self.loss / self.num_examples,
            "accuracy": self.num_right / self.num_examples,
        }


@dataclass(repr=False)
class Trainer:
    """Trains a model; ``fit`` may be called again to continue, unless optimizers keep moving
    averages of the weights: the first call ends with these in place of the weights.

    Args:
        model: maps inputs to logits; called with ``training=True`` during training.
        groups: optimizers and the variables they update; variables in no group are not trained.
        label_smoothing: 0..1, the part of the target that is spread over all classes.
        class_weights: float ``[num_classes]``, a factor for the loss of each class's examples;
            ``None`` weights all classes equally.
        mixup: parameter of the Beta distribution of mixup (arXiv 1710.09412); 0 turns it off. The
            inputs of ``model`` are mixed: images, or activations.
        cutmix: the same of CutMix (arXiv 1905.04899), for images and feature maps; without mixup.
        clip_norm: clip the global norm of a step's gradients to this value; ``None`` does not clip.
        l2_sp: penalty on the distance of weights from their pretrained values. The losses that are
            reported do not include it.
        frozen: applied to the inputs first, in inference mode and without gradients.
        seed: seed of mixup and CutMix; each step draws new random numbers.
        random_states: variables of ``frozen`` that change in each step: states of random layers.
        replicas: devices and processes that train together. Each process gets its part of each
            batch.
        loss_scale: scaling of the loss, for a model that computes in float16; for one replica.

    ``step`` and ``epoch`` count completed steps and epochs, ``sums`` are the sums over the current
    epoch so far, and ``best_loss`` is the lowest validation loss after an epoch. ``epoch_seconds``
    are the wall times of the epochs of this session, without validation.

    Callbacks see the optimizer of the first group as ``model.optimizer``. If they change its
    learning rate, those of the other groups change by the same factor.

    If optimizers keep moving averages of the weights (``use_ema``), the model has these averages
    during validation, at the end of each epoch for the best weights and for callbacks, and after
    the last epoch. Checkpoints have both, so that training continues from the weights themselves.
    """

    model: keras.Model
    groups: Sequence[ParameterGroup]
    label_smoothing: float = 0.0
    class_weights: np.ndarray | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    clip_norm: float | None = None
    l2_sp: L2SP | None = None
    frozen: Callable[[Any], Any] | None = None
    seed: int = 0
    random_states: Sequence[keras.Variable] = ()
    replicas: Replicas = field(default_factory=Replicas)
    loss_scale: LossScale | None = None
    step: int = 0
    epoch: int = 0
    sums: EpochSums = field(default_factory=EpochSums)
    best_loss: float = math.inf
    epoch_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.replicas.count > 1 and not all(is_for_replicas(g.optimizer) for g in self.groups):
            raise ValueError(
                "several replicas add up their gradients before they clip and apply them; take "
                "optimizers from transfer.training.optimizers, for Keras' own would add them up "
                "once more"
            )
        if self.replicas.count > 1 and self.loss_scale is not None:
            raise ValueError(f"loss_scale is for one replica, and there are {self.replicas.count}")
        # Callbacks (EarlyStopping, ReduceLROnPlateau, TensorBoard) use these attributes of a model.
        self.model.optimizer = self.groups[0].optimizer
        self.model.stop_training = False
        rates = [group.optimizer.learning_rate for group in self.groups]
        are_set = all(isinstance(rate, keras.Variable) for rate in rates)  # not schedules
        self._rates = [rate for rate in rates if are_set and len(rates) > 1]
        self._initial_rates = [float(rate.numpy()) for rate in self._rates]
        self._is_changing = self._is_asked_to_stop = False
        self._train_step = tf.function(
            lambda *arguments: self.replicas.run(self._step, *arguments),
            autograph=False,
            reduce_retracing=True,
        )
        self._concrete_steps: dict[Any, Callable[..., tf.Tensor]] = {}

    def _step(
        self, inputs: tf.Tensor, labels: tf.Tensor, step: tf.Tensor, stop: tf.Tensor
    ) -> tf.Tensor:
        """One update, on each replica with its part of the batch.

        Returns:
            float32 ``[4]``, over the whole batch: mean loss, number of correct predictions, number
            of examples, and number of replicas that were asked to stop.
        """
        if self.frozen is not None:
            inputs = tf.stop_gradient(self.frozen(inputs))
        weights = tf.cast(labels >= 0, tf.float32)
        num_examples, num_stops = sum_over_replicas([tf.reduce_sum(weights), stop])
        mixing = self._mixing(step, inputs)
        variables = [variable for group in self.groups for variable in group.variables]
        with tf.GradientTape() as tape:
            logits = self.model(mixing.inputs(inputs), training=True)
            losses = self._losses(labels, logits, mixing) * weights
            loss = tf.reduce_sum(losses) / num_examples
            scaled = loss if self.loss_scale is None else self.loss_scale.scaled(loss)
        gradients = tape.gradient(scaled, [variable.value for variable in variables])
        if self.loss_scale is not None:
            gradients = self.loss_scale.unscaled(gradients)
        is_right = tf.cast(tf.argmax(logits, -1, labels.dtype) == labels, tf.float32)
        reached = [n for n, gradient in enumerate(gradients) if gradient is not None]
        *reduced, loss, num_right = sum_over_replicas(
            [*(gradients[n] for n in reached), loss, tf.reduce_sum(is_right)]
        )
        for n, gradient in zip(reached, reduced, strict=True):
            gradients[n] = gradient
        if self.l2_sp is not None:
            for n in reached:
                pull = self.l2_sp.gradient(variables[n])
                gradients[n] = gradients[n] if pull is None else gradients[n] + pull
        if self.loss_scale is None:
            self._update(gradients)
        else:
            is_lost = self.loss_scale.update(gradients, self._update)
            loss = tf.where(is_lost, math.nan, loss)  # which ends the run
        return tf.stack([loss, num_right, num_examples, num_stops])

    def _update(self, gradients: Sequence[tf.Tensor | None]) -> None:
        if self.clip_norm is not None:
            gradients, _ = tf.clip_by_global_norm(gradients, self.clip_norm)
        remaining = iter(gradients)
        for group in self.groups:
            group.optimizer.apply([next(remaining) for _ in group.variables], group.variables)

    def _mixing(self, step: tf.Tensor, inputs: tf.Tensor) -> Mixing:
        seed = tf.stack([tf.cast(self.seed, tf.int64), step])
        if self.mixup:
            return mixup(self.mixup, seed)
        return cutmix(self.cutmix, seed, inputs) if self.cutmix else UNMIXED

    def _losses(self, labels: tf.Tensor, logits: tf.Tensor, mixing: Mixing) -> tf.Tensor:
        """Softmax cross-entropy, with the targets smoothed as in arXiv 1512.00567, section 7, and
        class weights as in ``keras.Model.fit``."""
        targets = tf.one_hot(labels, logits.shape[-1])
        targets = targets * (1 - self.label_smoothing) + self.label_smoothing / logits.shape[-1]
        if self.class_weights is None:
            return tf.nn.softmax_cross_entropy_with_logits(mixing.targets(targets), logits)
        weights = tf.constant(self.class_weights, tf.float32)
        of_each = tf.gather(weights, tf.maximum(labels, 0))  # NO_LABEL counts for nothing
        if mixing is UNMIXED:
            return tf.nn.softmax_cross_entropy_with_logits(targets, logits) * of_each
        # Each part of a mixed target has the weight of its own label. The operation above takes
        # targets that sum to 1 only.
        weighted = mixing.targets(targets * of_each[:, None])
        return -tf.reduce_sum(weighted * tf.nn.log_softmax(logits), -1)

    def train_step(self, inputs: Any, labels: Any, stop: bool = False) -> tuple[float, int, int]:
        """Perform one update. ``stop`` asks all replicas to stop after it.

        Returns:
            The loss of the batch before the update, the number of correct predictions, and the
            number of examples.
        """
        inputs, labels = self.replicas.shard(inputs, labels)
        step = tf.constant(self.step, tf.int64)
        results = self._compiled(inputs, labels, step, tf.constant(float(stop)))
        loss, num_right, num_examples, num_stops = results.numpy().tolist()
        self.step += 1
        self._is_asked_to_stop = num_stops > 0
        return loss, int(num_right), int(num_examples)

    def _compiled(self, inputs: Any, labels: Any, *rest: tf.Tensor) -> tf.Tensor:
        """``_step`` on all replicas.

        The traced function for the shapes of a batch is kept here: to find it among its own takes
        ``tf.function`` about half as long as a step of a head.
        """
        if self.replicas.num_local > 1:
            return self._train_step(inputs, labels, *rest)
        inputs, labels = tf.convert_to_tensor(inputs), tf.convert_to_tensor(labels)
        key = (*inputs.shape, inputs.dtype, *labels.shape, labels.dtype)
        if key not in self._concrete_steps:
            step = self._train_step.get_concrete_function(inputs, labels, *rest)
            self._concrete_steps[key] = step
        return self._concrete_steps[key](inputs, labels, *rest)

    def train_epoch(
        self,
        batches: Iterable[Batch],
        callbacks: Any,
        *,
        checkpoint: Checkpoint | None = None,
        uninterrupted: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """Train the rest of the current epoch; returns its mean training loss and accuracy.

        Raises:
            NonFiniteLossError: names the step and the learning rate.
            KeyboardInterrupt: after the step in which a replica was asked to stop.
        """
        # Sums in Python: Keras' metrics would take longer than a training step of a head.
        for inputs, labels in batches:
            with uninterrupted(), self._changing():
                self._call(callbacks.on_train_batch_begin, self.sums.num_batches)
                loss, num_right, num_examples = self.train_step(inputs, labels, is_stopped())
                self._check_finite(loss)
                self.sums.add(num_examples, num_right, loss)
                self._call(callbacks.on_train_batch_end, self.sums.num_batches - 1, self.sums.means)
                if checkpoint is not None:
                    checkpoint.save_if_due(self)
            if self._is_asked_to_stop:
                raise KeyboardInterrupt
        return self.sums.means

    def fit(
        self,
        batches: Callable[[int, int], Iterable[Batch]],
        *,
        epochs: int,
        steps_per_epoch: int,
        validate: Callable[[], dict[str, float]] | None = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        verbose: int = 0,
        checkpoint: Checkpoint | None = None,
        uninterrupted: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train until ``self.epoch == epochs``, or until a callback stops training.

        Args:
            batches: called with the number of the epoch, from 0, and the number of its completed
                batches; returns the remaining batches.
            epochs: total number of epochs, including those of earlier calls.
            steps_per_epoch: for the progress bar.
            validate: called after each epoch; its metrics are added to the logs with the prefix
                ``val_``.
            callbacks: Keras callbacks.
            verbose: 0 silent, 1 Keras' progress bar, on standard output, 2 a log line per epoch, at
                most one in five seconds.
            checkpoint: saved after each epoch, when it is due within an epoch, and on a
                ``KeyboardInterrupt`` between two steps. It is complete when this returns or raises.
            uninterrupted: context manager that delays a ``KeyboardInterrupt`` during a step and
                the work at the end of an epoch.
            is_stopped: called before each step. If it returns true on one replica, all replicas
                complete this step and raise ``KeyboardInterrupt``: none may continue alone.
        """
        callback_list = keras.callbacks.CallbackList(
            [*callbacks, EpochLines(epochs)] if verbose == 2 else list(callbacks),
            add_progbar=verbose == 1,
            model=self.model,
            verbose=verbose,
            epochs=epochs,
            steps=steps_per_epoch,
        )
        if checkpoint is not None:
            checkpoint.begin()
        self._call(callback_list.on_train_begin)
        try:
            while self.epoch < epochs and not self.model.stop_training:
                self._call(callback_list.on_epoch_begin, self.epoch)
                start = time.perf_counter()
                logs = self.train_epoch(
                    batches(self.epoch, self.sums.num_batches),
                    callback_list,
                    checkpoint=checkpoint,
                    uninterrupted=uninterrupted,
                    is_stopped=is_stopped,
                )
                self.epoch_seconds.append(time.perf_counter() - start)
                if validate is not None:
                    with self._averaged(uninterrupted):
                        logs |= self._validated(validate)
                    # The last update may have made the weights non-finite after its loss was taken.
                    self._check_finite(logs.get("val_loss", 0.0))
                with uninterrupted(), self._changing():
                    self._end_epoch(logs, callback_list, checkpoint)
        except KeyboardInterrupt:
            if checkpoint is not None and not self._is_changing:
                checkpoint.save(self)
            raise
        else:
            with uninterrupted():
                self.take_averages()
        finally:
            try:
                callback_list.on_train_end()  # callbacks close their files
            finally:
                if checkpoint is not None:
                    checkpoint.end()

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call callbacks. If they change the learning rate of the first group, those of the others
        keep their ratios to it."""
        if not self._rates or not self._initial_rates[0]:
            function(*arguments)
            return
        first, *others = self._rates
        before = float(first.numpy())
        function(*arguments)
        after = float(first.numpy())
        if after != before:
            for rate, initial in zip(others, self._initial_rates[1:], strict=True):
                rate.assign(after * (initial / self._initial_rates[0]))

    def _validated(self, validate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Validation metrics. On an interrupt, the states of random layers are restored, because
        the validation will be repeated."""
        states = [*random_states(self.model), *self.random_states]
        before = [variable.numpy() for variable in states]
        try:
            return {f"val_{name}": value for name, value in validate().items()}
        except KeyboardInterrupt:
            for variable, value in zip(states, before, strict=True):
                variable.assign(value)
            raise

    def _end_epoch(
        self, logs: dict[str, float], callbacks: Any, checkpoint: Checkpoint | None
    ) -> None:
        with self._averaged():
            if logs.get("val_loss", math.inf) < self.best_loss:
                self.best_loss = logs["val_loss"]
                if checkpoint is not None:
                    checkpoint.save_best(self)
            self._call(callbacks.on_epoch_end, self.epoch, logs)
        self.epoch += 1
        self.sums = EpochSums()
        if checkpoint is not None:
            checkpoint.save(self)

    @property
    def _averages(self) -> list[tuple[keras.Variable, keras.Variable]]:
        """Trained variables with their moving averages; empty if no optimizer keeps them. Without
        an update, an optimizer has none: Keras creates them as zeros."""
        return [
            pair
            for group in self.groups
            if group.optimizer.use_ema and group.optimizer.iterations.numpy() > 0
            for pair in zip(group.variables, averages(group.optimizer), strict=False)
        ]

    def take_averages(self) -> None:
        """Set the weights to their moving averages, if optimizers keep them."""
        for variable, average in self._averages:
            variable.assign(average)

    @contextlib.contextmanager
    def _averaged(
        self,
        uninterrupted: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> Iterator[None]:
        """The moving averages, if there are some, in place of the weights."""
        weights: list[np.ndarray] = []
        try:
            with uninterrupted(), self._changing():
                weights = [variable.numpy() for variable, _ in self._averages]
                self.take_averages()
            yield
        finally:
            with uninterrupted(), self._changing():
                for (variable, _), value in zip(self._averages, weights, strict=False):
                    variable.assign(value)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Marks code in which weights, counts and history are inconsistent: no checkpoint here, and
        none after an exception in it."""
        before, self._is_changing = self._is_changing, True
        yield
        self._is_changing = before

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


def random_states(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The variables of a layer that are not weights: states of its random operations."""
    weights = {id(variable) for variable in layer.weights}
    return [variable for variable in layer.variables if id(variable) not in weights]


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of the shuffling and augmentation of an epoch; identical in a resumed run."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
