"""The check of a conversion: outputs and gradients are those of the layers it was made from."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

logger = logging.getLogger(__name__)

OUTPUTS, GRADIENTS = 1e-5, 1e-4
"""Largest differences, as fractions of the largest value of the same tensor."""
_FACTORS = {"float16": 1e3, "bfloat16": 1e4}
"""Multiples of these for dtypes of lower precision than float32."""
_NEGLIGIBLE = 1e-5
"""Gradients smaller than this fraction of the largest of all are rounding errors."""
_IMAGES = 2
_DRAWS = 3


@dataclass(frozen=True)
class Part:
    """A layer and the weights made from it.

    ``weights`` of the native model hold what ``derived`` computes from the values of ``variables``
    of the layer.
    """

    variables: Sequence[keras.Variable]
    weights: Sequence[keras.Variable]
    derived: Callable[[list[tf.Tensor]], list[tf.Tensor]]


@dataclass(frozen=True)
class Difference:
    """How a native model differs from its source: maximum differences, as fractions of the largest
    value."""

    outputs: float
    gradients: float | None
    """``None`` if TensorFlow cannot compute those of the source on this machine."""


def compare(
    model: keras.Model, source: Callable[[tf.Tensor], Any], parts: Sequence[Part]
) -> Difference:
    """Compare a native model with what it was made from, on random inputs.

    The gradients of the native model with respect to its weights are propagated to the variables
    from which the weights were computed, and compared there. Gradients that differ are compared on
    other inputs too: a value within rounding of zero can be on either side of a ReLU.

    Raises:
        ValueError: if they differ by more than ``OUTPUTS`` or ``GRADIENTS``; says by how much.
    """
    for seed in range(_DRAWS - 1):
        with contextlib.suppress(_GradientsDifferError):
            return _compare(model, source, parts, np.random.default_rng(seed))
    return _compare(model, source, parts, np.random.default_rng(_DRAWS - 1))


class _GradientsDifferError(ValueError):
    pass


def _compare(
    model: keras.Model,
    source: Callable[[tf.Tensor], Any],
    parts: Sequence[Part],
    generator: np.random.Generator,
) -> Difference:
    shape = (_IMAGES, *model.input_shape[1:])
    dtype = tf.as_dtype(model.input.dtype)
    images: np.ndarray = generator.standard_normal(shape)
    if dtype.is_integer:
        images = generator.integers(0, min(256, dtype.max + 1), shape)
    inputs = tf.cast(tf.constant(images), dtype)
    variables = [variable.value for part in parts for variable in part.variables]
    weights = [weight.value for part in parts for weight in part.weights]
    has_input = [inputs] if dtype.is_floating else []
    with tf.GradientTape() as tape:
        tape.watch([*has_input, *variables])
        expected = tf.nest.flatten(source(inputs))
    with tf.GradientTape() as own_tape:
        own_tape.watch([*has_input, *weights])
        actual = tf.nest.flatten(model(inputs, training=False))
    factor = max(_FACTORS.get(output.dtype.name, 1) for output in expected)
    outputs = max(_relative(*pair, 0.0) for pair in zip(actual, expected, strict=True))
    _check("outputs", outputs, OUTPUTS * factor)
    pairs = [pair for pair in zip(actual, expected, strict=True) if pair[1].dtype.is_floating]
    if not pairs:
        return Difference(outputs, None)
    upstream = [tf.cast(generator.standard_normal(t.shape), t.dtype) for _, t in pairs]
    options = {"output_gradients": upstream, "unconnected_gradients": "zero"}
    try:
        theirs = tape.gradient([t for _, t in pairs], [*has_input, *variables], **options)
        ours = own_tape.gradient([t for t, _ in pairs], [*has_input, *weights], **options)
    except tf.errors.OpError as error:  # of grouped and dilated convolutions, on CPUs
        logger.info(
            "gradients are not compared, since TensorFlow cannot compute them: %s",
            " ".join(error.message.split())[-200:],
        )
        return Difference(outputs, None)
    named = [("the input", g, True) for g in ours[: len(has_input)]]
    named += _of_variables(parts, ours[len(has_input) :])
    floor = _NEGLIGIBLE * max(map(_largest, theirs), default=0.0)
    worst = 0.0
    for (name, our, is_trainable), their in zip(named, theirs, strict=True):
        if not is_trainable:  # TensorFlow's fused batch norm gives none for its statistics
            continue
        difference = _relative(our, their, floor)
        what = f"gradients with respect to {name}"
        _check(what, difference, GRADIENTS * factor, _GradientsDifferError)
        worst = max(worst, difference)
    return Difference(outputs, worst)


def _of_variables(
    parts: Sequence[Part], gradients: Sequence[tf.Tensor]
) -> list[tuple[str, tf.Tensor, bool]]:
    """Name of each variable of all parts, gradient with respect to it, and whether it is
    trainable."""
    found: list[tuple[str, tf.Tensor, bool]] = []
    start = 0
    for part in parts:
        end = start + len(part.weights)
        values = [tf.identity(variable.value) for variable in part.variables]
        with tf.GradientTape() as tape:
            tape.watch(values)
            derived = part.derived(values)
        pulled = tape.gradient(
            derived, values, list(gradients[start:end]), unconnected_gradients="zero"
        )
        names = [repr(variable.name) for variable in part.variables]
        found += zip(names, pulled, [v.trainable for v in part.variables], strict=True)
        start = end
    return found


def _relative(actual: tf.Tensor, expected: tf.Tensor, floor: float) -> float:
    ours, theirs = (np.asarray(tf.cast(t, tf.float64)) for t in (actual, expected))
    if not np.isfinite(theirs).all() and np.array_equal(ours, theirs, equal_nan=True):
        return 0.0
    difference = float(np.max(np.abs(ours - theirs), initial=0.0))
    return difference / max(_largest(expected), floor, 1e-30) if difference else 0.0


def _largest(values: Any) -> float:
    return float(np.max(np.abs(np.asarray(values)), initial=0.0))


def _check(
    what: str, difference: float, tolerance: float, error: type[ValueError] = ValueError
) -> None:
    if not difference <= tolerance:
        raise error(
            f"the native Keras model is not the same as the layer: its {what} differ by "
            f"{difference:.1g} of the largest value; expected at most {tolerance:g}"
        )
