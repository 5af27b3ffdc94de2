"""A classifier that answers requests: images of strangers to probabilities and heat maps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import PIL.Image
import tensorflow as tf

from transfer.activations.extraction import Compiled
from transfer.evaluation.explain import as_jpeg, grad_cam, overlay
from transfer.evaluation.file_predictions import prepare_images, reason
from transfer.images.decoding import read_tensor
from transfer.layers.classifier import Classifier

Image: TypeAlias = bytes | np.ndarray
"""An encoded image file; or pixels, uint8 RGB ``[height, width, 3]``."""

_READERS = 4  # threads; decoding releases the GIL


class BadImageError(ValueError):
    """An image cannot be decoded, or is too large; the message says why."""


class ServedModel:
    """A classifier that answers requests.

    Args:
        classifier: the classifier.
        max_pixels: larger images are refused before they are decoded.

    Example:
        >>> import numpy as np
        >>> from transfer import Backbone, Classifier, Head, Preprocess
        >>> from transfer.serving.served_model import ServedModel
        >>> backbone = Backbone("pretrained/vgg_small")
        >>> classifier = Classifier(backbone, Head(2), Preprocess("torch", 64), ["cat", "dog"])
        >>> model = ServedModel(classifier)
        >>> good, bad = model.probabilities([np.zeros((120, 90, 3), np.uint8), b"no image"])
        >>> good.shape, str(bad)
        ((2,), "it is not an image: it begins with b'no image'")
    """

    def __init__(self, classifier: Classifier, max_pixels: int = 50_000_000):
        self.labels = classifier.labels
        self.max_pixels = max_pixels
        self._preprocess = classifier.preprocess
        self._classifier = classifier
        self._prepare = prepare_images(classifier.preprocess)
        self._network = Compiled(classifier.probabilities_of_resized)
        self._readers = ThreadPoolExecutor(_READERS, "images")

    def probabilities(self, images: Sequence[Image]) -> list[np.ndarray | BadImageError]:
        """Probabilities of all classes, float32 ``[num_classes]``, for each image; the error of
        each image that cannot be read."""
        prepared = list(self._readers.map(self._resized, images))
        readable = [image for image in prepared if not isinstance(image, BadImageError)]
        rows = iter(np.asarray(self._network(tf.stack(readable))) if readable else ())
        return [image if isinstance(image, BadImageError) else next(rows) for image in prepared]

    @property
    def can_explain(self) -> bool:
        """Whether the network has feature maps, for ``overlay``."""
        return self._grad_cam is not None

    def overlay(self, data: bytes, index: int) -> bytes:
        """The Grad-CAM heat map of a class over the photo at its own resolution, as a JPEG.

        Raises:
            BadImageError: if the image cannot be read.
            ValueError: if the network has no feature maps.
        """
        if self._grad_cam is None:
            raise ValueError("the network has no feature maps; it cannot be explained")
        photo = self._read(data)
        pixels = self._prepare(photo)[None]
        (heat,) = self._grad_cam(self._preprocess.normalize(pixels), np.array([index]))
        seen = self._preprocess.seen_region(*photo.shape[:2])
        return as_jpeg(overlay(np.asarray(photo), heat, seen))

    def photo(self, data: bytes) -> bytes:
        """An image of any format as a JPEG, which every browser shows.

        Raises:
            BadImageError: if the image cannot be read.
        """
        return as_jpeg(PIL.Image.fromarray(np.asarray(self._read(data))))

    @functools.cached_property
    def _grad_cam(self) -> Callable[..., np.ndarray] | None:
        try:
            return grad_cam(self._classifier)
        except ValueError:  # no feature maps
            return None

    def _read(self, data: bytes) -> tf.Tensor:
        try:
            return read_tensor(data, self.max_pixels)
        except Exception as error:  # decoders of damaged files may raise anything
            raise BadImageError(reason(error)) from error

    def _resized(self, image: Image) -> tf.Tensor | BadImageError:
        try:
            return self._prepare(self._read(image) if isinstance(image, bytes) else image)
        except BadImageError as error:
            return error
