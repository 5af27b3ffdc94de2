"""Convert the layers of a Keras model to those of a VGG, exactly or not at all.

A batch norm between a layer and its ReLU is folded into the layer. Any other layer between the
images and the last pooling that a VGG does not have is refused by name. A head that is not a VGG's
is left out and reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from transfer.vgg.architectures import ARCHITECTURES
from transfer.vgg.published.batch_norm import BatchNorm
from transfer.vgg.published.keras_model import Layer, Model

_INERT = frozenset(
    {
        *("InputLayer", "Dropout", "SpatialDropout2D", "AlphaDropout", "GaussianDropout"),
        *("GaussianNoise", "ActivityRegularization", "Identity"),
    }
)
_EPSILON = 1e-3  # Keras' default


class Weights(NamedTuple):
    """Kernel in Keras' layout, and biases."""

    name: str
    kernel: np.ndarray
    biases: np.ndarray


@dataclass
class KerasVGG:
    """``blocks``: widths of the convolutions between poolings. ``pooling``: the layer before the
    first of the ``connected`` layers: flatten or average. ``preprocess``: mean and std of a
    ``Rescaling`` layer, for images in 0..255. ``left_out``: layers of a head that is left out;
    ``why``: the reason."""

    convolutions: list[Weights] = field(default_factory=list)
    blocks: list[list[int]] = field(default_factory=lambda: [[]])
    connected: list[Weights] = field(default_factory=list)
    pooling: str = "flatten"
    preprocess: dict[str, Any] | None = None
    left_out: list[str] = field(default_factory=list)
    why: str = ""


def interpret(model: Model) -> KerasVGG:
    """Convert a model's layers to those of a VGG.

    Raises:
        ValueError: names a layer that no VGG has.
    """
    vgg = KerasVGG()
    rest = _base(list(model.layers), vgg)
    if not vgg.convolutions:
        raise ValueError("its model has no convolutions")
    _head(rest, list(model.branches), vgg)
    if model.others:
        raise ValueError(
            f"its arrays {', '.join(model.others[:5])} belong to no layer of its configuration"
        )
    return vgg


def _base(layers: list[Layer], vgg: KerasVGG) -> list[Layer]:
    """Add the layers up to the last pooling to the result; returns the remaining layers."""
    pending: tuple[Layer, BatchNorm | None] | None = None  # convolution before its ReLU

    def finish() -> None:
        nonlocal pending
        if pending is not None:
            vgg.convolutions.append(_weights(*pending))
            vgg.blocks[-1].append(vgg.convolutions[-1].kernel.shape[-1])
            pending = None

    for number, layer in enumerate(layers):
        kind = layer.kind
        if _is_inert(layer):
            continue
        is_pooled = pending is None and not vgg.blocks[-1]
        blocks = tuple(map(tuple, vgg.blocks[:-1]))
        if is_pooled and any(table.blocks == blocks for table in ARCHITECTURES.values()):
            return layers[number:]
        if kind == "Conv2D":
            if pending is not None:
                raise ValueError(
                    f"its convolution {pending[0].name} has no ReLU before {layer.name}; expected "
                    "one"
                )
            _check_convolution(layer)
            pending = layer, None
            if _activation(layer) == "relu":
                finish()
        elif kind == "BatchNormalization" and pending is not None and pending[1] is None:
            pending = pending[0], _batch_norm(layer, axis=3)
        elif _is_relu(layer) and pending is not None:
            finish()
        elif _is_relu(layer) and vgg.convolutions:
            continue  # ReLU is idempotent
        elif kind == "MaxPooling2D" and pending is None and vgg.blocks[-1]:
            _check_pooling(layer)
            vgg.blocks.append([])
        elif kind == "Rescaling" and not vgg.convolutions and vgg.preprocess is None:
            vgg.preprocess = _rescaling(layer)
        else:
            raise ValueError(_refusal(layer, vgg, pending))
    if pending is not None:
        raise ValueError(f"its convolution {pending[0].name} has no ReLU; expected one")
    return []


