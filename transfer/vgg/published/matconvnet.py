"""Read MatConvNet's networks: their arrays, mean image and class names."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from transfer.vgg.published import limits, matlab


class MatConvNet(NamedTuple):
    """``arrays``: ``<layer>/0`` and ``<layer>/1``; in older files ``<layer>/filters``,
    ``<layer>/biases``."""

    arrays: dict[str, np.ndarray]
    preprocess: dict[str, Any] | None
    labels: list[str]


def read(data: memoryview) -> MatConvNet:
    """Read a MATLAB file of version 5 with a network.

    Raises:
        ValueError: if it is damaged, or has layers that no VGG has.
    """
    variables = matlab.variables(data, limits.MAX_BYTES)
    roots = [root for root in (variables.get("net"), variables) if isinstance(root, dict)]
    layers: Any = next((root["layers"] for root in roots if "layers" in root), [])
    arrays: dict[str, np.ndarray] = {}
    for layer in layers if isinstance(layers, list) else [layers]:
        if not isinstance(layer, dict):
            continue
        name = str(layer.get("name"))
        _check_kind(name, layer)
        parts = {key: layer[key] for key in ("filters", "biases") if key in layer}
        if isinstance(weights := layer.get("weights"), list):
            parts |= {str(number): values for number, values in enumerate(weights)}
        for part, values in parts.items():
            if isinstance(values, np.ndarray):
                arrays[f"{name}/{part}"] = _squeezed(values)
    metas = [meta for root in roots for meta in (root.get("meta"), root) if isinstance(meta, dict)]
    preprocess = next((p for meta in metas if (p := _mean_image(meta))), None)
    classes = [meta["classes"] for meta in metas if isinstance(meta.get("classes"), dict)]
    labels = classes[0].get("description") if classes else None
    names = [name for name in labels if isinstance(name, str)] if isinstance(labels, list) else []
    return MatConvNet(arrays, preprocess, names)


def _check_kind(name: str, layer: dict[str, Any]) -> None:
    """Refuse layer types that no VGG has: layers without arrays also change the result."""
    kind, method = layer.get("type", "conv"), layer.get("method", "max")
    known = ("conv", "relu", "pool", "dropout", "softmax", "softmaxloss", "custom")
    if kind not in known or (kind == "pool" and method != "max"):
        raise ValueError(f"its layer {name} is of type {kind} ({method}), which no VGG has")


def _squeezed(values: np.ndarray) -> np.ndarray:
    """MATLAB's arrays have at least two dimensions: biases are ``[1, outputs]``. Kernels keep
    height and width, also for 1x1."""
    return values if values.ndim > 2 else np.atleast_1d(values.squeeze())


def _mean_image(meta: dict[str, Any]) -> dict[str, Any] | None:
    """The mean that is subtracted from RGB images, per channel; a mean image is averaged."""
    normalization = meta.get("normalization")
    mean = normalization.get("averageImage") if isinstance(normalization, dict) else None
    if not isinstance(mean, np.ndarray) or mean.size % 3 or not mean.size:
        return None
    channels = mean.reshape(-1, 3, order="F") if mean.shape[-1] == 3 else mean.reshape(-1, 3)
    return {"mean": [round(float(value), 6) for value in channels.mean(0, dtype=np.float64)]}
