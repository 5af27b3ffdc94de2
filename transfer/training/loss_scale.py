"""Dynamic loss scaling for training in float16 (arXiv 1710.03740, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf


class LossScale:
    """Scales the loss, so that small gradients do not become 0 in float16.

    A step whose gradients overflow is skipped and halves the scale; it is doubled after a number of
    steps without overflow. Scales are powers of two, which are exact in binary floating point.
    ``keras.optimizers.LossScaleOptimizer`` does the same for one optimizer; here, several
    optimizers share the gradients of one loss, and skip the same steps.

    Args:
        initial: the first scale.
        growth_steps: steps without overflow before the scale is doubled.
    """

    def __init__(self, initial: float = 2.0**15, growth_steps: int = 2000):
        self._growth_steps = growth_steps
        self._scale = keras.Variable(initial, dtype="float32", trainable=False)
        self._num_finite = keras.Variable(0, dtype="int64", trainable=False)

    @property
    def variables(self) -> list[keras.Variable]:
        """The state: the scale, and the number of steps since it last changed."""
        return [self._scale, self._num_finite]

    def scaled(self, loss: tf.Tensor) -> tf.Tensor:
        """The loss to differentiate."""
        return loss * self._scale.value

    def unscaled(self, gradients: Sequence[Any]) -> list[tf.Tensor | None]:
        """Gradients of the loss from those of the scaled loss."""
        inverse = 1 / tf.convert_to_tensor(self._scale.value)
        return [None if g is None else tf.convert_to_tensor(g) * inverse for g in gradients]

    def update(
        self,
        gradients: Sequence[tf.Tensor | None],
        apply: Callable[[Sequence[tf.Tensor | None]], None],
    ) -> tf.Tensor:
        """Call ``apply`` with the gradients if they are finite, and adapt the scale.

        Returns:
            Whether the step was skipped at the smallest scale, 1, so that no other one helps.
        """
        finite = [tf.reduce_all(tf.math.is_finite(g)) for g in gradients if g is not None]
        is_finite = tf.reduce_all(tf.stack(finite)) if finite else tf.constant(True)

        def applied() -> tf.Tensor:
            apply(gradients)
            return tf.constant(True)

        tf.cond(is_finite, applied, lambda: tf.constant(False))
        scale, num_finite = (tf.convert_to_tensor(v.value) for v in self.variables)
        is_due = num_finite + 1 >= self._growth_steps
        grown = tf.where(is_due, tf.minimum(2 * scale, 2.0**24), scale)
        self._scale.assign(tf.where(is_finite, grown, tf.maximum(scale / 2, 1.0)))
        self._num_finite.assign(tf.where(is_finite & ~is_due, num_finite + 1, 0))
        return ~is_finite & (scale <= 1)
