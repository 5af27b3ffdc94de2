"""Operations on the images in a Keras model's configuration, such as ``preprocess_input(images)``.

Functional models record arithmetic on tensors as layers: Keras 3 as ``GetItem``, ``Flip`` or
``Add``, TensorFlow's Keras 2 as ``SlicingOpLambda`` and ``TFOpLambda``. Those that reverse the
channels become ``ReverseChannels``, those with a constant ``Rescaling``; the others stay as they
are, and are refused by name like every unknown layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_MAX_DEPTH, _MAX_VALUES = 8, 1000
# Operation of each class in Keras 3 and each function in Keras 2.
_ARITHMETIC = {
    "Add": "+",
    "Subtract": "-",
    "Multiply": "*",
    "Divide": "/",
    "TrueDivide": "/",
    "math.add": "+",
    "__operators__.add": "+",
    "nn.bias_add": "+",
    "math.subtract": "-",
    "math.multiply": "*",
    "math.truediv": "/",
    "math.divide": "/",
}


def simplified(model: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """A copy of a model's configuration with these operations as layers."""
    config = model.get("config")
    entries = config.get("layers") if isinstance(config, dict) else config
    if depth > _MAX_DEPTH or not isinstance(entries, list):
        return dict(model)
    layers = [
        _layer(simplified(entry, depth + 1)) if isinstance(entry, dict) else entry
        for entry in entries
    ]
    layers = _with_reversals(layers)
    return {**model, "config": {**config, "layers": layers} if isinstance(config, dict) else layers}


def _layer(entry: dict[str, Any]) -> dict[str, Any]:
    config = entry.get("config")
    if not isinstance(config, dict) or isinstance(config.get("layers"), list):
        return entry
    kind, arguments = str(entry.get("class_name")), _arguments(entry.get("inbound_nodes"))
    if arguments is None:
        return entry
    positional, named = arguments
    if kind == "SlicingOpLambda" and _is_reversal(named.get("slice_spec")):
        return {**entry, "class_name": "ReverseChannels"}
    if kind == "GetItem" and len(positional) == 2 and _is_reversal(positional[1]):
        return {**entry, "class_name": "ReverseChannels"}
    if kind == "Flip" and len(positional) == 1 and config.get("axis") in (-1, 3):
        return {**entry, "class_name": "ReverseChannels"}
    operation = _ARITHMETIC.get(str(config.get("function")) if kind == "TFOpLambda" else kind)
    constants = [*positional[1:], *(named[key] for key in ("y", "bias", "x2") if key in named)]
    if operation is None or len(constants) != 1:
        return entry
    value = _constant(constants[0])
    if value is None:
        return entry
    with np.errstate(divide="ignore"):
        scale, offset = {
            "+": (np.ones_like(value), value),
            "-": (np.ones_like(value), -value),
            "*": (value, np.zeros_like(value)),
            "/": (1 / value, np.zeros_like(value)),
        }[operation]
    settings = {"name": config.get("name"), "scale": scale.tolist(), "offset": offset.tolist()}
    return {**entry, "class_name": "Rescaling", "config": settings}


def _arguments(nodes: Any) -> tuple[list[Any], dict[str, Any]] | None:
    """Positional and named arguments of a layer that is called once, the first of which is a
    tensor; otherwise ``None``."""
    if not isinstance(nodes, list) or len(nodes) != 1:
        return None
    node = nodes[0]
    if isinstance(node, dict):  # Keras 3
        positional, named = node.get("args"), node.get("kwargs")
        if isinstance(positional, list) and positional and isinstance(named, dict):
            return (positional, named) if _source(positional[0]) else None
        return None
    if isinstance(node, list) and len(node) == 1 and isinstance(node[0], list):
        node = node[0]
    if isinstance(node, list) and len(node) == 4 and isinstance(node[3], dict):
        return [node[:3]], node[3]
    return None


def _source(tensor: Any) -> str:
    """Name of the layer whose output a tensor of Keras 3 is; empty for other values."""
    config = tensor.get("config") if isinstance(tensor, dict) else None
    history = config.get("keras_history") if isinstance(config, dict) else None
    return str(history[0]) if isinstance(history, list) and history else ""


def _is_reversal(slices: Any) -> bool:
    """Whether an index is ``[..., ::-1]``, or the same with all axes."""
    if not isinstance(slices, list) or len(slices) not in (2, 4):
        return False
    *others, last = (_slice(entry) for entry in slices)
    is_whole = all(entry in ("...", (None, None, None)) for entry in others)
    return is_whole and last == (None, None, -1) and ("..." in others or len(slices) == 4)


def _slice(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    if entry.get("class_name") == "__ellipsis__":
        return "..."
    parts = entry.get("config", entry)
    if isinstance(parts, dict):
        return tuple(parts.get(key) for key in ("start", "stop", "step"))
    return entry


def _constant(value: Any) -> np.ndarray | None:
    """One number, or one per channel; ``None`` for anything else."""
    if isinstance(value, dict) and value.get("class_name") in ("__tensor__", "__numpy__"):
        config = value.get("config")
        value = config.get("value") if isinstance(config, dict) else None
    try:
        numbers = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        return None
    is_last = numbers.size == 1 or (numbers.size == 3 and numbers.shape[-1] == 3)
    return numbers.ravel() if is_last and np.isfinite(numbers).all() else None


def _with_reversals(layers: Sequence[Any]) -> list[Any]:
    """Replace ``stack([images[..., 2], images[..., 1], images[..., 0]], -1)``, by which Keras 3
    reverses channels, by one layer."""
    items: dict[str, tuple[str, Any, Any]] = {}
    for entry in layers:
        if isinstance(entry, dict) and entry.get("class_name") == "GetItem":
            positional, _ = _arguments(entry.get("inbound_nodes")) or ([], {})
            index = positional[1] if len(positional) == 2 else None
            if isinstance(index, list) and len(index) == 2 and _slice(index[0]) == "...":
                items[str(entry.get("name"))] = _source(positional[0]), index[1], positional[0]
    result, gone = list(layers), set[str]()
    for number, entry in enumerate(layers):
        if not items or not isinstance(entry, dict) or entry.get("class_name") != "Stack":
            continue
        nodes, config = entry.get("inbound_nodes"), entry.get("config")
        node = nodes[0] if isinstance(nodes, list) and len(nodes) == 1 else None
        arguments = node.get("args") if isinstance(node, dict) else None
        tensors = arguments[0] if isinstance(arguments, list) and arguments else None
        if not isinstance(tensors, list) or not isinstance(config, dict):
            continue
        names = [_source(tensor) for tensor in tensors]
        found = [items[name] for name in names if name in items]
        is_reversed = [index for _, index, _ in found] == [2, 1, 0] and len(names) == 3
        if is_reversed and config.get("axis") in (-1, 3) and len({one[0] for one in found}) == 1:
            inbound = [{"args": [found[0][2]], "kwargs": {}}]
            result[number] = {**entry, "class_name": "ReverseChannels", "inbound_nodes": inbound}
            gone.update(names)
    return [e for e in result if not (isinstance(e, dict) and str(e.get("name")) in gone)]
