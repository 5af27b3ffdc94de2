"""What Keras files without a configuration tell about their layers: names and nothing else.

Keras numbers layers that have no name of their own: ``conv2d``, ``conv2d_1``; files of Keras 3
(``.weights.h5``) name all layers after their classes, and legacy files (``.h5``) list the names of
all layers in order, also of those without weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

_POOLINGS = {
    "flatten": "flatten",
    "global_average_pooling2d": "average",
    "global_max_pooling2d": "max",
    "globalaveragepooling2d": "average",  # Keras 1
    "globalmaxpooling2d": "max",
}
_LAYER = re.compile(r"(layer_with_weights-)?(\d{1,6})")
_EXPORTED = re.compile(r"variables/(\d{1,6})/\.ATTRIBUTES/VARIABLE_VALUE")
# Attributes of checkpoints and models that hold no model, or the same layers in another order.
_NO_MODEL = re.compile(r"_.*|layer-\d+|layers|keras_api|\w*optimizer|(trainable_)?variables")
_MAX_NAMES = 20_000


def pooling_of(names: Sequence[str]) -> str | None:
    """The pooling before a head by the names of a model's layers; ``None`` if they do not say."""
    kinds = {re.sub(r"_\d+$", "", name) for name in names[:_MAX_NAMES]}
    poolings = {_POOLINGS[kind] for kind in kinds if kind in _POOLINGS}
    if len(poolings) > 1:
        poolings.discard("flatten")  # without effect after a global pooling
    return poolings.pop() if len(poolings) == 1 else None


def pop_head_norms(
    layers: Mapping[str, Mapping[str, np.ndarray]], others: MutableMapping[str, np.ndarray]
) -> list[str]:
    """Remove the batch norms of a head from ``others``; returns their names. They are told from
    those of the base if the base is a nested model.

    Args:
        layers: arrays by their path in the file, for each convolution and dense layer.
        others: arrays of the other layers.
    """
    kernels = [path for arrays in layers.values() for path, v in arrays.items() if v.ndim == 4]
    bases = [path.split("/") for path in kernels]
    depth = 0
    while bases and all(len(b) > depth + 2 and b[depth] == bases[0][depth] for b in bases):
        depth += 1
    root = "/".join([*bases[0][:depth], ""]) if bases else ""
    if root.strip("/") in ("", "layers", "model_weights"):
        return []
    groups: dict[str, list[str]] = defaultdict(list)
    for path in others:
        groups[path.rpartition("/")[0].removesuffix("/vars")].append(path)
    is_norm = re.compile(r"moving_(mean|variance)")
    found = []
    for group, paths in groups.items():
        has_moments = any(is_norm.search(path) for path in paths)
        if not group.startswith(root) and (has_moments or "batch_normalization" in group):
            found.append(group)
            for path in paths:
                del others[path]
    return found


