"""Convert the layers of a model to those of a VGG, exactly or not at all.

A batch norm between a convolution and its ReLU is folded into the convolution. Any other layer
between the images and the last pooling that a VGG does not have is refused by name. A head is
taken by the rule of ``heads``, or left out and reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from transfer.vgg.architectures import ARCHITECTURES
from transfer.vgg.published import heads
from transfer.vgg.published.batch_norm import BatchNorm
from transfer.vgg.published.heads import Head, Step, UnsupportedHeadError
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
    """``blocks``: widths of the convolutions between poolings. ``image_size``: height and width, if
    the model states them. ``paddings``: of its poolings. ``preprocess``: mean and std of the layers
    before the first convolution, for images in 0..255. ``left_out``: layers of a head that is left
    out; ``why``: the reason."""

    convolutions: list[Weights] = field(default_factory=list)
    blocks: list[list[int]] = field(default_factory=lambda: [[]])
    head: Head | None = None
    image_size: tuple[int, int] | None = None
    paddings: set[str] = field(default_factory=set)
    preprocess: dict[str, Any] | None = None
    left_out: list[str] = field(default_factory=list)
    why: str = ""


def interpret(model: Model) -> KerasVGG:
    """Convert a model's layers to those of a VGG.

    Raises:
        ValueError: names a layer that no VGG has.
    """
    vgg = KerasVGG(image_size=_image_size(model.layers))
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
            vgg.paddings.add(str(layer.config.get("padding", "valid")).upper())
            vgg.blocks.append([])
        elif kind in ("Rescaling", "ReverseChannels") and not vgg.convolutions:
            vgg.preprocess = _preprocessed(vgg.preprocess, layer)
        else:
            raise ValueError(_refusal(layer, vgg, pending))
    if pending is not None:
        raise ValueError(f"its convolution {pending[0].name} has no ReLU; expected one")
    return []


def _refusal(layer: Layer, vgg: KerasVGG, pending: Any) -> str:
    if layer.kind == "Convolution2D":
        return (
            f"its layer {layer.name} (Convolution2D) is one of Keras 1, whose models are not read; "
            "convert its weights alone: model.save_weights('weights.h5')"
        )
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


def _preprocessed(before: dict[str, Any] | None, layer: Layer) -> dict[str, Any]:
    """The preprocessing of the layers so far, followed by another: a change of scale, or of the
    order of the channels."""
    before = before or {"mean": [0.0], "std": [1.0]}
    mean, std = np.asarray(before["mean"]), np.asarray(before["std"])
    order = before.get("order", "RGB")
    if layer.kind == "ReverseChannels":
        order = "RGB" if order == "BGR" else "BGR"
        mean, std = mean[::-1], std[::-1]
    else:
        then = _rescaling(layer)
        with np.errstate(all="ignore"):
            mean = mean + np.asarray(then["mean"]) * std
            std = std * np.asarray(then["std"])
        mean, std = np.broadcast_arrays(mean, std)
    if not (np.abs([mean, std]) < 1e30).all() or not (std > 1e-30).all():
        raise ValueError(f"its layer {layer.name} scales images by extreme numbers")
    # Files have numbers of float32, such as 103.939 as 103.93900299.
    return {
        "mean": [float(np.float32(v).astype(str)) for v in mean],
        "std": [float(np.float32(v).astype(str)) for v in std],
        "order": order,
    }


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


def _image_size(layers: Sequence[Layer]) -> tuple[int, int] | None:
    """Height and width that the first layer states: ``batch_shape``, and in Keras 2
    ``batch_input_shape``."""
    for layer in layers[:2]:
        shape = layer.config.get("batch_shape") or layer.config.get("batch_input_shape")
        if isinstance(shape, list) and len(shape) == 4:
            height, width = shape[1:3]
            if all(type(size) is int and 0 < size < 2**16 for size in (height, width)):
                return height, width
    return None


_POOLINGS: dict[str, heads.Pooling] = {
    "Flatten": "flatten",
    "GlobalAveragePooling2D": "average",
    "GlobalMaxPooling2D": "max",
}
_ACTIVATION_LAYERS = {"Softmax": "softmax", "ELU": "elu"}


def _head(rest: list[Layer], branches: list[Layer], vgg: KerasVGG) -> None:
    """Add the head to the result, or the reason why it is left out."""
    layers = [layer for layer in rest if not _is_inert(layer)]
    if not layers and not branches:
        return
    try:
        if branches:
            raise UnsupportedHeadError(f"it has branches, from {branches[0].name} on")
        steps, pooling = _steps(layers)
        vgg.head = heads.build(steps, pooling)
    except ValueError as reason:
        vgg.left_out = [layer.name for layer in (*layers, *branches) if layer.arrays]
        vgg.why = str(reason)


def _steps(layers: Sequence[Layer]) -> tuple[list[Step], heads.Pooling]:
    """The steps of a head and its pooling, for ``heads.build``."""
    steps: list[Step] = []
    pooling: heads.Pooling | None = None
    for layer in layers:
        kind = layer.kind
        if pooling is None and kind in _POOLINGS:
            _check_config(layer, {"data_format": "channels_last"})
            pooling = _POOLINGS[kind]
            if pooling == "max" and steps:
                raise UnsupportedHeadError(f"its {steps[0].name} comes before {layer.name}")
        elif pooling is not None and kind == "Flatten":
            continue  # after a global pooling
        elif kind == "BatchNormalization":
            axis = 3 if pooling is None else 1
            steps.append(heads.Normalization(layer.name, _batch_norm(layer, axis)))
        elif kind == "Rescaling" and pooling is not None:
            steps.append(heads.Normalization(layer.name, _as_norm(layer, steps)))
        elif kind == "Dense" and pooling is not None:
            steps.append(heads.Dense(layer.name, *_weights(layer, None)[1:]))
            steps.append(heads.Activation(layer.name, _activation(layer)))
        elif pooling is not None and (activation := _activation_of(layer)):
            steps.append(heads.Activation(layer.name, activation))
        elif pooling is None and not steps:
            raise UnsupportedHeadError(f"it begins with {layer.name} ({layer.kind})")
        else:
            raise UnsupportedHeadError(f"it has the unexpected layer {layer.name} ({layer.kind})")
    return steps, pooling or "flatten"


def _activation_of(layer: Layer) -> str:
    """The activation that a layer applies; empty if it is another layer."""
    if _is_relu(layer):
        return "relu"
    if layer.kind == "Activation":
        return _activation(layer)
    if layer.kind == "ELU" and layer.config.get("alpha", 1.0) != 1.0:
        return ""
    if (
        layer.kind == "ReLU"
        and layer.config.get("max_value") == 6.0
        and not (layer.config.get("negative_slope") or layer.config.get("threshold"))
    ):
        return "relu6"
    return _ACTIVATION_LAYERS.get(layer.kind, "")


def _as_norm(layer: Layer, steps: Sequence[Step]) -> BatchNorm:
    """A ``Rescaling`` of features as a batch norm."""
    values = _rescaling(layer)
    mean, std = np.asarray(values["mean"]), np.asarray(values["std"])
    before = [step for step in steps if isinstance(step, heads.Dense)]
    width = before[-1].kernel.shape[-1] if before else 1  # of any number of features
    mean, std = np.broadcast_to(mean, (width,)), np.broadcast_to(std, (width,))
    return BatchNorm(mean, std**2, 0.0)