def _refusal(layer: Layer, vgg: KerasVGG, pending: Any) -> str:
    if pending is not None:
        where = f"after its convolution {pending[0].name}, before the ReLU"
    elif vgg.convolutions:
        where = f"after the ReLU of its convolution {vgg.convolutions[-1].name}"
    else:
        where = "before its first convolution"
    return (
        f"its layer {layer.name} ({layer.kind}) stands {where}, and a VGG without it would compute "
        "something else; a batch norm can be folded between a convolution and its ReLU only"
    )


def _is_inert(layer: Layer) -> bool:
    """Whether a layer is the identity at inference."""
    is_linear = layer.kind == "Activation" and _activation(layer) == "linear"
    return layer.kind in _INERT or layer.kind.startswith("Random") or is_linear


def _activation(layer: Layer) -> str:
    value = layer.config.get("activation", "linear")
    if isinstance(value, dict):  # a serialized object
        config = value.get("config")
        value = config if isinstance(config, str) else value.get("class_name")
    return str(value or "linear").lower()


def _is_relu(layer: Layer) -> bool:
    if layer.kind == "Activation":
        return _activation(layer) == "relu"
    if layer.kind != "ReLU":
        return False
    config = layer.config
    slope = config.get("negative_slope") or 0
    return config.get("max_value") is None and not slope and not (config.get("threshold") or 0)


def _check_convolution(layer: Layer) -> None:
    expected = {
        "kernel_size": (3, 3),
        "strides": (1, 1),
        "dilation_rate": (1, 1),
        "padding": "same",
        "data_format": "channels_last",
        "groups": 1,
    }
    _check_config(layer, expected)
    if _activation(layer) not in ("relu", "linear"):
        raise ValueError(f"its layer {layer.name} has activation {_activation(layer)}, not relu")


def _check_pooling(layer: Layer) -> None:
    expected = {"pool_size": (2, 2), "strides": (2, 2), "data_format": "channels_last"}
    _check_config(layer, expected)


def _check_config(layer: Layer, expected: Mapping[str, Any]) -> None:
    for key, wanted in expected.items():
        value = layer.config.get(key)
        if isinstance(value, list):
            value = tuple(value)
        if isinstance(wanted, tuple) and isinstance(value, int):
            value = (value,) * len(wanted)
        if value is not None and value != wanted:
            raise ValueError(f"its layer {layer.name} has {key} {value}; expected {wanted}")


def _batch_norm(layer: Layer, axis: int) -> BatchNorm:
    arrays = layer.arrays
    if not {"moving_mean", "moving_variance"} <= arrays.keys():
        raise ValueError(f"its batch norm {layer.name} has no moving mean and variance")
    for role, switch in (("gamma", "scale"), ("beta", "center")):
        if layer.config.get(switch, True) and role not in arrays:
            raise ValueError(f"its batch norm {layer.name} has no {role}")
    if (along := layer.config.get("axis", -1)) not in (-1, [-1], axis, [axis]):
        raise ValueError(f"its batch norm {layer.name} has axis {along}; expected the channels")
    epsilon = layer.config.get("epsilon", _EPSILON)
    if not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
        raise ValueError(f"its batch norm {layer.name} has epsilon {epsilon!r}")
    return BatchNorm(
        arrays["moving_mean"],
        arrays["moving_variance"],
        float(epsilon),
        arrays.get("gamma"),
        arrays.get("beta"),
    )


def _weights(layer: Layer, norm: BatchNorm | None) -> Weights:
    kernel, biases = layer.arrays.get("kernel"), layer.arrays.get("bias")
    extra = layer.arrays.keys() - {"kernel", "bias"}
    if kernel is None or extra or (biases is None and layer.config.get("use_bias", True)):
        shapes = ", ".join(f"{role} {values.shape}" for role, values in layer.arrays.items())
        raise ValueError(
            f"its layer {layer.name} has arrays {shapes or 'none'}; expected a kernel and biases"
        )
    if norm is not None:
        return Weights(layer.name, *norm.folded(f"after {layer.name}", kernel, biases))
    if biases is None:
        biases = np.zeros(kernel.shape[-1], np.float32)
    return Weights(layer.name, kernel, biases)


