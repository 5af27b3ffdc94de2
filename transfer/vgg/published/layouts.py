"""Layouts of published weights: identify a layout by names and shapes, and convert it to a common
one.

In the common layout all arrays are float32: kernels of convolutions ``[3, 3, inputs, outputs]``, of
fully connected layers ``[inputs, outputs]`` with the inputs of fc6 in the order height, width,
channel. The channel order of the images and the preprocessing stay those of the source.

Every array of a file is either used, or known to have no effect, or part of a layer with its own
kernel that is left out and reported: a head. Any other array ends the conversion with an error,
since without it the network would compute a different function.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from transfer.vgg.published import (
    heads,
    keras_vgg,
    keras_weights,
    kernel_flips,
    known_layouts,
    network,
    torch_vgg,
)
from transfer.vgg.published.containers import Container
from transfer.vgg.published.file_layers import KINDS, add_keras_norms, in_order, position
from transfer.vgg.published.heads import Dense, Head, UnsupportedHeadError, channels_last
from transfer.vgg.published.kernel_flips import Kernels
from transfer.vgg.published.known_layouts import LAYOUTS, Layout
from transfer.vgg.published.network import Published

_HARMLESS = re.compile(
    r"num_batches_tracked$|global_step|mean_rgb$|save_counter|learning_rate|iterations?\b|seed_gen"
    r"|optimizer|Adam|Momentum|RMSProp|Adagrad|ExponentialMovingAverage|beta\d_power|loss_scale"
    r"|/(biased|local_step)$"
)
_MAX_HARMLESS = 4  # elements: a channel mean, a step, a learning rate


def identify(
    container: Container,
    *,
    columns_first: bool | None = None,
    pooling: str | None = None,
    leave_out: Sequence[str] = (),
    kernels: Kernels = "auto",
) -> Published:
    """Identify the layout of a file and convert it to the common layout.

    Args:
        container: from ``containers.read``.
        columns_first: overrides that of the layout; only MatConvNet files exist in both orders.
        pooling: the layer before the first fully connected layer, ``flatten``, ``average``
            or ``max``, if the file does not say and the number of inputs fits all.
        leave_out: name patterns of arrays to ignore.
        kernels: whether they are flipped, for files of Keras 1 and Lasagne.

    Raises:
        ValueError: states what was found and what was expected.
    """
    if columns_first is not None and container.kind != "MatConvNet":
        raise ValueError(
            f"it is a {container.kind} file, whose spatial order is known; only MatConvNet's files "
            "come in two orders"
        )
    if kernels != "auto" and (container.backend != "" or container.model is not None):
        known = f"those of {container.backend} are" if container.backend else "they are"
        raise ValueError(
            f"kernels={kernels} is for files that do not say whether their kernels are flipped; "
            f"it is a {container.kind} file, and {known} known"
        )
    if container.model is not None:
        if leave_out:
            raise ValueError(
                "the file says what its layers are; leave_out is for files that have arrays alone"
            )
        return _of_keras(container, pooling)
    arrays = {
        name: values
        for name, values in container.arrays.items()
        if name not in container.unused
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in leave_out)
    }
    if container.kind in ("PyTorch", "safetensors", "Lasagne", "Paddle", "MXNet"):
        return _of_torch(container, arrays, pooling, kernels)
    layout, layers = _layout(container.kind, arrays)
    if columns_first is None:
        columns_first = layout.columns_first
    taken = {name for layer in layers.values() for name in layer}
    others = {name: values for name, values in arrays.items() if name not in taken}
    ordered = in_order(layers)
    head_norms: list[str] = []
    if layout.container in ("HDF5", "TF2 checkpoint"):
        head_norms = keras_weights.pop_head_norms(layers, others)
        add_keras_norms(ordered, others, container.order)
    notes = [
        f"batch norm folded with epsilon {layer.norm.epsilon:g}, the original default"
        for layer in ordered
        if layer.norm is not None
    ][:1]
    convolutions: list[tuple[np.ndarray, np.ndarray]] = []
    connected: list[tuple[np.ndarray, np.ndarray]] = []
    names: list[str] = []  # of the connected layers
    is_outputs_first = layout.outputs_first or (
        layout.container == "HDF5" and _is_outputs_first(ordered[0].kernel)
    )
    is_flipped = False
    if container.backend == "":
        first = ordered[0].kernel.transpose(2, 3, 1, 0) if is_outputs_first else ordered[0].kernel
        is_unknown = is_outputs_first or kernel_flips.may_be_theano(layers[ordered[0].name])
        is_flipped = kernel_flips.is_flipped(first, kernels, default=None if is_unknown else False)
    for layer in ordered:
        is_moved = is_outputs_first and (layout.outputs_first or layer.kernel.ndim == 4)
        kernel, biases = layer.folded(0 if is_moved else -1)
        if layout.outputs_first:
            is_first = convolutions and not connected and kernel.ndim == 2
            kernel = _outputs_last(kernel, convolutions[-1][0].shape[-1] if is_first else None)
        elif is_moved:
            kernel = kernel.transpose(2, 3, 1, 0)
        if is_flipped:
            kernel = kernel_flips.flipped(kernel)
        if columns_first and kernel.ndim == 4:
            kernel = kernel.transpose(1, 0, 2, 3)
        # Some networks have their fully connected layers as convolutions, without another name.
        is_named = position(layer.name)[0] < KINDS.index("fc") or layer.name.startswith("layer_")
        is_convolution = is_named and kernel.ndim == 4
        is_convolution &= not convolutions or (not connected and kernel.shape[:2] == (3, 3))
        is_first = convolutions and not connected and not is_convolution
        is_channels_first = layout.channels_first or (is_outputs_first and not layout.outputs_first)
        if is_first and is_channels_first and kernel.ndim == 2:
            kernel = _channels_last(kernel, convolutions[-1][0].shape[-1])
        names += [] if is_convolution else [layer.name]
        (convolutions if is_convolution else connected).append((kernel, biases))
    left_out = sorted(set(container.arrays) - set(arrays)) + _left_out(others)
    head = None
    if connected:
        try:
            _check_window(container, convolutions, connected[0][0], names[0], is_outputs_first)
            if names[0] == "fc6" and "fc8" not in names:
                raise UnsupportedHeadError(
                    f"it ends with {names[-1]}, features and not classes; a layer of the classes "
                    "would be fc8"
                )
            if head_norms:
                raise UnsupportedHeadError(
                    f"weights alone do not say whether its batch norm {head_norms[0]} comes before "
                    "or after an activation; convert the whole model (model.save('model.keras'))"
                )
            head = _plain_head(container, convolutions, connected, names, pooling)
            network.architecture_of(convolutions, head)
        except ValueError as error:
            head, left_out = None, [*left_out, *names]
            notes.append(f"the head is left out: {error}")
    elif container.no_head:
        notes.append(container.no_head)
    return network.build(container, layout, convolutions, head, left_out, notes)


def _check_window(
    container: Container,
    convolutions: Sequence[tuple[np.ndarray, np.ndarray]],
    kernel: np.ndarray,
    name: str,
    is_outputs_first: bool,
) -> None:
    """Check that the first fully connected layer takes the feature map as that of a VGG does.

    Raises:
        UnsupportedHeadError: if not, or if it is not known.
    """
    if container.no_head:
        raise UnsupportedHeadError(container.no_head)
    if kernel.ndim == 4 and kernel.shape[:2] == (3, 3):  # dilated fc6 of SSD and DeepLab
        raise UnsupportedHeadError(
            f"its layer {name} {kernel.shape} is a convolution, whose stride and dilation the file "
            "does not tell"
        )
    widths = {len(kernel), *(one.shape[-1] for one, _ in convolutions[-1:])}
    is_flattened = kernel.ndim == 2 and len(widths) > 1
    if container.backend == "theano" and is_flattened and not is_outputs_first:
        raise UnsupportedHeadError(
            "weights alone do not say whether a model for Theano is flattened channels first; "
            "convert the whole model (model.save('model.h5'))"
        )


def _plain_head(
    container: Container,
    convolutions: Sequence[tuple[np.ndarray, np.ndarray]],
    connected: Sequence[tuple[np.ndarray, np.ndarray]],
    names: Sequence[str],
    pooling: str | None,
) -> Head:
    """The head of a file that has no more than weights.

    Raises:
        UnsupportedHeadError: the reason why it cannot be determined.
    """
    if pooling is None:
        pooling = keras_weights.pooling_of(container.order)
    if pooling is None and _is_ambiguous(convolutions, connected):
        raise UnsupportedHeadError(
            f"its first layer takes {connected[0][0].shape[-2]} inputs, which are those of a "
            "flattening where images have 32 pixels, or an average or a maximum over space, and "
            "the file does not say; pooling=flatten, pooling=average or pooling=max keeps it"
        )
    steps = [
        Dense(name, kernel.reshape(-1, kernel.shape[-1]), biases)
        for name, (kernel, biases) in zip(names, connected, strict=True)
    ]
    head = heads.plain(steps, cast(heads.Pooling, pooling or "flatten"))
    widths = [layer.kernel.shape[1] for layer in head.connected[:-1]]
    if len(set(widths)) == 1 and len(widths) == 2:
        return head  # that of a VGG
    assumed = "a ReLU after each layer of its head but the last is assumed" if widths else ""
    return replace(head, note="; ".join(filter(None, (assumed, head.note))))


def _of_keras(container: Container, pooling: str | None) -> Published:
    """Identify a file that contains the configuration of a Keras model."""
    assert container.model is not None
    if pooling is not None:
        raise ValueError("the file says what stands before its fully connected layers")
    vgg = keras_vgg.interpret(container.model)
    convolutions = [(weights.kernel, weights.biases) for weights in vgg.convolutions]
    architecture, name = network.architecture_of(convolutions, None)
    blocks = tuple(tuple(block) for block in vgg.blocks if block)
    if blocks != architecture.blocks:
        raise ValueError(f"its convolutions between poolings are {blocks}; those of {name} differ")
    size, padding = vgg.image_size, _padding(vgg)
    left_out, why, head = vgg.left_out, vgg.why, vgg.head
    if head is not None:
        try:
            network.architecture_of(convolutions, head, size, padding)
        except ValueError as error:
            left_out, why = [layer.name for layer in head.connected], str(error)
            head = None
    notes = [f"the head is left out: {why}"] if why else []
    container = replace(container, preprocess=vgg.preprocess or container.preprocess)
    layout = next(one for one in LAYOUTS if one.container == container.kind)
    return network.build(container, layout, convolutions, head, left_out, notes, size, padding)


def _padding(vgg: keras_vgg.KerasVGG) -> str:
    """The padding of a model's poolings, which only matters where they halve odd sizes."""
    if len(vgg.paddings) < 2:
        return next(iter(vgg.paddings), "SAME")
    if vgg.image_size is None or any(size % 2 ** len(vgg.blocks) for size in vgg.image_size):
        raise ValueError("some of its poolings round odd sizes up, and others down")
    return "SAME"


