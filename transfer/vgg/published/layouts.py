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
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from transfer.images.preprocess import Size, as_size
from transfer.vgg.architectures import ARCHITECTURES, Architecture
from transfer.vgg.published import heads, keras_vgg, keras_weights, known_layouts, torch_vgg
from transfer.vgg.published.batch_norm import BatchNorm
from transfer.vgg.published.containers import Container
from transfer.vgg.published.heads import Dense, Head, UnsupportedHeadError, channels_last
from transfer.vgg.published.known_layouts import LAYOUTS, Layout

# Default epsilons of the original layers; weight files do not contain them.
_KERAS_EPSILON, _SLIM_EPSILON = 1e-3, 1e-3
_HARMLESS = re.compile(
    r"num_batches_tracked$|global_step|mean_rgb$|save_counter|learning_rate|iterations?\b|seed_gen"
    r"|optimizer|Adam|Momentum|RMSProp|Adagrad|ExponentialMovingAverage|beta\d_power|loss_scale"
    r"|/(biased|local_step)$"
)
_MAX_HARMLESS = 4  # elements: a channel mean, a step, a learning rate
# Prefixes of layer names in the order of the layers; other names come last.
_KINDS = ("block", "conv", "features", "fc", "dense", "pre_logits", "classifier")


@dataclass(frozen=True)
class Published:
    """The weights of a VGG under the names of ``architectures.build_graph``, and their properties.

    ``num_classes`` is ``None`` if there are no fully connected layers. ``left_out`` are layers and
    arrays that are not part of the network, ``notes`` are assumptions. ``preprocess``, ``labels``
    and ``image_size`` are those stored in the file, if any; ``head_layers`` are the names of the
    fully connected layers in the file.
    """

    layout: Layout
    architecture: Architecture
    name: str
    num_classes: int | None
    values: dict[str, np.ndarray]
    left_out: list[str]
    notes: list[str] = field(default_factory=list)
    preprocess: dict[str, Any] | None = None
    labels: Sequence[str] = ()
    image_size: Size | None = None
    head_layers: Sequence[str] = ()


@dataclass
class _Layer:
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


def identify(
    container: Container,
    *,
    columns_first: bool | None = None,
    pooling: str | None = None,
    leave_out: Sequence[str] = (),
) -> Published:
    """Identify the layout of a file and convert it to the common layout.

    Args:
        container: from ``containers.read``.
        columns_first: overrides that of the layout; only MatConvNet files exist in both orders.
        pooling: the layer before the first fully connected layer, ``flatten``, ``average``
            or ``max``, if the file does not say and the number of inputs fits all.
        leave_out: name patterns of arrays to ignore.

    Raises:
        ValueError: states what was found and what was expected.
    """
    if columns_first is not None and container.kind != "MatConvNet":
        raise ValueError(
            f"it is a {container.kind} file, whose spatial order is known; only MatConvNet's files "
            "come in two orders"
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
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in leave_out)
    }
    if container.kind in ("PyTorch", "safetensors", "Lasagne", "Paddle", "MXNet"):
        return _of_torch(container, arrays, pooling)
    layout, layers = _layout(container.kind, arrays)
    if columns_first is None:
        columns_first = layout.columns_first
    taken = {name for layer in layers.values() for name in layer}
    others = {name: values for name, values in arrays.items() if name not in taken}
    ordered = _in_order(layers)
    head_norms: list[str] = []
    if layout.container in ("HDF5", "TF2 checkpoint"):
        head_norms = keras_weights.pop_head_norms(layers, others)
        _add_keras_norms(ordered, others, container.order)
    notes = [
        f"batch norm folded with epsilon {layer.norm.epsilon:g}, the original default"
        for layer in ordered
        if layer.norm is not None
    ][:1]
    convolutions: list[tuple[np.ndarray, np.ndarray]] = []
    connected: list[tuple[np.ndarray, np.ndarray]] = []
    names: list[str] = []  # of the connected layers
    is_theano = layout.container == "HDF5" and _is_theano(ordered[0].kernel)
    for layer in ordered:
        kernel, biases = layer.folded(0 if layout.outputs_first else -1)
        if layout.outputs_first:
            is_first = convolutions and not connected and kernel.ndim == 2
            kernel = _outputs_last(kernel, convolutions[-1][0].shape[-1] if is_first else None)
        if is_theano and kernel.ndim == 4:
            kernel = kernel[:, :, ::-1, ::-1].transpose(2, 3, 1, 0)
        if columns_first and kernel.ndim == 4:
            kernel = kernel.transpose(1, 0, 2, 3)
        # Some networks have their fully connected layers as convolutions, without another name.
        is_named = _position(layer.name)[0] < _KINDS.index("fc") or layer.name.startswith("layer_")
        is_convolution = is_named and kernel.ndim == 4
        is_convolution &= not convolutions or (not connected and kernel.shape[:2] == (3, 3))
        is_first = convolutions and not connected and not is_convolution
        if is_first and (layout.channels_first or is_theano):
            kernel = _channels_last(kernel, convolutions[-1][0].shape[-1])
        names += [] if is_convolution else [layer.name]
        (convolutions if is_convolution else connected).append((kernel, biases))
    left_out = sorted(set(container.arrays) - set(arrays)) + _left_out(others)
    head = None
    if connected:
        try:
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
            _architecture(convolutions, head)
        except ValueError as error:
            head, left_out = None, [*left_out, *names]
            notes.append(f"the head is left out: {error}")
    return _published(container, layout, convolutions, head, left_out, notes)


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


