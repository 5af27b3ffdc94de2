"""Read the configuration of a Keras model: its layers in order, with their arrays.

Weights alone do not distinguish ``Conv2D -> BatchNormalization -> ReLU`` from ``Conv2D -> ReLU ->
BatchNormalization``, nor flattening from global average pooling. The configuration that
``model.save`` writes does. It is read as data, without instantiating any class.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from transfer.vgg.published import keras_operations

_MAX_LAYERS, _MAX_DEPTH = 2000, 8
_ROLE = re.compile(
    r"(?:^|.*[_/])(kernel|bias|gamma|beta|moving_mean|moving_variance|W|b)(?:_\d+)?(?::\d+)?"
)
_ROLES = {"W": "kernel", "b": "bias"}
Naming: TypeAlias = Literal["paths", "classes", "layers"]


@dataclass(frozen=True)
class Layer:
    """``kind``: class name. ``arrays``: values by role (kernel, bias, gamma, beta, moving_mean,
    moving_variance, or a number)."""

    name: str
    kind: str
    config: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """``layers``: a chain that begins with the images, each layer's input being the output of the
    previous one. ``branches``: the layers after the first fork. ``others``: names of arrays that
    belong to no layer."""

    layers: Sequence[Layer]
    branches: Sequence[Layer]
    others: Sequence[str]


def read(config: str | bytes, arrays: Mapping[str, np.ndarray], *, naming: Naming) -> Model | None:
    """The layers of a model; ``None`` if the configuration does not list them, as for a subclassed
    model.

    Args:
        config: configuration in JSON.
        arrays: values by their names in the file.
        naming: how the arrays are named: in ``.h5`` files after the ``paths`` of their layers, in
            ``.keras`` files after their ``classes``, and in SavedModels after the ``layers`` alone.

    Raises:
        ValueError: if the configuration is damaged.
    """
    try:
        model = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its configuration is damaged: {error}") from error
    if not _is_model(model):
        return None
    model = keras_operations.simplified(model)
    by = {"paths": _by_path, "classes": _by_class, "layers": _by_layer}[naming]
    owned = by(model, arrays)
    layers, branches = _chain(model, owned, 0)
    taken = {id(values) for layer in (*layers, *branches) for values in layer.arrays.values()}
    others = [name for name, values in arrays.items() if id(values) not in taken]
    return Model(layers, branches, others)


def _is_model(entry: Any) -> bool:
    return isinstance(entry, dict) and bool(_entries(entry))


def _entries(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The layer entries in a model's configuration."""
    config = model.get("config")
    layers = config.get("layers") if isinstance(config, dict) else config
    if not isinstance(layers, list):
        return []
    if len(layers) > _MAX_LAYERS:
        raise ValueError(f"its model has {len(layers):,} layers; expected at most {_MAX_LAYERS:,}")
    return [
        entry
        for entry in layers
        if isinstance(entry, dict) and isinstance(entry.get("config"), dict | list)
    ]


def _name(entry: Mapping[str, Any]) -> str:
    config = entry["config"]
    name = config.get("name") if isinstance(config, dict) else None
    return str(name or entry.get("name") or "")


def _kind(entry: Mapping[str, Any]) -> str:
    return str(entry.get("class_name", ""))


def _chain(
    model: Mapping[str, Any], owned: Mapping[int, dict[str, np.ndarray]], depth: int
) -> tuple[list[Layer], list[Layer]]:
    if depth > _MAX_DEPTH:
        raise ValueError(f"its models are nested over {_MAX_DEPTH} deep")
    entries = _entries(model)
    ordered = entries if _kind(model) == "Sequential" else _in_order(entries)
    layers: list[Layer] = []
    branches: list[Layer] = []
    for entry in ordered:
        if _is_model(entry):
            inner, rest = _chain(entry, owned, depth + 1)
        else:
            config = entry["config"] if isinstance(entry["config"], dict) else {}
            inner = [Layer(_name(entry), _kind(entry), config, owned.get(id(entry), {}))]
            rest = []
        (branches if branches else layers).extend(inner)
        branches += rest
    reached = {id(entry) for entry in ordered}
    for entry in entries:
        if id(entry) in reached:
            continue
        if _is_model(entry):
            inner, rest = _chain(entry, owned, depth + 1)
            branches += [*inner, *rest]
        else:
            config = entry["config"] if isinstance(entry["config"], dict) else {}
            branches.append(Layer(_name(entry), _kind(entry), config, owned.get(id(entry), {})))
    return layers, branches


