"""What Keras files without a configuration tell about their layers: names and nothing else.

Keras numbers layers that have no name of their own: ``conv2d``, ``conv2d_1``; files of Keras 3
(``.weights.h5``) name all layers after their classes, and legacy files (``.h5``) list the names of
all layers in order, also of those without weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence

import numpy as np

_POOLINGS = {
    "flatten": "flatten",
    "global_average_pooling2d": "average",
    "global_max_pooling2d": "max",
    "globalaveragepooling2d": "average",  # Keras 1
    "globalmaxpooling2d": "max",
}
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_NUMBERED = re.compile(r"((?:layer_with_weights-\d+/)+)(\w+)")
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


def of_object_graph(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """The arrays of a TensorFlow 2 checkpoint of ``model.save_weights``, by names as in a Keras
    weight file; ``None`` for another checkpoint.

    Layers with weights are numbered in the order of the model; so ``layer_with_weights-0/
    layer_with_weights-3/kernel`` becomes ``conv2d_3/kernel``, or ``dense_3/kernel`` for a matrix.
    Source: tensorflow/python/checkpoint and tf_keras/engine/functional.py.
    """
    groups: dict[tuple[int, ...], dict[str, np.ndarray]] = defaultdict(dict)
    for name, values in arrays.items():
        match = _NUMBERED.fullmatch(name.removesuffix(_VALUE).removeprefix("model/"))
        if match:
            numbers = tuple(int(number) for number in re.findall(r"\d+", match[1]))
            groups[numbers][match[2]] = values
    if not groups:
        return None
    named: dict[str, np.ndarray] = {}
    for number, key in enumerate(sorted(groups)):
        parts = groups[key]
        rank = parts["kernel"].ndim if "kernel" in parts else 0
        kind = {4: "conv2d", 2: "dense"}.get(rank, "batch_normalization" if not rank else "other")
        scope = "/".join(["base"] * (len(key) - 1) + [f"{kind}_{number}"])
        named |= {f"{scope}/{part}": values for part, values in parts.items()}
    return named
