"""L2-SP: an L2 penalty on the distance of weights from their pretrained values.

Weight decay pulls weights to zero, and so away from what pretraining has found; the starting point
is the better reference (Li, Grandvalet and Davoine 2018, arXiv 1802.01483).
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf


class L2SP:
    """The penalty ``strength / 2`` times the sum of the squared differences between weights and
    their values when this object was made.

    Args:
        strength: factor of the penalty, more than 0.
        variables: the weights, with their pretrained values; others have no penalty.

    Example:
        >>> import keras
        >>> from transfer.training.l2_sp import L2SP
        >>> weight = keras.Variable([1.0, 2.0])
        >>> penalty = L2SP(0.5, [weight])
        >>> weight.assign([1.0, 4.0]).numpy().tolist()
        [1.0, 4.0]
        >>> penalty.gradient(weight).numpy().tolist()
        [0.0, 1.0]
    """

    def __init__(self, strength: float, variables: Sequence[keras.Variable]):
        self._strength = strength
        # A copy: the value of a variable may be its memory, which changes.
        self._start = {id(variable): tf.constant(variable.numpy()) for variable in variables}

    def gradient(self, variable: keras.Variable) -> tf.Tensor | None:
        """Gradient of the penalty, of the variable's shape; ``None`` for other variables."""
        start = self._start.get(id(variable))
        if start is None:
            return None
        return self._strength * (tf.convert_to_tensor(variable.value) - start)
