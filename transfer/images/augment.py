"""Random views of images for training: a small shift and a horizontal flip.

Stateless: a view is a function of the image and its seed, so that a run can be repeated. Nothing is
enlarged or shrunk: a network that is trained on enlarged crops sees blurrier images than it will
meet, and pays for it.
"""

from __future__ import annotations

import tensorflow as tf

MAX_SHIFT = 0.125
"""The largest shift, up, down, left and right, as a share of the shorter side. An eighth is
customary for small images (arXiv 1512.03385, section 4.2: 4 of 32 pixels)."""


def random_view(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Shift an image at random, what comes in mirrored, and flip it left-right half of the time.

    Args:
        image: ``[height, width, channels]``.
        seed: integer ``[2]``; the same seed gives the same view.

    Returns:
        The same shape and dtype.
    """
    view = random_views(tf.convert_to_tensor(image)[None], seed)[0]
    view.set_shape(image.shape)
    return view


def random_views(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """The same for ``[batch, height, width, channels]``, each image with a view of its own."""
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
    """Positions beyond the ends of a line as those of what is mirrored there, the last twice."""
    positions = tf.where(positions < 0, -1 - positions, positions)
    return tf.where(positions >= size, 2 * size - 1 - positions, positions)
