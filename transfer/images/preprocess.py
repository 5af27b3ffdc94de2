"""What a network expects of its input: one function to train, evaluate, predict and export with.

Data contract: images come in as RGB (or gray, or RGBA), uint8 or float in 0..255, ``[height, width,
channels]`` or ``[batch, height, width, channels]``, of any size. They go out as float32
``[..., height, width, channels]`` in the convention that the weights were trained with. The
convention belongs to the weights and is recorded in their card.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def convention(mode: str | Mapping[str, Any]) -> Convention:
    """What a mode means: a key of ``CONVENTIONS``, or means of one's own.

    Args:
        mode: a name, or ``{"mean": [...], "std": [...], "order": "BGR"}``, as an object or as its
            JSON. ``mean`` and ``std`` are in gray levels 0..255, one number or one a channel, in
            the ``order`` in which the network sees the channels, or ``RGB``. Without ``std``
            the image is not divided.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(mode, str) and mode in CONVENTIONS:
        return CONVENTIONS[mode]
    values = mode
    if isinstance(mode, str) and mode.lstrip().startswith("{"):
        try:
            values = json.loads(mode)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"preprocess={mode!r} is not JSON: {error}") from error
    if not isinstance(values, Mapping):
        raise ValueError(
            f"preprocess={mode!r} is not known; choose from: {', '.join(CONVENTIONS)}, or means of "
            'your own: {"mean": [R, G, B]}'
        )
    unknown = values.keys() - {"mean", "std", "order"}
    if unknown or "mean" not in values:
        raise ValueError(
            f"preprocess has {', '.join(map(repr, values)) or 'nothing'}; expected 'mean' and, if "
            "they matter, 'std' and 'order'"
        )
    mean, std = _numbers("mean", values["mean"]), _numbers("std", values.get("std", 1.0))
    order = values.get("order", "RGB")
    if order not in ("RGB", "BGR"):
        raise ValueError(f"preprocess has order {order!r}; expected RGB or BGR")
    if min(std) <= 0:
        raise ValueError(f"preprocess has std {list(std)}; expected numbers above 0")
    return Convention(mean, std, bgr=order == "BGR")


def canonical(mode: str | Mapping[str, Any]) -> str:
    """A mode as one string, the same for all ways to write it: a name of ``CONVENTIONS``, where it
    means that, or JSON.

    Raises:
        ValueError: if it is not known.
    """
    found = convention(mode)
    if isinstance(mode, str) and mode in CONVENTIONS:
        return mode
    for name, known in CONVENTIONS.items():
        if known == found:
            return name
    return json.dumps(_as_object(found))