def _layout(
    kind: str, arrays: Mapping[str, np.ndarray]
) -> tuple[Layout, dict[str, dict[str, np.ndarray]]]:
    """The layout that matches the most layers, and the arrays of these layers."""
    candidates = [layout for layout in LAYOUTS if layout.container == kind]
    matches = [(layout, _layers(layout, arrays)) for layout in candidates]
    # Chainer and tensorpack have the same names, and other orders of axes.
    if kind == "npz":
        matches = [(layout, layers) for layout, layers in matches if _has_axes_of(layout, layers)]
    layout, layers = max(matches, key=lambda pair: len(pair[1]), default=(None, {}))
    if layout is None or not layers:
        names = ", ".join(list(arrays)[:6]) or "none"
        hint = ". Give the graph itself as the model" if kind == "frozen graph" else ""
        raise ValueError(
            f"it is a {kind} file with {len(arrays)} arrays ({names}, ...); no known layout of a "
            f"VGG has such names{hint}"
        )
    return layout, layers


def _has_axes_of(layout: Layout, layers: Mapping[str, dict[str, np.ndarray]]) -> bool:
    """Whether the first convolution has its outputs where the layout has them."""
    parts = [values for values in layers.get("conv1_1", {}).values() if values.ndim == 4]
    kernel = parts[0].shape if parts else ()
    return not parts or (kernel[1:] if layout.outputs_first else kernel[:3]) == (3, 3, 3)


