"""Grad-CAM: heat maps of the region that explains a prediction (arXiv 1610.02391, equations 1 and
2)."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

from transfer.core.escapes import printable
from transfer.core.files import write_bytes
from transfer.graph.cuts import last_feature_maps
from transfer.images import image_files
from transfer.images.decoding import read_image
from transfer.images.preprocess import Region
from transfer.layers.classifier import Classifier

_COLOUR = (255, 40, 0)
_STRONGEST = 0.6  # maximum opacity of that colour
_UNSEEN = 0.4  # brightness of what the network does not see
_LONGEST = 65_500  # longest side of a JPEG in pixels
_LONGEST_STEM = 200  # bytes; file systems allow names of 255


def grad_cam(classifier: Classifier) -> Callable[[Any, Any], np.ndarray]:
    """Returns a function that maps images and classes to Grad-CAM heat maps.

    It takes preprocessed images, float32 ``[batch, height, width, channels]``, and the indices of
    the classes to explain, int ``[batch]``. It returns float32 ``[batch, rows, columns]``, 0 to 1,
    one value per position of the last feature maps before the tap; all zeros if no region supports
    the class.

    Raises:
        ValueError: if the network has no feature maps with a height and a width.
    """
    backbone = classifier.feature_extractor
    tensor = last_feature_maps(backbone.network, classifier.preprocess.size)
    if tensor is None:
        raise ValueError(
            "the network has no feature maps with a height and a width; no part of the image can "
            "be shown as the reason of a prediction"
        )
    prefix, suffix = backbone.split(tensor)
    rest = keras.Sequential([suffix, classifier.head])

    images_spec = tf.TensorSpec([None, *classifier.preprocess.shape], tf.float32)
    signature = [images_spec, tf.TensorSpec([None], tf.int64)]

    @tf.function(autograph=False, input_signature=signature)
    def explain(images: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
        maps = prefix(images)
        with tf.GradientTape() as tape:
            tape.watch(maps)
            logits = tf.gather(rest(maps), classes, batch_dims=1)
        gradients = tape.gradient(logits, maps)
        weights = tf.reduce_mean(gradients, axis=[1, 2], keepdims=True)
        heat = tf.nn.relu(tf.reduce_sum(weights * maps, axis=-1))
        return tf.math.divide_no_nan(heat, tf.reduce_max(heat, axis=[1, 2], keepdims=True))

    def run(images: Any, classes: Any) -> np.ndarray:
        images = tf.convert_to_tensor(images, tf.float32)
        if not images.shape.is_compatible_with(images_spec.shape):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected {tuple(images_spec.shape)}: a "
                "batch of preprocessed images"
            )
        return explain(images, tf.cast(classes, tf.int64)).numpy()

    return run


def overlay(photo: np.ndarray, heat: np.ndarray, seen: Region) -> Image.Image:
    """A photo in gray with its heat map overlaid in red, at the resolution of the photo. What lies
    outside of the region that the network sees is darker.

    Args:
        photo: uint8 ``[height, width, channels]``, RGB or gray.
        heat: 0 to 1 ``[rows, columns]``.
        seen: the region of the photo that the heat map covers, ``preprocess.seen_region(height,
            width)``.
    """
    top, left = round(seen.top), round(seen.left)
    bottom = max(top + 1, round(seen.top + seen.height))
    right = max(left + 1, round(seen.left + seen.width))
    # By Pillow and in bytes, since photos may be large.
    image = Image.fromarray(photo.squeeze(-1) if photo.shape[-1] == 1 else photo).convert("L")
    strength = Image.fromarray((heat * 255 * _STRONGEST).round().astype(np.uint8))
    strength = strength.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    gray = image.point(lambda value: value * _UNSEEN)
    gray.paste(image.crop((left, top, right, bottom)), (left, top))
    mask = Image.new("L", image.size)
    mask.paste(strength, (left, top))
    return Image.composite(Image.new("RGB", image.size, _COLOUR), gray.convert("RGB"), mask)


def as_jpeg(image: Image.Image) -> bytes:
    """A JPEG of an image, at its own resolution if the format allows."""
    image.thumbnail((_LONGEST, _LONGEST))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=90)
    return data.getvalue()


class Explainer:
    """Writes each image with the region in red that explains the predicted class, as a JPEG.

    Args:
        classifier: the classifier to explain.
        folder: folder for the JPEGs, created if missing. They are named by the number of the image,
            from 1, and its name.

    Raises:
        ValueError: if the network has no feature maps.
    """

    def __init__(self, classifier: Classifier, folder: Path):
        self._preprocess = classifier.preprocess
        self._grad_cam = grad_cam(classifier)
        self._folder = folder
        self._count = 0
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, paths: Sequence[Path], pixels: tf.Tensor, classes: np.ndarray) -> None:
        """Write the next images.

        Args:
            paths: the image files. They are decoded again, one at a time: a batch of photos at
                their own resolution may not fit into memory.
            pixels: float32 ``[batch, height, width, channels]`` in 0..255, from
                ``preprocess.resize``.
            classes: predicted classes, int ``[batch]``.
        """
        heats = self._grad_cam(self._preprocess.normalize(pixels), classes)
        for path, heat in zip(paths, heats, strict=True):
            self._count += 1
            photo = read_image(image_files.read(path))
            image = overlay(photo, heat, self._preprocess.seen_region(*photo.shape[:2]))
            stem = Path(printable(path)).stem.encode()[:_LONGEST_STEM].decode(errors="ignore")
            write_bytes(self._folder / f"{self._count:06d}-{stem}.jpg", as_jpeg(image))
