"""Images as scikit-learn passes them: arrays, file paths, or rows of pixels."""

from __future__ import annotations

import functools
import hashlib
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from transfer.core import measurement
from transfer.data.dataset import Source
from transfer.data.labelled_files import digest, state_of
from transfer.images import image_files
from transfer.images.decoding import from_pillow, read_image
from transfer.images.pixel_range import check_range


class ImageArrays(Sequence[np.ndarray]):
    """A sequence of images, read one at a time.

    Args:
        images: one of: an array ``[num_images, height, width]`` or ``[num_images, height, width,
            channels]``; a sequence of such arrays without the first dimension, of any sizes, or of
            Pillow images; a sequence of paths, or a table with one column of them; rows of pixels,
            ``[num_images, height * width * channels]``.
        image_shape: for rows of pixels: height, width and channels; one of them may be -1, as in
            ``numpy.reshape``.
        scale: factor of the pixels of arrays that makes them 0 to 255.

    Each image is uint8 or float32 ``[height, width, channels]`` in 0..255, RGB, RGBA or gray. If
    the pixels of arrays are at most 1, a warning says so.

    Raises:
        ValueError: if the images are of none of these forms, or their pixels are not finite, are
            far above 255, or booleans without a scale.
    """

    def __init__(
        self, images: Any, image_shape: Sequence[int] | None = None, scale: float = 1.0
    ) -> None:
        self._images, self._scale = _checked(images, image_shape), scale
        is_array = isinstance(self._images, np.ndarray)
        arrays = [image for image in self._images if isinstance(image, np.ndarray)]
        for image in arrays[:1] if is_array else arrays:
            _check_form(image)
        check_range([self._images] if is_array else arrays, scale)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:
        image = self._images[index]
        if isinstance(image, str | os.PathLike):
            try:
                return read_image(self._file(image))
            except ValueError as error:
                raise ValueError(f"{str(image)!r}: {error}") from error
        if isinstance(image, Image.Image):
            return from_pillow(image)
        image = np.asarray(image)
        image = image[..., None] if image.ndim == 2 else image
        if image.dtype == np.uint8 and self._scale == 1:
            return image
        image = (image * np.float32(self._scale)).astype(np.float32)
        if not np.isfinite(image).all():
            raise ValueError("images contain NaN or infinity; expected numbers from 0 to 255")
        return image

    def pixels(self, index: int) -> np.ndarray:
        """An image as uint8, its pixels rounded to whole numbers 0 to 255."""
        image = self[index]
        return image if image.dtype == np.uint8 else np.clip(np.rint(image), 0, 255).astype("u1")

    @staticmethod
    def _file(path: str | os.PathLike[str]) -> bytes:
        return image_files.read(_path(path))

    def digest(self, index: int) -> bytes:
        """16 bytes that identify the content of an image, or its file without reading it."""
        image = self._images[index]
        if isinstance(image, str | os.PathLike):
            path = _path(image).resolve()
            return digest(str(path), *state_of(path))
        pixels = np.ascontiguousarray(self[index])
        return digest(pixels.shape, pixels.dtype.str, hashlib.sha256(pixels.tobytes()).digest())

    def encoded(self, index: int) -> bytes:
        """The file, or the pixels as PNG, rounded to whole numbers 0 to 255."""
        image = self._images[index]
        if isinstance(image, str | os.PathLike):
            return self._file(image)
        pixels = self.pixels(index)
        data = io.BytesIO()
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(data, "PNG")
        return data.getvalue()


def _path(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(path))  # that of Path refuses ~name.jpg


def _checked(images: Any, image_shape: Sequence[int] | None) -> Any:
    """The images as an array with one more dimension, or as a list of images or paths."""
    if len(getattr(images, "shape", ())) == 2:  # perhaps of pandas, which iterates over columns
        images = np.asarray(images)
        if images.shape[1:] == (1,) and images.dtype.kind in "USO":
            images = images[:, 0]
    is_array = isinstance(images, np.ndarray)
    is_text = is_array and images.ndim == 1 and images.dtype.kind in "US"
    if is_text or ((not is_array or images.dtype == object) and _are_paths_or_images(images)):
        # By position: a pandas Series has labels.
        return [os.fsdecode(image) if isinstance(image, bytes) else image for image in images]
    images = np.asarray(images)
    if images.ndim == 2 and image_shape is not None:
        count = math.prod(side for side in image_shape if side != -1)
        if images.shape[1] % count or len(image_shape) != 3:
            raise ValueError(
                f"rows have {images.shape[1]} values; expected image_shape={tuple(image_shape)} to "
                "be height, width and channels with this product"
            )
        images = images.reshape(len(images), *image_shape)
    is_one = images.ndim == 3 and images.shape[-1] in (3, 4)
    if images.ndim not in (3, 4) or is_one:
        hint = "; for one image, give images[None]" if is_one else ""
        raise ValueError(
            f"images have shape {images.shape}; expected [num_images, height, width, channels], "
            "a list of images or of paths, or rows of pixels with image_shape=(height, width, "
            f"channels){hint}"
        )
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise ValueError("images contain NaN or infinity; expected numbers from 0 to 255")
    return images


def _check_form(image: np.ndarray) -> None:
    """Check the dtype and the channels of one image."""
    if image.dtype.kind not in "buif":
        raise ValueError(f"images have dtype {image.dtype}; expected numbers")
    if image.ndim == 3 and image.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"images have shape [height, width, channels] = {list(image.shape)}; expected 1 (gray),"
            " 3 (RGB) or 4 (RGBA) channels, which come last"
        )


def _are_paths_or_images(images: Any) -> bool:
    """Whether each element is a path, or each is an image with height and width."""
    if isinstance(images, str | bytes) or not hasattr(images, "__len__") or not len(images):
        return False
    if all(isinstance(image, str | bytes | os.PathLike) for image in images):
        return True
    return all(
        isinstance(image, Image.Image) or (isinstance(image, np.ndarray) and image.ndim in (2, 3))
        for image in images
    )


def source_of_arrays(
    images: ImageArrays, labels: np.ndarray, class_names: Sequence[str], name: str
) -> Source:
    """A source with the single split ``train``.

    Args:
        images: the images.
        labels: int64 ``[len(images)]``, positions in ``class_names``.
        class_names: one name per class.
        name: name of the source.
    """

    def examples(_: str, positions: np.ndarray) -> tf.data.Dataset:
        def read(position: np.ndarray) -> bytes:
            return images.encoded(int(position))

        return tf.data.Dataset.from_tensor_slices(positions).map(
            lambda position: {
                "image": tf.ensure_shape(tf.numpy_function(read, [position], tf.string), []),
                "label": tf.gather(tf.constant(labels, tf.int64), position),
                "name": tf.strings.join(["train", tf.strings.as_string(position)], "/"),
            },
            num_parallel_calls=measurement.num_cpus(),
        )

    @functools.cache
    def ids(_: str) -> np.ndarray:
        return np.array([images.digest(index) for index in range(len(images))], "S16")

    return Source(
        name,
        list(class_names),
        {"train": len(images)},
        examples,
        labels=lambda _: labels,
        names=lambda _: [f"train/{index}" for index in range(len(images))],
        ids=ids,
    )