def names_in_object_graph(
    serialized: bytes, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Names as in a Keras weight file for the checkpoint keys of a Keras model in a TensorFlow 2
    checkpoint; empty if it has none.

    A key is one of several paths to its variable, and may lead through an optimizer, so the layers
    are found in the object graph: Keras 2 numbers those with weights, and Keras 3 all operations,
    in the order of the model. So ``model/layer_with_weights-0/layer_with_weights-3/kernel`` is
    named ``base/conv2d_3/kernel``, or ``base/dense_3/kernel`` if it is a matrix. Of several models
    the one with the most convolutions is taken. ``model.export`` of Keras 3 writes a list of
    variables instead, whose full names have those of their layers.

    Source: tensorflow/python/checkpoint, tf_keras/engine/functional.py,
    keras/src/backend/tensorflow/trackable.py, and keras/src/backend/tensorflow/export.py.

    Args:
        serialized: value of the checkpoint entry ``object_keys.KEY``.
        shapes: of the arrays of the checkpoint, by key.

    Raises:
        ValueError: if ``serialized`` is damaged.
    """
    nodes = _nodes(serialized)
    models: dict[str, dict[tuple[int, ...], dict[str, str]]] = {}
    pending = [_Place(0, "", ())]
    seen = {0}
    for place in pending:  # breadth-first search; the list grows during iteration
        for child in nodes[place.node].children if nodes else ():
            if not 0 <= child.node_id < len(nodes):
                continue
            attributes = nodes[child.node_id].attributes
            keys = [one.checkpoint_key for one in attributes if one.name == "VARIABLE_VALUE"]
            if keys and place.layers and keys[0] in shapes:
                layers = models.setdefault(place.model, {})
                part = child.local_name.removeprefix("_")
                layers.setdefault(place.layers, {}).setdefault(part, keys[0])
            elif not keys and child.node_id not in seen:
                inner = place.inside(child.local_name, child.node_id)
                if inner is not None:
                    seen.add(child.node_id)
                    pending.append(inner)
    if not models:
        return _named([(0, parts) for parts in _exported(nodes, shapes)], shapes)
    layers = max(
        models.values(),
        key=lambda layers: sum(
            len(shapes[key]) == 4 for parts in layers.values() for key in parts.values()
        ),
    )
    return _named([(len(numbers) - 1, layers[numbers]) for numbers in sorted(layers)], shapes)


def full_names(serialized: bytes) -> dict[str, str]:
    """The names of variables, ``block1_conv1/kernel``, by their checkpoint keys.

    Raises:
        ValueError: if ``serialized`` is damaged.
    """
    attributes = [one for node in _nodes(serialized) for one in node.attributes]
    return {one.checkpoint_key: one.full_name for one in attributes}


def _nodes(serialized: bytes) -> Sequence[Any]:
    try:
        return TrackableObjectGraph.FromString(serialized).nodes
    except (DecodeError, TypeError) as error:
        raise ValueError(f"its object graph is damaged: {error}") from error


def _exported(
    nodes: Sequence[Any], shapes: Mapping[str, tuple[int, ...]]
) -> Collection[dict[str, str]]:
    """The layers in the order of a list of ``variables``: checkpoint keys by part."""
    names = {one.checkpoint_key: one.full_name for node in nodes for one in node.attributes}
    numbers = {key: int(match[1]) for key in names if (match := _EXPORTED.fullmatch(key))}
    layers: dict[str, dict[str, str]] = {}
    for key in sorted(numbers, key=numbers.__getitem__):
        scope, _, part = names[key].rpartition("/")
        if scope and key in shapes and part != "seed_generator_state":  # of dropout
            layers.setdefault(scope, {}).setdefault(part, key)
    return layers.values()


def _named(
    layers: Sequence[tuple[int, Mapping[str, str]]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Names by checkpoint key, from the depth of each layer and its keys by part."""
    names: dict[str, str] = {}
    for number, (depth, parts) in enumerate(layers):
        rank = len(shapes[parts["kernel"]]) if "kernel" in parts else 0
        kind = {4: "conv2d", 2: "dense"}.get(rank, "batch_normalization" if not rank else "other")
        scope = "/".join(["base"] * depth + [f"{kind}_{number}"])
        names |= {key: f"{scope}/{part}" for part, key in parts.items()}
    return names


class _Place(NamedTuple):
    """A node of an object graph. ``model``: path of the attributes that lead to its model.
    ``layers``: numbers of the layers that it is in. ``is_list``: whether it is the list of the
    layers of a model."""

    node: int
    model: str
    layers: tuple[int, ...]
    is_list: bool = False

    def inside(self, name: str, node: int) -> _Place | None:
        """The place of an attribute; ``None`` if it leads to no layer."""
        number = _LAYER.fullmatch(name)
        if number and (number[1] or self.is_list):
            return _Place(node, self.model, (*self.layers, int(number[2])))
        if name in ("_functional", "_operations"):
            return _Place(node, self.model, self.layers, is_list=name == "_operations")
        if self.layers or self.is_list or _NO_MODEL.fullmatch(name):
            return None
        return _Place(node, f"{self.model}{name}/", ())