def for_card(mode: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """A mode as it stands in a card: a name, or an object."""
    name = canonical(mode)
    return name if name in CONVENTIONS else _as_object(convention(name))


def _as_object(found: Convention) -> dict[str, Any]:
    values: dict[str, Any] = {"mean": list(found.mean)}
    if any(scale != 1 for scale in found.scale):
        values["std"] = list(found.scale)
    return values | {"order": "BGR" if found.bgr else "RGB"}


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    """One number, or one a channel."""
    values = value if isinstance(value, list | tuple) else [value]
    are_numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not are_numbers or len(values) not in (1, 3) or not all(map(math.isfinite, values)):
        raise ValueError(f"preprocess has {name} {value!r}; expected one number, or one a channel")
    found = tuple(float(v) for v in values)
    return found[:1] if len(set(found)) == 1 else found


Size = int | tuple[int, int]
"""Of images in pixels: one number for square images, else ``(height, width)``."""

_LONGEST = 16
"""So many times the shorter side of an image is looked at; one of it is seen."""
_LARGE = 2**26
"""Numbers in an image of which there is no second copy."""
_STRIP = 256
"""Rows of such an image that are looked at together."""


def as_size(size: int | Sequence[int]) -> Size:
    """One number where height and width are equal, else ``(height, width)``.

    Raises:
        ValueError: if it is neither, or less than a pixel.
    """
    sides = [size] if isinstance(size, int) else list(size)
    if len(sides) not in (1, 2) or any(type(side) is not int for side in sides):
        raise ValueError(f"image size {size!r}: expected one number, or height and width")
    if min(sides) < 1:
        raise ValueError(f"image size must be at least 1 pixel, got {show_size(size)}")
    return sides[0] if len({*sides}) == 1 else (sides[0], sides[1])


def parse_size(text: int | str) -> Size:
    """``"224"``, or ``"100x200"``: height and width.

    Raises:
        ValueError: for anything else.
    """
    sides = str(text).lower().split("x")
    if not all(side.strip().lstrip("-").isdecimal() for side in sides) or len(sides) > 2:
        raise ValueError(
            f"image size {text!r}: expected pixels, like 224, or HEIGHTxWIDTH, like 100x200"
        )
    return as_size([int(side) for side in sides])


def show_size(size: int | Sequence[int]) -> str:
    """The inverse of ``parse_size``."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


@dataclass(frozen=True)
class Preprocess:
    """Resizes, crops and normalises images for one network.

    Images are resized until they just cover ``size`` (bilinear, antialiased, the aspect ratio kept)
    and the centre is cropped, so that nothing is distorted.

    Args:
        mode: one of ``CONVENTIONS``: caffe, slim, torch, tf, unit, none; or means of the model
            itself, see ``convention``. Kept as a string.
        size: of the result in pixels: one number for height and width, or ``(height, width)``.
        channels: 3, or 1 for networks that take gray images.

    Raises:
        ValueError: if the mode is unknown, or has three means where the network takes gray images.
    """

    mode: str
    size: Size
    channels: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", as_size(self.size))
        object.__setattr__(self, "mode", canonical(self.mode))
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        meaning = convention(self.mode)
        if self.channels == 1 and (len(meaning.mean + meaning.scale) > 2 or meaning.bgr):
            raise ValueError(
                f"preprocess={self.mode!r} is for colour images but the network takes gray ones; "
                "choose from: tf, unit, none"
            )

    @property
    def height(self) -> int:
        """Height of the preprocessed images in pixels."""
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        """Width of the preprocessed images in pixels."""
        return self.size if isinstance(self.size, int) else self.size[1]

    @property
    def plain_size(self) -> int | list[int]:
        """The size as JSON has it."""
        return self.size if isinstance(self.size, int) else list(self.size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image that comes out."""
        return self.height, self.width, self.channels

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Images of any size, RGB 0..255, to float32 ``[..., height, width, channels]``."""
        return self.normalize(self.resize(to_channels(images, self.channels)))

    def resize(self, images: tf.Tensor) -> tf.Tensor:
        """To ``[..., height, width, channels]`` float32, values still 0..255."""
        wanted = [self.height, self.width]
        images = _without_ends(images, _LONGEST * -(-max(wanted) // min(wanted)))
        shape = tf.shape(images)[-3:-1]
        # The side that is scaled the most just fits; the other one is cropped.
        covering = tf.argmax(tf.cast(wanted, tf.float64) / tf.cast(shape, tf.float64))
        side = tf.cast(tf.gather(shape, covering), tf.float64)
        length = tf.cast(tf.gather(wanted, covering), tf.float64)
        target = tf.cast(tf.round(tf.cast(shape, tf.float64) * length / side), tf.int32)
        images = _resized(images, target)
        top, left = tf.unstack((target - wanted) // 2)
        return tf.image.crop_to_bounding_box(images, top, left, self.height, self.width)

    def normalize(self, images: tf.Tensor) -> tf.Tensor:
        """Apply the convention to RGB (or gray) images in 0..255; the size does not matter."""
        meaning = convention(self.mode)
        if meaning.bgr:
            images = images[..., ::-1]
        return (tf.cast(images, tf.float32) - meaning.mean) / meaning.scale


def _without_ends(images: tf.Tensor, longest: int) -> tf.Tensor:
    """The middle of images that are very long: a line of a pixel's height would otherwise be made
    as long as it is high, before all but its middle is cut off."""
    images = tf.convert_to_tensor(images)
    shape = tf.shape(images)[-3:-1]
    kept = tf.minimum(shape, longest * tf.reduce_min(shape))
    top, left = tf.unstack((shape - kept) // 2)

    def middle() -> tf.Tensor:
        return images[..., top : top + kept[0], left : left + kept[1], :]

    if images.dtype != tf.uint8:
        return middle()
    # Images from files may be large: those that are not long are not copied.
    return tf.cond(tf.reduce_any(kept < shape), middle, lambda: images)


def _resized(images: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    def as_floats() -> tf.Tensor:
        return tf.image.resize(tf.cast(images, tf.float32), target, antialias=True)

    if images.dtype != tf.uint8:
        return as_floats()

    def as_bytes() -> tf.Tensor:
        """The same values, more slowly, without a copy that has four bytes for each."""
        return tf.cast(tf.image.resize(images, target, antialias=True), tf.float32)

    return tf.cond(tf.size(images) < _LARGE, as_floats, as_bytes)


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
        return _gray(tf.convert_to_tensor(images))
    raise ValueError(f"images have {found} channels; expected 1 (gray), 3 (RGB) or 4 (RGBA)")


def _gray(images: tf.Tensor) -> tf.Tensor:
    if images.dtype != tf.uint8 or images.shape.rank != 3:
        return tf.image.rgb_to_grayscale(images)

    def by_strips() -> tf.Tensor:
        """Without copies of the whole that have four bytes for each number."""
        height, width, _ = tf.unstack(tf.shape(images))
        count = -(-height // _STRIP)
        strips = tf.TensorArray(tf.uint8, count, element_shape=[None, None, 1], infer_shape=False)

        def add(number: tf.Tensor, strips: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
            strip = images[number * _STRIP : (number + 1) * _STRIP]
            return number + 1, strips.write(number, tf.image.rgb_to_grayscale(strip))

        _, strips = tf.while_loop(
            lambda number, _: number < count, add, (0, strips), parallel_iterations=1
        )
        return tf.reshape(strips.concat(), [height, width, 1])

    return tf.cond(tf.size(images) < _LARGE, lambda: tf.image.rgb_to_grayscale(images), by_strips)