def without_head(published: Published) -> Published:
    """The network up to its last pooling."""
    if published.num_classes is None:
        return published
    names = [name for name, *_ in published.architecture.connected]
    table = ARCHITECTURES[published.name]
    size = published.architecture.image_size
    return replace(
        published,
        architecture=Architecture(
            table.blocks, image_size=size, padding=published.architecture.padding
        ),
        num_classes=None,
        values={k: v for k, v in published.values.items() if k.split("/")[0] not in names},
        left_out=[*published.left_out, *published.head_layers],
        labels=(),
        head_layers=(),
    )


def _of_keras(container: Container, pooling: str | None) -> Published:
    """Identify a file that contains the configuration of a Keras model."""
    assert container.model is not None
    if pooling is not None:
        raise ValueError("the file says what stands before its fully connected layers")
    vgg = keras_vgg.interpret(container.model)
    convolutions = [(weights.kernel, weights.biases) for weights in vgg.convolutions]
    architecture, name = _architecture(convolutions, None)
    blocks = tuple(tuple(block) for block in vgg.blocks if block)
    if blocks != architecture.blocks:
        raise ValueError(f"its convolutions between poolings are {blocks}; those of {name} differ")
    size, padding = vgg.image_size, _padding(vgg)
    left_out, why, head = vgg.left_out, vgg.why, vgg.head
    if head is not None:
        try:
            _architecture(convolutions, head, size, padding)
        except ValueError as error:
            left_out, why = [layer.name for layer in head.connected], str(error)
            head = None
    notes = [f"the head is left out: {why}"] if why else []
    container = replace(container, preprocess=vgg.preprocess or container.preprocess)
    layout = next(one for one in LAYOUTS if one.container == container.kind)
    return _published(container, layout, convolutions, head, left_out, notes, size, padding)


def _padding(vgg: keras_vgg.KerasVGG) -> str:
    """The padding of a model's poolings, which only matters where they halve odd sizes."""
    if len(vgg.paddings) < 2:
        return next(iter(vgg.paddings), "SAME")
    if vgg.image_size is None or any(size % 2 ** len(vgg.blocks) for size in vgg.image_size):
        raise ValueError("some of its poolings round odd sizes up, and others down")
    return "SAME"