def _in_order(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chain of layers from the images on, as long as each has one input and one consumer."""
    sources = {id(entry): _sources(entry.get("inbound_nodes")) for entry in entries}
    users: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        for source in set(sources[id(entry)]):
            users.setdefault(source, []).append(entry)
    inputs = [entry for entry in entries if _kind(entry) == "InputLayer"]
    if len(inputs) != 1:
        raise ValueError(f"its model has {len(inputs)} inputs; a VGG has one")
    ordered = [inputs[0]]
    while len(ordered) <= len(entries):
        following = users.get(_name(ordered[-1]), [])
        if len(following) != 1 or len(sources[id(following[0])]) != 1:
            break
        ordered.append(following[0])
    return ordered


def _sources(nodes: Any) -> list[str]:
    """Names of the input layers of a layer. Keras 2 writes ``[name, 0, 0, {}]``, Keras 3
    ``{"keras_history": [name, 0, 0]}``."""
    names, pending = [], [nodes]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            history = value.get("keras_history")
            if isinstance(history, list) and history:
                names.append(str(history[0]))
            else:
                pending += value.values()
        elif isinstance(value, list):
            is_edge = len(value) >= 3 and isinstance(value[0], str)
            if is_edge and all(isinstance(number, int) for number in value[1:3]):
                names.append(value[0])
            else:
                pending += value
    return names


def _leaves(model: Mapping[str, Any], depth: int = 0) -> list[dict[str, Any]]:
    if depth > _MAX_DEPTH:
        raise ValueError(f"its models are nested over {_MAX_DEPTH} deep")
    leaves: list[dict[str, Any]] = []
    for entry in _entries(model):
        leaves += _leaves(entry, depth + 1) if _is_model(entry) else [entry]
    return leaves


def _by_path(
    model: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[int, dict[str, np.ndarray]]:
    """Arrays by layer in a ``.h5`` file, which are named
    ``model_weights/<layer>/<layer>/kernel:0``, or ``model_weights/<model>/<layer>/kernel:0`` in a
    nested model."""
    owned: dict[int, dict[str, np.ndarray]] = {}
    for entry in _entries(model):
        leaves = _leaves(entry) if _is_model(entry) else [entry]
        by_name = {_name(leaf): leaf for leaf in leaves}
        beginning = f"{_name(entry)}/"
        for full_path, values in arrays.items():
            path = full_path.removeprefix("model_weights/")
            if not path.startswith(beginning):
                continue
            parts = path.removeprefix(beginning).split("/")
            owner = by_name[_name(entry)] if leaves == [entry] else _owner(parts, by_name)
            _add(owned, owner, path, values)
    return owned


def _by_layer(
    model: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[int, dict[str, np.ndarray]]:
    """Arrays by layer in a SavedModel, which are named ``<layer>/kernel`` in any model."""
    owned: dict[int, dict[str, np.ndarray]] = {}
    leaves = _leaves(model)
    by_name = {_name(leaf): leaf for leaf in leaves}
    if len(by_name) < len(leaves):
        raise ValueError("several of its layers have the same name")
    for path, values in arrays.items():
        _add(owned, _owner(path.split("/"), by_name), path, values)
    return owned


def _add(
    owned: dict[int, dict[str, np.ndarray]],
    owner: Mapping[str, Any] | None,
    path: str,
    values: np.ndarray,
) -> None:
    """Add an array to those of its layer."""
    if owner is None:
        raise ValueError(f"its array {path!r} belongs to no layer of its configuration")
    part = path.rpartition("/")[2]
    match = _ROLE.fullmatch(part)
    role = _ROLES.get(match[1], match[1]) if match else part
    if role in owned.setdefault(id(owner), {}):
        raise ValueError(f"its layer {_name(owner)} has two arrays {role}")
    owned[id(owner)][role] = values


def _owner(parts: Sequence[str], by_name: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    for part in reversed(parts[:-1]):
        # Older Keras versions number repeated scopes.
        for name in (part, re.sub(r"_\d+$", "", part)):
            if name in by_name:
                return by_name[name]
    for name in sorted(by_name, key=len, reverse=True):
        if parts[-1].startswith(f"{name}_"):
            return by_name[name]
    return None


def _by_class(
    model: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[int, dict[str, np.ndarray]]:
    """Arrays by layer in a ``.keras`` file, which are named ``layers/conv2d_1/vars/0``: layers of a
    class are numbered within each model, variables in the order of their creation."""
    owned: dict[int, dict[str, np.ndarray]] = {}
    by_path: dict[str, dict[int, np.ndarray]] = {}
    for path, values in arrays.items():
        head, _, number = path.rpartition("/vars/")
        if number.isdecimal():
            by_path.setdefault(head, {})[int(number)] = values
    folder = next((path.split("/")[0] for path in by_path if "/" in path), "layers")
    pending: list[tuple[Mapping[str, Any], str]] = [(model, "")]
    while pending:
        entry, prefix = pending.pop()
        counts: Counter[str] = Counter()
        for child in _entries(entry):
            snake = _snake_case(_kind(child))
            count = counts[snake]
            counts[snake] += 1
            path = f"{prefix}{folder}/{snake}" + (f"_{count}" if count else "")
            if _is_model(child):
                pending.append((child, f"{path}/"))
            elif path in by_path:
                variables = [by_path[path][n] for n in sorted(by_path[path])]
                roles = _roles(child, len(variables))
                owned[id(child)] = dict(zip(roles, variables, strict=True))
    return owned


def _roles(entry: Mapping[str, Any], count: int) -> list[str]:
    config, kind = entry["config"], _kind(entry)
    roles: list[str] = []
    if kind == "BatchNormalization" and isinstance(config, dict):
        roles = ["gamma"] * (config.get("scale") is not False)
        roles += ["beta"] * (config.get("center") is not False)
        roles += ["moving_mean", "moving_variance"]
    elif kind in ("Conv2D", "Dense"):
        roles = ["kernel", "bias"][:count]
    return roles if len(roles) == count else [str(number) for number in range(count)]


def _snake_case(name: str) -> str:
    """Equal to ``keras.src.utils.naming.to_snake_case``."""
    name = re.sub(r"\W+", "", name)
    name = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
