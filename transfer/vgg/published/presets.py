"""What presets of KerasHub and timm say of their weights in the files beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

KERAS_HUB_BASE, KERAS_HUB_TASK = "model.weights.h5", "task.weights.h5"
"""The weights of a preset of KerasHub: of the backbone, and of the head of a classifier."""
_HEAD = re.compile(r"layers/sequential/layers/(conv2d|dense)(?:_(\d{1,2}))?/vars/([01])")
_TORCH = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
_MAX_JSON_BYTES = 2**26


class Preset(NamedTuple):
    """``preprocess``: that of the weights, for ``Preprocess``. ``labels``: the names of the
    classes, or empty."""

    preprocess: dict[str, Any] | None = None
    labels: Sequence[str] = ()


def of_keras_hub(weights: Path) -> Preset:
    """The preset of KerasHub with these weights; empty for other files.

    Its VGGs are converted from timm, so the default is ``torch``. Source: keras_hub,
    src/utils/preset_utils.py (names of files) and src/models/vgg/vgg_image_converter.py.
    """
    config = _json(weights.with_name("config.json"))
    if not str(config.get("registered_name", "")).startswith("keras_hub>VGG"):
        return Preset()
    for name in ("image_converter.json", "preprocessor.json"):
        if preprocess := _of_converter(_json(weights.with_name(name))):
            return Preset(preprocess)
    return Preset(dict(_TORCH))


def of_keras_hub_classifier(config: bytes) -> Preset:
    """The preset of a ``VGGImageClassifier`` in the configuration of its ``.keras`` file; empty for
    other models."""
    try:
        model = json.loads(config)
    except (ValueError, RecursionError):
        return Preset()
    inner = model.get("config") if isinstance(model, dict) else None
    if not isinstance(inner, dict) or model.get("class_name") != "VGGImageClassifier":
        return Preset()
    preprocess = _of_converter(inner.get("preprocessor"))
    return Preset(preprocess or dict(_TORCH))


def with_dense_head(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a KerasHub classifier with dense layers for the convolutions of its head, whose
    7x7 kernel takes the whole feature map of an image of 224 pixels.

    Source: keras_hub, src/models/vgg/vgg_image_classifier.py.
    """
    renamed = {}
    for name, values in arrays.items():
        if match := _HEAD.fullmatch(name):
            number = int(match[2] or 0) + 100 * (match[1] == "dense")
            name = f"layers/dense_{number}/vars/{match[3]}"
            values = values.reshape(-1, values.shape[-1]) if values.ndim == 4 else values
        renamed[name] = values
    return renamed


def _of_converter(values: Any) -> dict[str, Any] | None:
    """The preprocessing of an image converter, or of the preprocessor that has it."""
    converter = values.get("config") if isinstance(values, dict) else None
    if isinstance(converter, dict) and isinstance(converter.get("image_converter"), dict):
        converter = converter["image_converter"].get("config")
    if not isinstance(converter, dict) or converter.get("scale") is None:
        return None
    channels = _of_channels(converter["scale"], converter.get("offset") or 0.0)
    if channels is None:
        return None
    scale, offset = channels
    return _normalization(-offset / scale, 1 / scale)


def of_timm(weights: Path) -> Preset:
    """The model of timm with these weights, as it is published on Hugging Face; empty for other
    files.

    Source: timm, models/_hub.py: save_for_hf, save_config_for_hf.
    """
    config = _json(weights.with_name("config.json"))
    pretrained = config.get("pretrained_cfg")
    if not str(config.get("architecture", "")).startswith("vgg") or not isinstance(
        pretrained, dict
    ):
        return Preset()
    values = _of_channels(pretrained.get("std"), pretrained.get("mean"))
    if values is None:
        return Preset()
    std, mean = 255 * values
    labels = config.get("label_names", ())
    if isinstance(labels, dict):  # by the number of the class, as a string
        labels = [labels[key] for key in sorted(labels, key=lambda key: (len(key), key))]
    is_names = isinstance(labels, list) and all(isinstance(name, str) for name in labels)
    return Preset(_normalization(mean, std), labels if is_names else ())


def _normalization(mean: np.ndarray, std: np.ndarray) -> dict[str, Any]:
    """Rounded, so that 255 * 0.485 is 123.675."""
    return {"mean": np.round(mean, 6).tolist(), "std": np.round(std, 6).tolist()}


def _of_channels(scale: Any, offset: Any) -> np.ndarray | None:
    """Two numbers, or two lists of one per channel, as float64 ``[2]`` or ``[2, 3]`` of which the
    first is positive; ``None`` for other values."""
    try:
        values = np.array(np.broadcast_arrays(np.ravel(scale), np.ravel(offset)), np.float64)
    except (TypeError, ValueError):
        return None
    is_valid = values.shape[1:] in ((1,), (3,)) and np.isfinite(values).all()
    return values if is_valid and (values[0] > 0).all() else None


def _json(path: Path) -> dict[str, Any]:
    """A small JSON file beside the weights; empty if it does not exist or is not a JSON object."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_JSON_BYTES:
            return {}
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