def _published(
    container: Container,
    layout: Layout,
    convolutions: Sequence[tuple[np.ndarray, np.ndarray]],
    head: Head | None,
    left_out: list[str],
    notes: list[str],
    size: tuple[int, int] | None = None,
    padding: str = "SAME",
) -> Published:
    """The network of these layers; ``size`` and ``padding`` are those of the file, if it has
    them."""
    architecture, name = _architecture(convolutions, head, size, padding)
    values = {}
    layer_names = [n for block in architecture.convolutions for n, _ in block]
    for layer_name, (kernel, biases) in zip(layer_names, convolutions, strict=True):
        values[f"{layer_name}/weights"], values[f"{layer_name}/biases"] = kernel, biases
    if head is not None:
        for (layer_name, *_), layer in zip(architecture.connected, head.connected, strict=True):
            values[f"{layer_name}/weights"] = layer.kernel
            values[f"{layer_name}/biases"] = layer.biases
    values = {key: np.ascontiguousarray(value, np.float32) for key, value in values.items()}
    _check_finite(values)
    num_classes = head.num_classes if head else None
    labels = (head.class_names if head else ()) or container.labels
    return Published(
        layout,
        architecture,
        name,
        num_classes,
        values,
        left_out,
        [*notes, *([head.note] if head and head.note else [])],
        container.preprocess,
        labels if len(labels) == num_classes else (),
        None if size is None else as_size(size),
        tuple(layer.name for layer in head.connected) if head else (),
    )


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
        raise ValueError(
            f"it is a {kind} file with {len(arrays)} arrays ({names}, ...); no known layout of a "
            "VGG has such names"
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


def _in_order(layers: Mapping[str, dict[str, np.ndarray]]) -> list[_Layer]:
    """The layers in order, each with the batch norm that directly follows it."""
    ordered: list[_Layer] = []
    for name in sorted(layers, key=_position):
        arrays = layers[name]
        norm = _slim_norm(name, arrays)
        parts = [v for key, v in arrays.items() if "/BatchNorm/" not in key]
        ordered.append(_Layer(name, *_kernel_and_biases(name, parts), norm))
    return ordered


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


def _add_keras_norms(
    ordered: Sequence[_Layer], others: dict[str, np.ndarray], names: Sequence[str]
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
        kernels = [others[name] for name in names if others[name].ndim > 1]
        biases = [others[name] for name in names if others[name].ndim == 1]
        fits = all(len(values) in kernel.shape for values in biases for kernel in kernels)
        if len(kernels) != 1 or len(biases) > 1 or not fits:
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


def _position(layer: str) -> tuple[int, list[int]]:
    kind = next((i for i, kind in enumerate(_KINDS) if layer.startswith(kind)), len(_KINDS))
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


def _is_theano(kernel: np.ndarray) -> bool:
    """Whether a first convolution is that of a model for Theano, whose convolutions are flipped and
    whose kernels are ``[outputs, inputs, height, width]``. ``convert_all_kernels_in_model`` of
    Keras 1 flips them for TensorFlow."""
    return kernel.shape[1:] == (3, 3, 3) and kernel.shape[0] != 3


def _channels_last(kernel: np.ndarray, channels: int) -> np.ndarray:
    """``[inputs, outputs]`` with inputs in the order channel, height, width to height, width,
    channel."""
    if len(kernel) % channels:
        raise ValueError(f"its first fully connected layer takes {len(kernel)} inputs")
    return channels_last(kernel, channels)


def _architecture(
    convolutions: Sequence[tuple[np.ndarray, np.ndarray]],
    head: Head | None,
    size: tuple[int, int] | None = None,
    padding: str = "SAME",
) -> tuple[Architecture, str]:
    """The architecture with these layers, and its name in ``architectures.ARCHITECTURES``."""
    widths = tuple(kernel.shape[-1] for kernel, _ in convolutions)
    known = {
        tuple(width for block in table.blocks for width in block): name
        for name, table in ARCHITECTURES.items()
    }
    shapes = [kernel.shape for kernel, _ in convolutions]
    inputs = (3, *widths[:-1])
    expected = [(3, 3, before, after) for before, after in zip(inputs, widths, strict=False)]
    if widths not in known or shapes != expected:
        raise ValueError(
            f"it has {len(widths)} 3x3 convolutions of widths {list(widths)}; expected those of "
            f"{', '.join(known.values())}"
        )
    name = known[widths]
    table = ARCHITECTURES[name]
    for kernel, biases in convolutions:
        if biases.shape != kernel.shape[-1:]:
            raise ValueError(f"it has {len(biases)} biases for a kernel of shape {kernel.shape}")
    pixels = size[0] if size and size[0] == size[1] else table.image_size
    if head is None:
        return Architecture(table.blocks, image_size=pixels, padding=padding), name
    inputs_of_head = head.connected[0].kernel.shape[0]
    window = 1
    if head.pooling == "flatten":
        window = math.isqrt(inputs_of_head // widths[-1])
        pixels = pixels if size else window * 2 ** len(table.blocks)
    if window < 1 or inputs_of_head != window**2 * widths[-1]:
        raise ValueError(
            f"its first layer takes {inputs_of_head} inputs; expected a square times the "
            f"{widths[-1]} outputs of the last convolution"
            + ("" if head.pooling == "flatten" else f", which the {head.pooling} makes one")
        )
    hidden = tuple((layer.kernel.shape[1], layer.activation) for layer in head.connected[:-1])
    is_plain = len(hidden) == 2 and hidden[0] == hidden[1] and hidden[0][1] == "relu"
    architecture = Architecture(
        table.blocks,
        hidden[0][0] if hidden else table.fc,
        pixels,
        head.pooling,
        None if is_plain else hidden,
        padding,
    )
    if head.pooling == "flatten" and (
        architecture.pooled_size != window or (size and size[0] != size[1])
    ):
        shape = f"{size[0]} x {size[1]}" if size else f"{pixels} x {pixels}"
        raise ValueError(
            f"its first layer takes {inputs_of_head} inputs, {window} x {window} pixels; its "
            f"images have {shape}"
        )
    return architecture, name


def _check_finite(values: Mapping[str, np.ndarray]) -> None:
    broken = [name for name, array in values.items() if not np.isfinite(array).all()]
    if broken:
        raise ValueError(f"its {', '.join(broken)} have values that are not finite; get it again")


def _of_torch(
    container: Container, arrays: Mapping[str, np.ndarray], pooling: str | None
) -> Published:
    """Identify the state dict of a PyTorch model."""
    vgg = torch_vgg.interpret(arrays, pooling)
    # Poolings of PyTorch round odd sizes down. A flattening fixes the size, so that none is odd.
    is_fixed = vgg.head is not None and vgg.head.pooling == "flatten"
    return _published(
        replace(container, preprocess=vgg.preprocess or container.preprocess),
        known_layouts.of_torch(container.kind, vgg),
        vgg.convolutions,
        vgg.head,
        sorted({*vgg.left_out, *(set(container.arrays) - set(arrays))}),
        vgg.notes,
        padding="SAME" if vgg.rounds_up or is_fixed else "VALID",
    )
