"""Grad-CAM: heat maps of the region that explains a prediction (arXiv 1610.02391, equations 1 and
2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

from transfer.core.files import replacing
from transfer.graph.cuts import last_feature_maps
from transfer.layers.classifier import Classifier

_COLOUR = np.array([255.0, 40.0, 0.0])
_STRONGEST = 0.6  # maximum opacity of that colour


def grad_cam(classifier: Classifier) -> Callable[[Any, Any], np.ndarray]:
    """Returns a function that maps images and classes to Grad-CAM heat maps.

    It takes preprocessed images, float32 ``[batch, size, size, channels]``, and the indices of the
    classes to explain, int ``[batch]``. It returns float32 ``[batch, rows, columns]``, 0 to 1, one
    value per position of the last feature maps before the tap; all zeros if no region supports the
    class.

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

    size = classifier.preprocess.size
    images_spec = tf.TensorSpec([None, size, size, classifier.preprocess.channels], tf.float32)
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


def overlay(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A gray image with its heat map overlaid in red.

    Args:
        pixels: 0..255 ``[size, size, channels]``, resized for the network (``preprocess.resize``).
        heat: 0 to 1 ``[rows, columns]``.

    Returns:
        uint8 ``[size, size, 3]``.
    """
    size = pixels.shape[:2]
    strength = tf.image.resize(heat[..., None], size, "bicubic").numpy().clip(0, 1) * _STRONGEST
    gray = np.broadcast_to(pixels.mean(-1, keepdims=True), (*size, 3))
    return (gray * (1 - strength) + _COLOUR * strength).round().astype(np.uint8)


class Explainer:
    """Writes a PNG of each image with the region in red that explains the predicted class.

    Args:
        classifier: the classifier to explain.
        folder: folder for the PNGs, created if missing. They are named by the number of the image,
            from 1, and its name.

    Raises:
        ValueError: if the network has no feature maps.
    """

    def __init__(self, classifier: Classifier, folder: Path):
        self._normalize = classifier.preprocess.normalize
        self._grad_cam = grad_cam(classifier)
        self._folder = folder
        self._count = 0
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, names: Sequence[str], pixels: tf.Tensor, classes: np.ndarray) -> None:
        """Write the next images.

        Args:
            names: names of the image files.
            pixels: float32 ``[batch, size, size, channels]`` in 0..255, from ``preprocess.resize``.
            classes: predicted classes, int ``[batch]``.
        """
        heats = self._grad_cam(self._normalize(pixels), classes)
        for name, image, heat in zip(names, pixels.numpy(), heats, strict=True):
            self._count += 1
            path = self._folder / f"{self._count:06d}-{Path(name).stem}.png"
            with replacing(path) as temporary:
                Image.fromarray(overlay(image, heat)).save(temporary, "PNG")
