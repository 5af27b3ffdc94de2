"""The layers of a weight file in their order, each with the batch norm that follows it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from transfer.vgg.published.batch_norm import BatchNorm

# Default epsilons of the original layers; weight files do not contain them.
_KERAS_EPSILON, _SLIM_EPSILON = 1e-3, 1e-3
# Prefixes of layer names in the order of the layers; other names come last.
KINDS = ("block", "conv", "features", "fc", "dense", "pre_logits", "classifier")


@dataclass
class FileLayer:
    """Kernel and biases in the layout of the file, and the following batch norm."""

    name: str
    kernel: np.ndarray
    biases: np.ndarray | None
    norm: BatchNorm | None = None

    def folded(self, axis: int) -> tuple[np.ndarray, np.ndarray]:
        if self.norm is not None:
            return self.norm.folded(f"after {self.name}", self.kernel, self.biases, axis)
        if self.biases is None:
            raise ValueError(
                f"its layer {self.name} has arrays {self.kernel.shape}; expected a kernel and "
                "biases"
            )
        return self.kernel, self.biases


def in_order(layers: Mapping[str, dict[str, np.ndarray]]) -> list[FileLayer]:
    """The layers in order, each with the batch norm that directly follows it."""
    ordered: list[FileLayer] = []
    for name in sorted(layers, key=position):
        arrays = layers[name]
        norm = _slim_norm(name, arrays)
        parts = [v for key, v in arrays.items() if "/BatchNorm/" not in key]
        ordered.append(FileLayer(name, *_kernel_and_biases(name, parts), norm))
    return ordered


def position(layer: str) -> tuple[int, list[int]]:
    """Where a layer stands by its name: the number of its kind in ``KINDS``, and its numbers."""
    kind = next((i for i, kind in enumerate(KINDS) if layer.startswith(kind)), len(KINDS))
    return kind, [int(number) for number in re.findall(r"\d+", layer.removeprefix("conv2d"))]


def _kernel_and_biases(
    name: str, arrays: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray | None]:
    kernels = [values for values in arrays if values.ndim > 1]
    biases = [values for values in arrays if values.ndim == 1]
    if len(kernels) != 1 or len(biases) > 1:
        shapes = ", ".join(str(values.shape) for values in arrays)
        raise ValueError(f"its layer {name} has arrays {shapes}; expected a kernel and biases")
    return kernels[0], biases[0] if biases else None


def _slim_norm(name: str, arrays: Mapping[str, np.ndarray]) -> BatchNorm | None:
    """Batch norm of ``slim.conv2d`` with ``normalizer_fn=slim.batch_norm``: always before the
    activation, without biases, and by default without gamma. Source: tf_slim/layers/layers.py."""
    parts = {
        key.rsplit("/", 1)[1]: values for key, values in arrays.items() if "/BatchNorm/" in key
    }
    if not parts:
        return None
    if not {"moving_mean", "moving_variance"} <= parts.keys():
        raise ValueError(f"the batch norm of its layer {name} has {', '.join(parts)} only")
    return BatchNorm(
        parts["moving_mean"],
        parts["moving_variance"],
        _SLIM_EPSILON,
        parts.get("gamma"),
        parts.get("beta"),
    )


def add_keras_norms(
    ordered: Sequence[FileLayer], others: dict[str, np.ndarray], names: Sequence[str]
) -> None:
    """Move the batch norms of a Keras weight file from ``others`` to their layers. The layer
    follows from their numbers or from the order of the layers. Moving means below zero show that
    they are before the ReLU, since its output is never negative.

    Raises:
        ValueError: if the position of a batch norm cannot be determined.
    """
    groups: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for path, values in others.items():
        group, _, part = path.rpartition("/")
        groups[group.removesuffix("/vars")][re.sub(r":\d+$", "", part)] = values
    norms: dict[int, str] = {}
    for group, parts in groups.items():
        layer = group.rpartition("/")[2]
        by_number = re.fullmatch(r"batch_normalization(?:_(\d+))?", layer)
        if by_number and parts.keys() == {"0", "1", "2", "3"}:
            norms[int(by_number[1] or 0)] = group
        elif {"moving_mean", "moving_variance"} <= parts.keys():
            at = list(names).index(layer) if layer in names else 0
            before = names[at - 1] if at else ""
            owner = [n for n, one in enumerate(ordered) if one.name == before]
            if not owner:
                raise ValueError(_untold(group, "follows no layer of a VGG by the file's order"))
            norms[owner[0]] = group
    if not norms:
        return
    if sorted(norms) != list(range(len(norms))) or len(norms) > len(ordered):
        raise ValueError(
            _untold(next(iter(norms.values())), f"is one of {len(norms)} for {len(ordered)} layers")
        )
    for index, group in norms.items():
        parts = groups[group]
        roles = ("gamma", "beta", "moving_mean", "moving_variance")
        gamma, beta, mean, variance = (
            parts.get(role, parts.get(str(number))) for number, role in enumerate(roles)
        )
        if mean is None or variance is None or not (mean < 0).any():
            raise ValueError(_untold(group, "has no moving mean below zero, as behind a ReLU"))
        ordered[index].norm = BatchNorm(mean, variance, _KERAS_EPSILON, gamma, beta)
        for path in [path for path in others if path.startswith(f"{group}/")]:
            del others[path]


def _untold(group: str, why: str) -> str:
    return (
        f"its batch norm {group} {why}: weights alone do not say whether it stands before the "
        "ReLU, where it can be folded, or after it; convert the whole model "
        "(model.save('model.keras'))"
    )