def _layers(layout: Layout, arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Arrays by name, for each layer that matches the layout's pattern."""
    layers: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for name, values in arrays.items():
        if match := re.fullmatch(layout.pattern, name):
            layers[match["layer"]][name] = values
    return dict(layers)


def _left_out(others: Mapping[str, np.ndarray]) -> list[str]:
    """The arrays that may be left out: those without effect, and layers with their own kernel. A
    batch norm, a scale or an attention belongs between other layers.

    Raises:
        ValueError: names the arrays that may not be left out.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name, values in others.items():
        if not _HARMLESS.search(name) and values.size > _MAX_HARMLESS:
            groups[re.sub(r"(/vars)?[/._][^/._]*$", "", name)].append(name)
    refused = []
    for names in groups.values():
        kernels = [others[name] for name in names if others[name].ndim in (2, 4)]
        biases = [others[name] for name in names if others[name].ndim == 1]
        fits = all(len(values) in kernel.shape for values in biases for kernel in kernels)
        is_layer = len(kernels) == 1 and len(biases) <= 1 and len(names) == 1 + len(biases)
        if not is_layer or not fits:
            refused += names
    if refused:
        shown = ", ".join(f"{name} {others[name].shape}" for name in refused[:5])
        raise ValueError(
            f"its arrays {shown}{', ...' if len(refused) > 5 else ''} belong to no layer of a VGG; "
            "without them the network might compute something else. If they come after it, or "
            "beside it: leave_out=PATTERN"
        )
    return sorted(others)


def _is_ambiguous(
    convolutions: Sequence[tuple[np.ndarray, np.ndarray]],
    connected: Sequence[tuple[np.ndarray, np.ndarray]],
) -> bool:
    """Whether the first fully connected layer takes one pixel, which is either the flattened
    feature map of a small image or a global average."""
    inputs = math.prod(connected[0][0].shape[:-1])
    return bool(convolutions) and inputs == convolutions[-1][0].shape[-1]


def _outputs_last(kernel: np.ndarray, channels: int | None) -> np.ndarray:
    """``[outputs, inputs, height, width]`` or ``[outputs, inputs]`` to ``[height, width, inputs,
    outputs]``; with ``channels``, the inputs of a matrix are in the order channel, height,
    width."""
    if kernel.ndim == 2:
        window = math.isqrt(kernel.shape[1] // channels) if channels else 1
        inputs = kernel.shape[1] // window**2 if window else 0
        if inputs * window**2 != kernel.shape[1]:
            raise ValueError(f"its first fully connected layer takes {kernel.shape[1]} inputs")
        kernel = kernel.reshape(kernel.shape[0], inputs, window, window)
    return kernel.transpose(2, 3, 1, 0)


def _is_outputs_first(kernel: np.ndarray) -> bool:
    """Whether a first convolution is ``[outputs, inputs, height, width]``, as in a file of Keras 1
    with the dimension ordering ``th``."""
    return kernel.shape[1:] == (3, 3, 3) and kernel.shape[0] != 3


def _channels_last(kernel: np.ndarray, channels: int) -> np.ndarray:
    """``[inputs, outputs]`` with inputs in the order channel, height, width to height, width,
    channel."""
    if len(kernel) % channels:
        raise ValueError(f"its first fully connected layer takes {len(kernel)} inputs")
    return channels_last(kernel, channels)


def _of_torch(
    container: Container, arrays: Mapping[str, np.ndarray], pooling: str | None, kernels: Kernels
) -> Published:
    """Identify the state dict of a PyTorch model."""
    vgg = torch_vgg.interpret(arrays, pooling)
    if container.backend == "":
        # Files of Lasagne's model zoo come with their mean and the names of their classes.
        is_zoo = container.preprocess is not None and len(container.labels) > 0
        first, _ = vgg.convolutions[0]
        if kernel_flips.is_flipped(first, kernels, default=False if is_zoo else None):
            vgg.convolutions = [(kernel_flips.flipped(k), b) for k, b in vgg.convolutions]
    if vgg.rounds_up:
        vgg.notes.append(
            "SSD's pool5 has windows of 3x3 pixels and stride 1; the pool5 of the converted "
            "network is that of a VGG, and its features are those of SSD up to conv5"
        )
    # Poolings of PyTorch round odd sizes down. A flattening fixes the size, so that none is odd.
    is_fixed = vgg.head is not None and vgg.head.pooling == "flatten"
    return network.build(
        replace(container, preprocess=vgg.preprocess or container.preprocess),
        known_layouts.of_torch(container.kind, vgg),
        vgg.convolutions,
        vgg.head,
        sorted({*vgg.left_out, *(set(container.arrays) - set(arrays))}),
        vgg.notes,
        padding="SAME" if vgg.rounds_up or is_fixed else "VALID",
    )
