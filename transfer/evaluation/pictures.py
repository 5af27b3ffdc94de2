"""Pictures of images as base64, for a page that needs no other files."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from transfer.core.escapes import printable
from transfer.data.dataset import Split
from transfer.evaluation.explain import grad_cam, overlay
from transfer.images.decoding import decode
from transfer.images.preprocess import to_channels
from transfer.layers.classifier import Classifier

_SIDES = (480, 320, 224, 160)  # maximum width and height; the first that is not too large
_MAX_BYTES = 40_000  # of a JPEG with one of these sizes but the last
_EXPLAINED_AT_A_TIME = 12


@dataclass(frozen=True)
class Picture:
    """A photo, and the same overlaid with its Grad-CAM heat map, as JPEG in base64. ``heat`` is
    ``None`` if it was not asked for, or if the network has no feature maps."""

    name: str
    jpeg: str
    heat: str | None


def read_pictures(
    classifier: Classifier, split: Split, positions: np.ndarray, explained: Mapping[int, int]
) -> dict[int, Picture]:
    """Read images at some positions of a split, and no others.

    Args:
        classifier: resizes and explains the images.
        split: the images.
        positions: int ``[n]``; a position may occur several times.
        explained: maps the positions of images with a heat map to the class to explain.

    Returns:
        A picture for each position.
    """
    positions = np.unique(positions)
    preprocess, names, photos, resized = classifier.preprocess, [], {}, {}
    for index, example in zip(positions.tolist(), split.examples(positions), strict=True):
        pixels = np.asarray(decode(example["image"]))
        names.append(printable(os.fsdecode(example["name"].numpy())))
        photos[index] = _thumbnail(pixels)
        if index in explained:
            resized[index] = np.asarray(preprocess.resize(to_channels(pixels, preprocess.channels)))
    heats = _heats(classifier, resized, explained)
    return {
        index: Picture(
            name,
            _jpeg(Image.fromarray(photo)),
            _jpeg(overlay(photo, heats[index], preprocess.seen_region(*photo.shape[:2])))
            if index in heats
            else None,
        )
        for name, (index, photo) in zip(names, photos.items(), strict=True)
    }


def _heats(
    classifier: Classifier, pixels: Mapping[int, np.ndarray], classes: Mapping[int, int]
) -> dict[int, np.ndarray]:
    """Heat maps by position; empty if the network has no feature maps."""
    if not pixels:
        return {}
    try:
        explain = grad_cam(classifier)
    except ValueError:
        return {}
    heats: dict[int, np.ndarray] = {}
    positions = list(pixels)
    for start in range(0, len(positions), _EXPLAINED_AT_A_TIME):
        some = positions[start : start + _EXPLAINED_AT_A_TIME]
        images = classifier.preprocess.normalize(np.stack([pixels[index] for index in some]))
        found = explain(images, np.array([classes[index] for index in some]))
        heats |= dict(zip(some, found, strict=True))
    return heats


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    """uint8 ``[height, width, 3]``, not larger than ``_SIDES`` allow."""
    image = Image.fromarray(pixels)
    image.thumbnail((_SIDES[0], _SIDES[0]))
    return np.asarray(image)


def _jpeg(image: Image.Image) -> str:
    """A JPEG of bounded size, as base64."""
    for side in _SIDES:
        image.thumbnail((side, side))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=85)
        if data.tell() <= _MAX_BYTES:
            break
    return base64.b64encode(data.getvalue()).decode()
