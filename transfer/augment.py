"""Random views of an image for training: a small shift and a horizontal flip.

Stateless: the view is a function of the image and its seed, so that a run can be repeated. Nothing
is enlarged or shrunk: a network that is trained on enlarged crops sees blurrier images than it will
meet, and pays for it.
"""

from __future__ import annotations

import tensorflow as tf


def random_view(image: tf.Tensor, seed: tf.Tensor, *, max_shift: float = 0.125) -> tf.Tensor:
    """Shift an image at random, what comes in mirrored, and flip it left-right half of the time.

    Args:
        image: ``[height, width, channels]``.
        seed: integer ``[2]``; the same seed gives the same view.
        max_shift: the largest shift, up, down, left and right, as a share of the shorter side. An
            eighth is customary for small images (arXiv 1512.03385, section 4.2: 4 of 32 pixels).

    Returns:
        The same shape and dtype.
    """
    shape = tf.shape(image)
    margin = tf.cast(max_shift * tf.cast(tf.reduce_min(shape[:2]), tf.float32), tf.int32)
    padded = tf.pad(image, [[margin, margin], [margin, margin], [0, 0]], "SYMMETRIC")
    view = tf.image.stateless_random_crop(padded, shape, seed)
    view.set_shape(image.shape)
    return tf.image.stateless_random_flip_left_right(view, seed + 1)
