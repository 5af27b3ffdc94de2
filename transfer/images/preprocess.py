"""Image preprocessing: resizing and normalization, the same in training, evaluation and export.

Data contract: the input is RGB (or gray, or RGBA), uint8 or float in 0..255, ``[height, width,
channels]`` or ``[batch, height, width, channels]``, of any size. The output is float32 ``[...,
height, width, channels]``, normalized by the convention that the weights were trained with. The
convention belongs to the weights and is recorded in their card.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

from transfer.core.tensors import Tensor, TensorLike
from transfer.images.decoding import from_pillow, read_image

Mode: TypeAlias = Literal["caffe", "slim", "torch", "tf", "unit", "none"]
"""Names of ``CONVENTIONS``."""
Images: TypeAlias = TensorLike | Image.Image | str | Path | Sequence[Image.Image | str | Path]
"""What ``Preprocess`` takes."""


@dataclass(frozen=True)
class Convention:
    """``(image - mean) / scale`` per channel, after reversing RGB to BGR where ``bgr`` is set."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    bgr: bool = False


# Means are in the channel order of the network's input, in gray levels 0..255.
CONVENTIONS = {
    # Original VGG weights and keras.applications.vgg16 (mode "caffe").
    "caffe": Convention((103.939, 116.779, 123.68), (1.0,), bgr=True),
    # tf-slim: research/slim/preprocessing/vgg_preprocessing.py.
    "slim": Convention((123.68, 116.78, 103.94), (1.0,)),
    # torchvision: ImageNet mean and standard deviation for images in 0..1, here times 255.
    "torch": Convention((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    # keras.applications mode "tf": -1..1.
    "tf": Convention((127.5,), (127.5,)),
    "unit": Convention((0.0,), (255.0,)),
    "none": Convention((0.0,), (1.0,)),
}


def convention(mode: str | Mapping[str, Any]) -> Convention:
    """The convention of a mode: a key of ``CONVENTIONS``, or custom means.

    Args:
        mode: a name, or ``{"mean": [...], "std": [...], "order": "BGR"}``, as a mapping or as JSON.
            ``mean`` and ``std`` are in gray levels 0..255, one number or one per channel, in the
            channel order of the network's input, which ``order`` gives (default ``RGB``). Without
            ``std`` the image is not scaled.

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
    """The canonical string of a mode: the equal name of ``CONVENTIONS`` if there is one, else JSON.

    Raises:
        ValueError: if the mode is unknown.
    """
    meaning = convention(mode)
    if isinstance(mode, str) and mode in CONVENTIONS:
        return mode
    for name, known in CONVENTIONS.items():
        if known == meaning:
            return name
    return json.dumps(_as_object(meaning))


def for_card(mode: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """A mode as stored in a card: a name, or a JSON object."""
    name = canonical(mode)
    return name if name in CONVENTIONS else _as_object(convention(name))


def _as_object(meaning: Convention) -> dict[str, Any]:
    values: dict[str, Any] = {"mean": list(meaning.mean)}
    if any(scale != 1 for scale in meaning.scale):
        values["std"] = list(meaning.scale)
    return values | {"order": "BGR" if meaning.bgr else "RGB"}


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    """One number, or one per channel."""
    values = value if isinstance(value, list | tuple) else [value]
    are_numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    are_finite = are_numbers and all(abs(v) < 1e30 for v in values)  # nor NaN; of any length
    if not are_finite or len(values) not in (1, 3):
        raise ValueError(f"preprocess has {name} {value!r}; expected one number, or one a channel")
    numbers = tuple(float(v) for v in values)
    return numbers[:1] if len(set(numbers)) == 1 else numbers


Size = int | tuple[int, int]
"""Image size in pixels: one number for square images, else ``(height, width)``."""

MAX_SIDE = 2**14
"""Largest height or width of the input of a network, in pixels."""

_LONGEST = 16
"""Images longer than this multiple of their shorter side are cropped before they are resized; only
a part as long as the shorter side remains in the end."""
_LARGE = 2**26
"""Number of values from which on an image is not copied as a whole, to save memory."""
_STRIP = 256
"""Number of rows of such an image that are processed at a time."""


def as_size(size: int | Sequence[int]) -> Size:
    """One number if height and width are equal, else ``(height, width)``.

    Raises:
        ValueError: if it is neither, or not 1 to ``MAX_SIDE`` pixels.
    """
    sides = [size] if isinstance(size, int) else list(size)
    if len(sides) not in (1, 2) or any(type(side) is not int for side in sides):
        raise ValueError(f"image size {size!r}: expected one number, or height and width")
    if not 1 <= min(sides) <= max(sides) <= MAX_SIDE:
        raise ValueError(f"image size must be 1 to {MAX_SIDE:,} pixels, got {show_size(size)}")
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


class Region(NamedTuple):
    """A rectangle in an image, in pixels from the top left corner; not rounded."""

    top: float
    left: float
    height: float
    width: float


@keras.saving.register_keras_serializable("vgg_transfer")
class Preprocess(keras.layers.Layer):
    """Resizes, center-crops and normalizes images for a network, as a Keras layer.

    Images are resized to the smallest size that covers ``size`` (bilinear, antialiased, preserving
    the aspect ratio), then center-cropped.

    Args:
        mode: one of ``CONVENTIONS``: caffe, slim, torch, tf, unit, none; or custom means, see
            ``convention``. Stored as a string.
        size: output size in pixels: one number for height and width, or ``(height, width)``.
        channels: 3, or 1 for networks with gray input.

    Raises:
        ValueError: if the mode is unknown, or has three means but ``channels`` is 1.

    Example:
        >>> import numpy as np
        >>> from transfer import Preprocess
        >>> photos = np.zeros((2, 120, 90, 3), np.uint8)
        >>> Preprocess("caffe", 224)(photos).shape
        TensorShape([2, 224, 224, 3])
    """

    def __init__(
        self,
        mode: Mode | Mapping[str, Any],
        size: Size,
        channels: int = 3,
        **kwargs: Any,
    ):
        super().__init__(**kwargs | {"autocast": False, "dtype": "float32", "trainable": False})
        self.mode = canonical(mode)
        self.size: Size = as_size(size)
        self.channels = channels
        self.built = True
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
        """The size as a JSON value."""
        return self.size if isinstance(self.size, int) else list(self.size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one output image."""
        return self.height, self.width, self.channels

    def __call__(self, images: Images) -> Tensor:
        """Images of any size, RGB 0..255, to float32 ``[..., height, width, channels]``.

        Args:
            images: a tensor or array ``[height, width, channels]`` or ``[batch, height, width,
                channels]``, eager or of a Keras model; an image of Pillow; the path of an image
                file; or a list of Pillow images and paths, which gives a batch.

        Raises:
            FileNotFoundError, ValueError: if a file does not exist or cannot be decoded, or the
                images have a wrong number of channels.
        """
        if isinstance(images, keras.KerasTensor):
            return super().__call__(images)
        if isinstance(images, list | tuple) and images and all(map(_is_file, images)):
            return tf.stack([self(image) for image in images])
        # Not by Layer.__call__: it would convert uint8 arrays to floats.
        return self.call(_read(images) if _is_file(images) else images)

    def call(self, images: tf.Tensor) -> tf.Tensor:
        """The same for a tensor or an array."""
        return self.normalize(self.resize(to_channels(images, self.channels)))

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """``(..., height, width, channels)``."""
        if input_shape[-1] not in (None, 1, 3, 4):
            raise ValueError(
                f"images have {input_shape[-1]} channels; expected 1 (gray), 3 (RGB) or 4 (RGBA)"
            )
        return (*input_shape[:-3], *self.shape)

    def settings(self) -> dict[str, Any]:
        """Mode, size and channels as JSON values."""
        return {"mode": self.mode, "size": self.plain_size, "channels": self.channels}

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {"name": self.name, **self.settings()}

    def resize(self, images: tf.Tensor) -> tf.Tensor:
        """Resize and center-crop: float32 ``[..., height, width, channels]``, still in 0..255."""
        images = tf.convert_to_tensor(images)
        start, kept = self._without_ends(tf.shape(images)[-3:-1])
        images = _cropped(images, start, kept)
        target = self._covering_size(kept)
        images = _resized(images, target)
        top, left = tf.unstack((target - [self.height, self.width]) // 2)
        return tf.image.crop_to_bounding_box(images, top, left, self.height, self.width)

    def seen_region(self, height: int, width: int) -> Region:
        """The part of an image that ``resize`` keeps: the whole width or height, and the middle of
        the other side.

        Args:
            height: height of the image in pixels.
            width: its width in pixels.

        Example:
            >>> from transfer import Preprocess
            >>> Preprocess("unit", 32).seen_region(300, 400)
            Region(top=0.0, left=50.0, height=300.0, width=300.0)
        """
        output_size = np.array([self.height, self.width])
        start, kept = (np.asarray(values) for values in self._without_ends([height, width]))
        target = np.asarray(self._covering_size(kept))
        scale = kept / target
        top, left = start + (target - output_size) // 2 * scale
        return Region(float(top), float(left), *map(float, output_size * scale))

    def _without_ends(self, shape: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """First pixel and size, int32 ``[2]`` each, of the middle of an image: of all of it, unless
        it is very long."""
        # Bounds memory: an image one pixel high would otherwise be enlarged in both directions by a
        # factor of the output height before it is cropped.
        shape = tf.convert_to_tensor(shape, tf.int32)
        longest = _LONGEST * -(-max(self.height, self.width) // min(self.height, self.width))
        kept = tf.minimum(shape, longest * tf.reduce_min(shape))
        return (shape - kept) // 2, kept

    def _covering_size(self, shape: Any) -> tf.Tensor:
        """The smallest size, int32 ``[2]``, that covers the output and has the aspect ratio of an
        image."""
        output_size = [self.height, self.width]
        # The side with the larger scale factor fits exactly; the other one is cropped.
        covering = tf.argmax(tf.cast(output_size, tf.float64) / tf.cast(shape, tf.float64))
        side = tf.cast(tf.gather(shape, covering), tf.float64)
        length = tf.cast(tf.gather(output_size, covering), tf.float64)
        return tf.cast(tf.round(tf.cast(shape, tf.float64) * length / side), tf.int32)

    def normalize(self, images: tf.Tensor) -> tf.Tensor:
        """Apply the convention to RGB (or gray) images in 0..255, of any size."""
        meaning = convention(self.mode)
        if meaning.bgr:
            images = tf.reverse(images, [-1])  # 3 to 9 times as fast as a slice with a step of -1
        return (tf.cast(images, tf.float32) - meaning.mean) / meaning.scale


def _is_file(image: Any) -> bool:
    return isinstance(image, str | Path | Image.Image)


def _read(image: Any) -> np.ndarray:
    """uint8 RGB ``[height, width, 3]`` of an image file or of a Pillow image."""
    if isinstance(image, Image.Image):
        return from_pillow(image)
    path = Path(os.path.expanduser(image))  # that of Path refuses ~name.jpg
    try:
        return read_image(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def _cropped(images: tf.Tensor, start: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """A part of the images; the images themselves if it is all of them."""

    def part() -> tf.Tensor:
        (top, left), (height, width) = tf.unstack(start), tf.unstack(size)
        return images[..., top : top + height, left : left + width, :]

    if images.dtype != tf.uint8:
        return part()
    # Images from files may be large: they are copied only if they are cropped.
    return tf.cond(tf.reduce_any(size < tf.shape(images)[-3:-1]), part, lambda: images)


def _resized(images: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    def as_floats() -> tf.Tensor:
        return tf.image.resize(tf.cast(images, tf.float32), target, antialias=True)

    if images.dtype != tf.uint8:
        return as_floats()

    def as_bytes() -> tf.Tensor:
        """The same values, slower, but without a float32 copy of the image."""
        return tf.cast(tf.image.resize(images, target, antialias=True), tf.float32)

    return tf.cond(tf.size(images) < _LARGE, as_floats, as_bytes)


def to_channels(images: tf.Tensor, channels: int) -> tf.Tensor:
    """Convert gray, RGB or RGBA images to ``channels`` (1 or 3); alpha is dropped."""
    present = images.shape[-1]
    if present == channels:
        return images
    if present == 4:
        return to_channels(images[..., :3], channels)
    if (present, channels) == (1, 3):
        return tf.repeat(images, 3, axis=-1)
    if (present, channels) == (3, 1):
        return _gray(tf.convert_to_tensor(images))
    raise ValueError(f"images have {present} channels; expected 1 (gray), 3 (RGB) or 4 (RGBA)")


def _gray(images: tf.Tensor) -> tf.Tensor:
    if images.dtype != tf.uint8 or images.shape.rank != 3:
        return tf.image.rgb_to_grayscale(images)

    def by_strips() -> tf.Tensor:
        """Convert in strips, without a float32 copy of the whole image."""
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