def _rescaling(layer: Layer) -> dict[str, Any]:
    """``image * scale + offset`` of a ``Rescaling`` layer as mean and standard deviation."""
    try:
        scale = np.atleast_1d(np.asarray(layer.config.get("scale"), np.float64))
        offset = np.atleast_1d(np.asarray(layer.config.get("offset", 0.0), np.float64))
        scale, offset = np.broadcast_arrays(scale, offset)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its layer {layer.name} has a non-numeric scale or offset") from error
    if scale.size not in (1, 3) or not np.isfinite([scale, offset]).all() or (scale <= 0).any():
        raise ValueError(f"its layer {layer.name} scales by {scale.tolist()}")
    return {"mean": (-offset / scale + 0.0).tolist(), "std": (1 / scale).tolist()}


class _NoVGG(Exception):
    """The reason why a head is left out."""


def _head(rest: list[Layer], branches: list[Layer], vgg: KerasVGG) -> None:
    layers = [layer for layer in rest if not _is_inert(layer)]
    if not layers and not branches:
        return
    try:
        if branches:
            raise _NoVGG(f"it has branches, from {branches[0].name} on")
        vgg.pooling = _pooling(layers[0])
        vgg.connected = _connected(layers[1:])
        if len(vgg.connected) != 3:
            raise _NoVGG(f"it has {len(vgg.connected)} fully connected layers; expected 3")
        first, second, _ = (weights.kernel.shape for weights in vgg.connected)
        if first[-1] != second[-1]:
            raise _NoVGG(f"its layers have {first[-1]} and {second[-1]} outputs; expected as many")
    except (_NoVGG, ValueError) as reason:
        vgg.connected, vgg.pooling = [], "flatten"
        vgg.left_out = [layer.name for layer in (*layers, *branches) if layer.arrays]
        vgg.why = str(reason)


def _pooling(layer: Layer) -> str:
    kinds = {"Flatten": "flatten", "GlobalAveragePooling2D": "average"}
    if layer.kind not in kinds:
        raise _NoVGG(f"it begins with {layer.name} ({layer.kind})")
    _check_config(layer, {"data_format": "channels_last"})
    return kinds[layer.kind]


def _connected(layers: Sequence[Layer]) -> list[Weights]:
    connected: list[Weights] = []
    pending: tuple[Layer, BatchNorm | None] | None = None
    for layer in layers:
        if layer.kind == "Dense" and pending is None:
            pending = layer, None
            if layer is not layers[-1] and _activation(layer) == "relu":
                connected.append(_weights(*pending))
                pending = None
            elif _activation(layer) not in ("linear", "softmax"):
                raise _NoVGG(f"its layer {layer.name} has activation {_activation(layer)}")
        elif layer.kind == "BatchNormalization" and pending is not None and pending[1] is None:
            if _activation(pending[0]) != "linear":
                raise _NoVGG(f"its batch norm {layer.name} comes after an activation")
            pending = pending[0], _batch_norm(layer, axis=1)
        elif _is_relu(layer) and pending is not None and layer is not layers[-1]:
            connected.append(_weights(*pending))
            pending = None
        elif layer is layers[-1] and pending is not None and _is_softmax(layer):
            continue
        else:
            raise _NoVGG(f"it has the unexpected layer {layer.name} ({layer.kind})")
    if pending is not None:
        connected.append(_weights(*pending))
    return connected


def _is_softmax(layer: Layer) -> bool:
    return layer.kind == "Softmax" or (
        layer.kind == "Activation" and _activation(layer) == "softmax"
    )
