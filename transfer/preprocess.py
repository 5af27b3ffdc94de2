"""What a network expects of its input: one function to train, evaluate, predict and export with.

Data contract: images come in as RGB (or gray, or RGBA), uint8 or float in 0..255, ``[height, width,
channels]`` or ``[batch, height, width, channels]``, of any size. They go out as float32
``[..., size, size, channels]`` in the convention that the weights were trained with. The convention
belongs to the weights and is recorded in their card.
"""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf


@dataclass(frozen=True)
class Convention:
    """``(image - mean) / scale`` per channel, after reversing RGB to BGR where ``bgr`` is set."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    bgr: bool = False


# Means in the order of the channels as the network sees them, in grey levels 0..255.
CONVENTIONS = {
    # Original VGG weights and keras.applications.vgg16 (mode "caffe").
    "caffe": Convention((103.939, 116.779, 123.68), (1.0,), bgr=True),
    # tf-slim: research/slim/preprocessing/vgg_preprocessing.py.
    "slim": Convention((123.68, 116.78, 103.94), (1.0,)),
    # torchvision: mean and deviation of ImageNet on a 0..1 scale, here times 255.
    "torch": Convention((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    # keras.applications mode "tf": -1..1.
    "tf": Convention((127.5,), (127.5,)),
    "unit": Convention((0.0,), (255.0,)),
    "none": Convention((0.0,), (1.0,)),
}


_LONGEST = 16
"""So many times the shorter side of an image is looked at; one of it is seen."""
_LARGE = 2**26
"""Numbers in an image of which there is no second copy."""


@dataclass(frozen=True)
class Preprocess:
    """Resizes, crops and normalises images for one network.

    The shorter side is resized to ``size`` (bilinear, antialiased, the aspect ratio kept) and the
    centre is cropped, so that nothing is distorted.

    Args:
        mode: one of ``CONVENTIONS``: caffe, slim, torch, tf, unit, none.
        size: height and width of the result in pixels.
        channels: 3, or 1 for networks that take gray images.

    Raises:
        ValueError: if the mode is unknown, or has three means where the network takes gray images.
    """

    mode: str
    size: int
    channels: int = 3

    def __post_init__(self) -> None:
        if self.mode not in CONVENTIONS:
            raise ValueError(
                f"preprocess={self.mode!r} is not known; choose from: {', '.join(CONVENTIONS)}"
            )
        if self.size < 1:
            raise ValueError(f"image size must be at least 1 pixel, got {self.size}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if self.channels == 1 and len(CONVENTIONS[self.mode].mean) == 3:
            raise ValueError(
                f"preprocess={self.mode!r} is for colour images but the network takes gray ones; "
                "choose from: tf, unit, none"
            )

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Images of any size, RGB 0..255, to float32 ``[..., size, size, channels]``."""
        return self.normalize(self.resize(to_channels(images, self.channels)))

    def resize(self, images: tf.Tensor) -> tf.Tensor:
        """To ``[..., size, size, channels]`` float32, values still 0..255."""
        images = _without_ends(images)
        shape = tf.shape(images)[-3:-1]
        shorter = tf.cast(tf.reduce_min(shape), tf.float64)
        target = tf.cast(tf.round(tf.cast(shape, tf.float64) * self.size / shorter), tf.int32)
        images = _resized(images, target)
        top, left = tf.unstack((target - self.size) // 2)
        return tf.image.crop_to_bounding_box(images, top, left, self.size, self.size)

    def normalize(self, images: tf.Tensor) -> tf.Tensor:
        """Apply the convention to RGB (or gray) images in 0..255; the size does not matter."""
        convention = CONVENTIONS[self.mode]
        if convention.bgr:
            images = images[..., ::-1]
        return (tf.cast(images, tf.float32) - convention.mean) / convention.scale


def _resized(images: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    def as_floats() -> tf.Tensor:
        return tf.image.resize(tf.cast(images, tf.float32), target, antialias=True)

    if images.dtype != tf.uint8:
        return as_floats()

    def as_bytes() -> tf.Tensor:
        """The same values, more slowly, without four bytes for each of the image."""
        return tf.cast(tf.image.resize(images, target, antialias=True), tf.float32)

    return tf.cond(tf.size(images) < _LARGE, as_floats, as_bytes)


def _without_ends(images: tf.Tensor) -> tf.Tensor:
    """The middle of images that are very long: a line of a pixel's height would otherwise be made
    as long as it is high, before all but its middle is cut off."""
    images = tf.convert_to_tensor(images)
    shape = tf.shape(images)[-3:-1]
    kept = tf.minimum(shape, _LONGEST * tf.reduce_min(shape))
    top, left = tf.unstack((shape - kept) // 2)
    return images[..., top : top + kept[0], left : left + kept[1], :]


def to_channels(images: tf.Tensor, channels: int) -> tf.Tensor:
    """Gray, RGB or RGBA images to ``channels`` (1 or 3); alpha is dropped."""
    found = images.shape[-1]
    if found == channels:
        return images
    if found == 4:
        return to_channels(images[..., :3], channels)
    if (found, channels) == (1, 3):
        return tf.repeat(images, 3, axis=-1)
    if (found, channels) == (3, 1):
        return tf.image.rgb_to_grayscale(images)
    raise ValueError(f"images have {found} channels; expected 1 (gray), 3 (RGB) or 4 (RGBA)")
