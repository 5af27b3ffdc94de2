"""The head of a converted classifier: one rule for all file formats.

The convolutions of a file are converted, and its head with them if it is a chain of dense layers,
with pooling or flattening before it and dropout, batch norm and rescaling anywhere in it. Every
other head is left out, and the reason is reported.

A reader describes the head as steps in the order of computation (``Dense``, ``Normalization``,
``Activation``; dropout and the identity are not steps) and calls ``build``; one that knows nothing
but the weights calls ``plain``. The result has no batch norm: it is folded into the dense layers,
which is exact on both sides of an activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from transfer.vgg.architectures import ACTIVATIONS
from transfer.vgg.published.batch_norm import BatchNorm

Pooling: TypeAlias = Literal["flatten", "average", "max"]
"""The layer between the last convolution and the first dense layer: flattening in the order height,
width, channel, or the average or the maximum over height and width."""
MAX_LAYERS, MAX_STEPS = 20, 100


def channels_last(values: np.ndarray, channels: int) -> np.ndarray:
    """Rows ``[inputs, ...]`` of a flattened feature map in the order channel, height, width to the
    order height, width, channel.

    Raises:
        ValueError: if the number of rows is not a multiple of ``channels``.
    """
    shaped = values.reshape(channels, -1, *values.shape[1:])
    return shaped.swapaxes(0, 1).reshape(values.shape)


class UnsupportedHeadError(ValueError):
    """The reason why a head is left out; it continues the sentence "the head is left out: "."""


@dataclass(frozen=True)
class Dense:
    """A matrix product: ``kernel`` ``[inputs, outputs]``, ``biases`` ``[outputs]`` or ``None``."""

    name: str
    kernel: np.ndarray
    biases: np.ndarray | None = None


@dataclass(frozen=True)
class Normalization:
    """A batch norm over the features. Before a flattening it may have one value per channel."""

    name: str
    norm: BatchNorm


@dataclass(frozen=True)
class Activation:
    """``kind``: a key of ``architectures.ACTIVATIONS``, or ``softmax``."""

    name: str
    kind: str


Step: TypeAlias = Dense | Normalization | Activation


@dataclass(frozen=True)
class Connected:
    """A fully connected layer of the converted network: ``kernel`` ``[inputs, outputs]``,
    ``biases`` ``[outputs]``. ``activation`` is a key of ``architectures.ACTIVATIONS``."""

    name: str
    kernel: np.ndarray
    biases: np.ndarray
    activation: str


@dataclass(frozen=True)
class Head:
    """``connected``: all layers, the last of which gives the logits of a softmax. ``note``: an
    assumption to report, or empty. ``class_names``: one per class, or empty."""

    pooling: Pooling
    connected: tuple[Connected, ...]
    note: str = ""
    class_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return int(self.connected[-1].kernel.shape[-1])


def build(steps: Sequence[Step], pooling: Pooling, class_names: Sequence[str] = ()) -> Head:
    """The head with these steps after the pooling.

    A single output, whose sigmoid is the probability of the second class, becomes two logits with
    the same probabilities: ``[1 - p, p]``.

    Args:
        steps: in the order of computation.
        pooling: the layer before them.
        class_names: names in the file; ignored if there are not as many as classes.

    Raises:
        UnsupportedHeadError: if the head is not a chain of dense layers that ends with classes.

    Example:
        >>> import numpy as np
        >>> kernel = np.ones((4, 1), np.float32)
        >>> head = build([Dense("dog", kernel), Activation("dog", "sigmoid")], "average")
        >>> head.num_classes, head.connected[0].kernel[0].tolist()
        (2, [0.0, 1.0])
    """
    if len(steps) > MAX_STEPS:
        raise UnsupportedHeadError(f"it has {len(steps)} steps; expected at most {MAX_STEPS}")
    layers: list[Connected] = []
    pending: list[Normalization] = []  # not yet folded into the next dense layer
    activation = ""  # of the last layer; empty if it has none yet
    for step in steps:
        if isinstance(step, Dense):
            if layers:
                layers[-1] = _with_activation(layers[-1], activation or "linear")
            layers.append(_connected(step, pending, layers))
            pending, activation = [], ""
        elif isinstance(step, Normalization):
            if layers and not activation:
                layers[-1] = _folded_after(layers[-1], step)
            else:
                pending.append(step)
        elif activation == step.kind == "relu" or step.kind == "linear":
            continue  # ReLU is idempotent
        elif not layers and step.kind == "relu" and not pending:
            continue  # the last convolution ends with a ReLU
        elif not layers or activation or pending:
            raise UnsupportedHeadError(
                f"its activation {step.name} ({step.kind}) does not follow a dense layer"
            )
        else:
            activation = step.kind
    if not layers:
        raise UnsupportedHeadError("it has no dense layer")
    if pending:
        raise UnsupportedHeadError(f"its batch norm {pending[0].name} comes after an activation")
    layers[-1], note = _classes(layers[-1], activation or "linear")
    names = tuple(class_names) if len(class_names) == layers[-1].kernel.shape[-1] else ()
    return Head(pooling, tuple(layers), note, names)


def plain(layers: Sequence[Dense], pooling: Pooling, class_names: Sequence[str] = ()) -> Head:
    """The head with these layers, for files that have no more than weights: a ReLU is assumed
    after every layer but the last.

    Raises:
        UnsupportedHeadError: see ``build``.
    """
    steps: list[Step] = []
    for layer in layers:
        steps += [layer, Activation(layer.name, "relu")]
    return build(steps[:-1], pooling, class_names)


def _connected(
    step: Dense, pending: Sequence[Normalization], before: Sequence[Connected]
) -> Connected:
    kernel = np.asarray(step.kernel, np.float32)
    if len(before) >= MAX_LAYERS:
        raise UnsupportedHeadError(f"it has over {MAX_LAYERS} dense layers")
    if kernel.ndim != 2 or not kernel.size:
        raise UnsupportedHeadError(f"its layer {step.name} has a kernel of shape {kernel.shape}")
    inputs, outputs = kernel.shape
    if before and before[-1].kernel.shape[1] != inputs:
        raise UnsupportedHeadError(
            f"its layer {step.name} takes {inputs} inputs; its layer {before[-1].name} has "
            f"{before[-1].kernel.shape[1]} outputs"
        )
    biases = np.zeros(outputs, np.float32) if step.biases is None else step.biases
    if biases.shape != (outputs,):
        raise UnsupportedHeadError(
            f"its layer {step.name} has biases of shape {biases.shape} for {outputs} outputs"
        )
    for norm in reversed(pending):
        kernel, biases = _folded_before(kernel, biases, norm)
    return Connected(step.name, kernel, np.asarray(biases, np.float32), "linear")


def _folded_before(
    kernel: np.ndarray, biases: np.ndarray, step: Normalization
) -> tuple[np.ndarray, np.ndarray]:
    """A dense layer that is equivalent to a batch norm followed by this one."""
    scale, shift = _affine(step)
    repeats, rest = divmod(kernel.shape[0], len(scale))
    if rest or not repeats:
        raise UnsupportedHeadError(
            f"its batch norm {step.name} has {len(scale)} features; the next layer takes "
            f"{kernel.shape[0]}"
        )
    scale, shift = np.tile(scale, repeats), np.tile(shift, repeats)  # channels come last
    biases = biases + shift @ kernel
    return (kernel * scale[:, None]).astype(np.float32), biases.astype(np.float32)


def _folded_after(layer: Connected, step: Normalization) -> Connected:
    scale, shift = _affine(step)
    if len(scale) != layer.kernel.shape[1]:
        raise UnsupportedHeadError(
            f"its batch norm {step.name} has {len(scale)} features; its layer {layer.name} has "
            f"{layer.kernel.shape[1]} outputs"
        )
    kernel = (layer.kernel * scale).astype(np.float32)
    return replace(layer, kernel=kernel, biases=(layer.biases * scale + shift).astype(np.float32))


def _affine(step: Normalization) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift of a batch norm, float64 ``[features]``."""
    norm = step.norm
    parts = [norm.mean, norm.variance, norm.gamma, norm.beta]
    if any(part is not None and part.shape != norm.mean.shape for part in parts):
        raise UnsupportedHeadError(f"its batch norm {step.name} has arrays of different shapes")
    if norm.mean.ndim != 1 or not norm.mean.size:
        raise UnsupportedHeadError(f"its batch norm {step.name} has a mean of {norm.mean.shape}")
    with np.errstate(all="ignore"):  # non-finite results are refused later
        scale = 1 / np.sqrt(norm.variance.astype(np.float64) + norm.epsilon)
        if norm.gamma is not None:
            scale = scale * norm.gamma
        shift = -norm.mean * scale
        return scale, shift if norm.beta is None else shift + norm.beta


def _with_activation(layer: Connected, kind: str) -> Connected:
    if kind not in ACTIVATIONS:
        raise UnsupportedHeadError(
            f"its layer {layer.name} has activation {kind}; expected one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    return replace(layer, activation=kind)


def _classes(layer: Connected, kind: str) -> tuple[Connected, str]:
    """The last layer as logits of a softmax, and what is assumed."""
    outputs = layer.kernel.shape[1]
    if outputs == 1 and kind in ("sigmoid", "linear"):
        two = replace(
            layer,
            kernel=np.pad(layer.kernel, ((0, 0), (1, 0))),
            biases=np.pad(layer.biases, (1, 0)),
        )
        is_assumed = kind == "linear"
        return two, "its single output is assumed to be a logit of two classes" * is_assumed
    if outputs == 1 or kind not in ("softmax", "linear"):
        raise UnsupportedHeadError(
            f"its last layer {layer.name} has {outputs} outputs with activation {kind}; expected "
            "a softmax, or one output with a sigmoid"
        )
    return layer, ""
