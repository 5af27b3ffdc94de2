"""Data augmentation: a random shift and a random horizontal flip.

Stateless: a view is a function of the image and its seed, so that a run is reproducible. Images are
not rescaled: a network trained on enlarged crops sees blurrier images than at inference, which
costs accuracy.
"""

from __future__ import annotations

import tensorflow as tf

MAX_SHIFT = 0.125
"""Maximum shift in each direction, as a fraction of the shorter side. 1/8 is customary for small
images (arXiv 1512.03385, section 4.2: 4 of 32 pixels)."""


def random_view(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Shift an image randomly, with symmetric padding, and flip it left-right in half of the cases.

    Args:
        image: ``[height, width, channels]``.
        seed: integer ``[2]``; the same seed gives the same view.

    Returns:
        The view, of the same shape and dtype.
    """
    view = random_views(tf.convert_to_tensor(image)[None], seed)[0]
    view.set_shape(image.shape)
    return view


def random_views(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """``random_view`` of each image of ``[batch, height, width, channels]``, all independent."""
    count, height, width, _ = tf.unstack(tf.shape(images))
    margin = tf.cast(MAX_SHIFT * tf.cast(tf.minimum(height, width), tf.float32), tf.int32)
    shifts = tf.random.stateless_uniform([count, 2], seed, -margin, margin + 1, tf.int32)
    is_flipped = tf.random.stateless_uniform([count, 1], seed + 1, 0, 2, tf.int32) > 0
    rows = _mirrored(tf.range(height) + shifts[:, :1], height)
    columns = _mirrored(tf.range(width) + shifts[:, 1:], width)
    columns = tf.where(is_flipped, columns[:, ::-1], columns)
    views = tf.gather(tf.gather(images, rows, batch_dims=1), columns, axis=2, batch_dims=1)
    views.set_shape(images.shape)
    return views


def _mirrored(positions: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Map positions outside ``[0, size)`` into it by symmetric padding, which repeats the edge."""
    positions = tf.where(positions < 0, -1 - positions, positions)
    return tf.where(positions >= size, 2 * size - 1 - positions, positions)
