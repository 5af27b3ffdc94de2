"""Mixup and CutMix: training on combinations of two examples of a batch.

Each example is combined with its counterpart from the other end of the batch, which is in random
order; one share is drawn per batch. Random numbers depend on the seed alone, so that a resumed run
draws the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

Combine = Callable[[tf.Tensor], tf.Tensor]


@dataclass(frozen=True)
class Mixing:
    """How the inputs of a batch are combined, ``[batch, ...]``, and their targets or weights,
    ``[batch, ...]``."""

    inputs: Combine
    targets: Combine


UNMIXED = Mixing(lambda values: values, lambda values: values)


def mixup(parameter: float, seed: tf.Tensor) -> Mixing:
    """Weighted means of inputs and of targets (arXiv 1710.09412).

    Args:
        parameter: of the Beta distribution of the share of an example.
        seed: int64 ``[2]``.
    """
    share = _beta(parameter, seed)

    def combine(values: tf.Tensor) -> tf.Tensor:
        return _mean(values, share)

    return Mixing(combine, combine)


def cutmix(parameter: float, seed: tf.Tensor, inputs: tf.Tensor) -> Mixing:
    """A box of each image, or of its feature maps, is replaced by that of its counterpart, and the
    targets are mixed by the area (arXiv 1905.04899).

    Args:
        parameter: of the Beta distribution of the share of an example; 1 in the paper.
        seed: int64 ``[2]``.
        inputs: ``[batch, height, width, channels]``, of known height and width.
    """
    side = tf.sqrt(1 - _beta(parameter, seed))  # relative to height and width
    middle = tf.random.stateless_uniform([2], tf.random.experimental.stateless_fold_in(seed, 1))

    def is_inside(axis: int) -> tf.Tensor:
        size = inputs.shape[1 + axis]
        places = (tf.range(size, dtype=tf.float32) + 0.5) / size
        return tf.abs(places - middle[axis]) < side / 2

    is_other = is_inside(0)[:, None] & is_inside(1)[None, :]
    share = 1 - tf.reduce_mean(tf.cast(is_other, tf.float32))  # the box may be cut by an edge

    def paste(values: tf.Tensor) -> tf.Tensor:
        return tf.where(is_other[None, :, :, None], tf.reverse(values, [0]), values)

    return Mixing(paste, lambda values: _mean(values, share))


def _mean(values: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
    return share * values + (1 - share) * tf.reverse(values, [0])


def _beta(parameter: float, seed: tf.Tensor) -> tf.Tensor:
    """A draw from the distribution Beta(``parameter``, ``parameter``), float32 ``[]``."""
    # Draws for a small parameter underflow in float32; two of them would give one half.
    dtype = tf.float64 if parameter < 0.1 else tf.float32
    draws = tf.random.stateless_gamma([2], seed, tf.constant(parameter, dtype), dtype=dtype)
    first, second = tf.unstack(draws)
    return tf.cast(first / (first + second), tf.float32)
