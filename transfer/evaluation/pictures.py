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

_PIXELS = 160  # maximum width and height
_EXPLAINED_AT_A_TIME = 12


@dataclass(frozen=True)
class Picture:
    """An image as resized for the network, and overlaid with its Grad-CAM heat map, as JPEG in
    base64. ``heat`` is ``None`` if it was not asked for, or if the network has no feature maps."""

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
    preprocess, names, resized = classifier.preprocess, [], []
    for example in split.examples(positions):
        image = to_channels(decode(example["image"]), preprocess.channels)
        resized.append(np.asarray(preprocess.resize(image)))
        names.append(printable(os.fsdecode(example["name"].numpy())))
    pixels = dict(zip(positions.tolist(), resized, strict=True))
    heats = _heats(classifier, {index: pixels[index] for index in explained}, explained)
    return {
        index: Picture(name, _jpeg(image.round().clip(0, 255).astype(np.uint8)), heats.get(index))
        for name, (index, image) in zip(names, pixels.items(), strict=True)
    }


def _heats(
    classifier: Classifier, pixels: Mapping[int, np.ndarray], classes: Mapping[int, int]
) -> dict[int, str]:
    """Overlaid heat maps by position; empty if the network has no feature maps."""
    if not pixels:
        return {}
    try:
        explain = grad_cam(classifier)
    except ValueError:
        return {}
    heats, positions = {}, list(pixels)
    for start in range(0, len(positions), _EXPLAINED_AT_A_TIME):
        some = positions[start : start + _EXPLAINED_AT_A_TIME]
        images = classifier.preprocess.normalize(np.stack([pixels[index] for index in some]))
        found = explain(images, np.array([classes[index] for index in some]))
        for index, heat in zip(some, found, strict=True):
            heats[index] = _jpeg(overlay(pixels[index], heat))
    return heats


def _jpeg(pixels: np.ndarray) -> str:
    """uint8 ``[height, width, channels]`` as base64."""
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((_PIXELS, _PIXELS))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return base64.b64encode(data.getvalue()).decode()
