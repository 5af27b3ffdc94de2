"""The preprocessing of a KerasHub preset, from the files beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

_MAX_JSON_BYTES = 2**26


def preprocessing(weights: Path) -> dict[str, Any] | None:
    """The preprocessing in the files beside the weights of a KerasHub preset; ``None`` for other
    files.

    KerasHub's VGGs are converted from timm, so the default is ``torch``. Source: keras_hub,
    src/utils/preset_utils.py (names of files) and src/models/vgg/vgg_image_converter.py.
    """
    config = _json(weights.with_name("config.json"))
    if not str(config.get("registered_name", "")).startswith("keras_hub>VGG"):
        return None
    for name in ("image_converter.json", "preprocessor.json"):
        converter = _json(weights.with_name(name)).get("config")
        if isinstance(converter, dict) and isinstance(converter.get("image_converter"), dict):
            converter = converter["image_converter"].get("config")
        if isinstance(converter, dict) and converter.get("scale") is not None:
            try:
                scale, offset = np.broadcast_arrays(
                    np.ravel(np.asarray(converter["scale"], np.float64)),
                    np.ravel(np.asarray(converter.get("offset") or 0.0, np.float64)),
                )
            except (TypeError, ValueError):
                continue
            if scale.size in (1, 3) and np.isfinite([scale, offset]).all() and (scale > 0).all():
                return {"mean": (-offset / scale).tolist(), "std": (1 / scale).tolist()}
    return {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}


def _json(path: Path) -> dict[str, Any]:
    """A small JSON file beside the weights; empty if it does not exist or is not a JSON object."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_JSON_BYTES:
            return {}
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
