"""Random views of an image for training: a random crop and a horizontal flip.

Stateless: the view is a function of the image and its seed, so that a run can be repeated.
"""

from __future__ import annotations

import tensorflow as tf


def random_view(image: tf.Tensor, seed: tf.Tensor, *, min_area: float = 0.5) -> tf.Tensor:
    """Crop a random part of an image and flip it left-right half of the time.

    Args:
        image: ``[height, width, channels]``.
        seed: integer ``[2]``; the same seed gives the same view.
        min_area: the least share of the image's area that is kept, 0..1. The aspect ratio varies
            between 3/4 and 4/3, as in the Inception recipe (arXiv 1409.4842).

    Returns:
        ``[crop height, crop width, channels]``, same dtype.
    """
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image),
        bounding_boxes=tf.zeros([1, 0, 4]),
        seed=seed,
        area_range=(min_area, 1.0),
        aspect_ratio_range=(3 / 4, 4 / 3),
        use_image_if_no_bounding_boxes=True,
    )
    crop = tf.slice(image, begin, size)
    crop.set_shape([None, None, image.shape[-1]])
    return tf.image.stateless_random_flip_left_right(crop, seed + 1)
