"""Layouts of published weights: identify a layout by names and shapes, and convert it to a common
one.

In the common layout all arrays are float32: kernels of convolutions ``[3, 3, inputs, outputs]``, of
fully connected layers ``[inputs, outputs]`` with the inputs of fc6 in the order height, width,
channel. The channel order of the images and the preprocessing stay those of the source.

Every array of a file is either used, or known to have no effect, or part of a layer with its own
kernel that is left out and reported: a head. Any other array ends the conversion with an error,
since without it the network would compute a different function.

The layouts and their sources:

=================  =========================================================================
keras              keras.applications.vgg16, vgg19: github.com/keras-team/keras-applications
tf-slim            github.com/tensorflow/models, research/slim: vgg_16.ckpt, vgg_19.ckpt
frossard           cs.toronto.edu/~frossard/post/vgg16: vgg16_weights.npz
machrisaa          github.com/machrisaa/tensorflow-vgg: vgg16.npy, vgg19.npy
torchvision, timm  pytorch.org/vision, github.com/huggingface/pytorch-image-models
matconvnet         vlfeat.org/matconvnet/pretrained: imagenet-vgg-verydeep-16.mat, -19
caffe              robots.ox.ac.uk/~vgg/research/very_deep: VGG_ILSVRC_16_layers.caffemodel
tfmodel            github.com/ry/tensorflow-vgg16: vgg16.tfmodel
=================  =========================================================================
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from transfer.vgg.architectures import ARCHITECTURES, Architecture
from transfer.vgg.published import keras_vgg, torch_vgg
from transfer.vgg.published.batch_norm import BatchNorm
from transfer.vgg.published.containers import Container

# Default epsilons of the original layers; weight files do not contain them.
_KERAS_EPSILON, _SLIM_EPSILON = 1e-3, 1e-3
_HARMLESS = re.compile(
    r"num_batches_tracked$|global_step|mean_rgb$|save_counter|learning_rate|iterations?\b|seed_gen"
    r"|optimizer|Adam|Momentum|RMSProp|Adagrad|ExponentialMovingAverage|beta\d_power|loss_scale"
    r"|/(biased|local_step)$"
)
_MAX_HARMLESS = 4  # elements: a channel mean, a step, a learning rate


@dataclass(frozen=True)
class Layout:
    """Names, shapes and preprocessing of one kind of published weights.

    Args:
        name: name for messages.
        container: ``Container.kind`` of its files.
        pattern: regular expression for array names, with a group ``layer``.
        preprocess: preprocessing of the published weights: a key of
            ``transfer.images.preprocess.CONVENTIONS``.
        outputs_first: kernels are ``[outputs, inputs, height, width]`` and ``[outputs, inputs]``,
            and the inputs of fc6 are in the order channel, height, width.
        columns_first: the two spatial axes are swapped.
    """

    name: str
    container: str
    pattern: str
    preprocess: str
    outputs_first: bool = False
    columns_first: bool = False


# Prefixes of layer names in the order of the layers; other names come last.
_KINDS = ("block", "conv", "features", "fc", "dense", "pre_logits", "classifier")
_LAYER = r"(?P<layer>conv\d_\d|fc[678])"
_SLIM = r"(?:weights|biases|BatchNorm/(?:beta|gamma|moving_mean|moving_variance))"
LAYOUTS = (
    Layout("keras", "HDF5", r"(?:.*/)?(?P<layer>block\d_conv\d|fc[12]|predictions)/.*", "caffe"),
    Layout("keras", "HDF5", r"(?:.*/)?(?P<layer>(?:conv2d|dense)(?:_\d+)?)/(?:.*/)?[^/]*", "caffe"),
    Layout("tf-slim", "checkpoint", rf"vgg_\w+/(?:conv\d/|fc/)?{_LAYER}/{_SLIM}$", "slim"),
    Layout("frossard", "npz", rf"{_LAYER}_[Wb]$", "slim"),
    Layout("machrisaa", "npy", rf"(?:.*/)?{_LAYER}/[01]$", "caffe"),
    Layout("torchvision", "PyTorch", "", "torch"),  # by torch_vgg
    Layout("timm", "safetensors", "", "torch"),
    Layout("matconvnet", "MatConvNet", rf"{_LAYER}/[01]$", "slim"),
    Layout(
        "matconvnet, before 1.0-beta9",
        "MatConvNet",
        rf"{_LAYER}/(?:filters|biases)$",
        "slim",
        columns_first=True,
    ),
    Layout("caffe", "Caffe", rf"{_LAYER}/[01]$", "caffe", outputs_first=True),
    Layout("tfmodel", "frozen graph", rf"(?:import/)?{_LAYER}/[a-z]+$", "caffe"),
)


@dataclass(frozen=True)
class Published:
    """The weights of a VGG under the names of ``architectures.build_graph``, and their properties.

    ``num_classes`` is ``None`` if there are no fully connected layers. ``left_out`` are layers and
    arrays that are not part of the network, ``notes`` are assumptions. ``preprocess`` and
    ``labels`` are those stored in the file, if any.
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
        pooling: the layer before the first fully connected layer, ``flatten`` or ``average``, if
            the file does not say and the number of inputs fits both.
        leave_out: name patterns of arrays to ignore.

    Raises:
        ValueError: states what was found and what was expected.
    """
    if container.model is not None:
        return _of_keras(container, pooling)
    arrays = {
        name: values
        for name, values in container.arrays.items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in leave_out)
    }
    if container.kind in ("PyTorch", "safetensors"):
        return _of_torch(container, arrays, pooling)
    layout, layers = _layout(container.kind, arrays)
    if columns_first is not None and layout.container != "MatConvNet":
        raise ValueError(
            f"its layout is {layout.name}, whose spatial order is known; only MatConvNet's files "
            "come in two orders"
        )
    if columns_first is None:
        columns_first = layout.columns_first
    taken = {name for layer in layers.values() for name in layer}
    others = {name: values for name, values in arrays.items() if name not in taken}
    ordered = _in_order(layers)
    if layout.container == "HDF5":
        _add_keras_norms(ordered, others, container.order)
    notes = [
        f"batch norm folded with epsilon {layer.norm.epsilon:g}, the original default"
        for layer in ordered
        if layer.norm is not None
    ][:1]
    convolutions: list[tuple[np.ndarray, np.ndarray]] = []
    connected: list[tuple[np.ndarray, np.ndarray]] = []
    for layer in ordered:
        kernel, biases = layer.folded(0 if layout.outputs_first else -1)
        if layout.outputs_first:
            is_first = convolutions and not connected and kernel.ndim == 2
            kernel = _outputs_last(kernel, convolutions[-1][0].shape[-1] if is_first else None)
        if columns_first and kernel.ndim == 4:
            kernel = kernel.transpose(1, 0, 2, 3)
        is_convolution = _position(layer.name)[0] < _KINDS.index("fc")
        (convolutions if is_convolution else connected).append((kernel, biases))
    left_out = sorted(set(container.arrays) - set(arrays)) + _left_out(others)
    if connected and pooling is None and _is_ambiguous(convolutions, connected):
        heads = [layer for layer in ordered if _position(layer.name)[0] >= _KINDS.index("fc")]
        left_out += [layer.name for layer in heads]
        notes.append(
            f"the head is left out: its first layer takes {connected[0][0].shape[-2]} inputs, "
            "which are those of a flattening where images have 32 pixels, or an average over "
            "space, and the file does not say; pooling=flatten or pooling=average keeps it"
        )
        connected = []
    return _published(container, layout, convolutions, connected, left_out, notes, pooling)


def _of_keras(container: Container, pooling: str | None) -> Published:
    """Identify a file that contains the configuration of a Keras model."""
    assert container.model is not None
    if pooling is not None:
        raise ValueError("its configuration says what stands before its fully connected layers")
    vgg = keras_vgg.interpret(container.model)
    convolutions = [(weights.kernel, weights.biases) for weights in vgg.convolutions]
    connected = [(weights.kernel, weights.biases) for weights in vgg.connected]
    architecture, name = _architecture(convolutions, [], "flatten")
    blocks = tuple(tuple(block) for block in vgg.blocks if block)
    if blocks != architecture.blocks:
        raise ValueError(f"its convolutions between poolings are {blocks}; those of {name} differ")
    if connected:
        try:
            _architecture(convolutions, connected, vgg.pooling)
        except ValueError as error:
            vgg.left_out, vgg.why = [weights.name for weights in vgg.connected], str(error)
            connected = []
    left_out = vgg.left_out
    notes = [f"the head is left out: {vgg.why}"] if vgg.why else []
    container = replace(container, preprocess=vgg.preprocess or container.preprocess)
    return _published(container, LAYOUTS[0], convolutions, connected, left_out, notes, vgg.pooling)


def _published(
    container: Container,
    layout: Layout,
    convolutions: Sequence[tuple[np.ndarray, np.ndarray]],
    connected: Sequence[tuple[np.ndarray, np.ndarray]],
    left_out: list[str],
    notes: list[str],
    pooling: str | None,
) -> Published:
    architecture, name = _architecture(convolutions, connected, pooling or "flatten")
    values = {}
    layer_names = [n for block in architecture.convolutions for n, _ in block]
    for layer_name, (kernel, biases) in zip(layer_names, convolutions, strict=True):
        values[f"{layer_name}/weights"], values[f"{layer_name}/biases"] = kernel, biases
    for layer_name, (kernel, biases) in zip(("fc6", "fc7", "fc8"), connected, strict=False):
        flat = kernel.reshape(-1, kernel.shape[-1])
        values[f"{layer_name}/weights"], values[f"{layer_name}/biases"] = flat, biases
    values = {key: np.ascontiguousarray(value, np.float32) for key, value in values.items()}
    _check_finite(values)
    num_classes = len(connected[-1][1]) if connected else None
    labels = container.labels if len(container.labels) == num_classes else ()
    return Published(
        layout,
        architecture,
        name,
        num_classes,
        values,
        left_out,
        notes,
        container.preprocess,
        labels,
    )


def _layout(
    kind: str, arrays: Mapping[str, np.ndarray]
) -> tuple[Layout, dict[str, dict[str, np.ndarray]]]:
    """The layout that matches the most layers, and the arrays of these layers."""
    candidates = [layout for layout in LAYOUTS if layout.container == kind]
    matches = [(layout, _layers(layout, arrays)) for layout in candidates]
    layout, layers = max(matches, key=lambda pair: len(pair[1]), default=(None, {}))
    if layout is None or not layers:
        names = ", ".join(list(arrays)[:6]) or "none"
        raise ValueError(
            f"it is a {kind} file with {len(arrays)} arrays ({names}, ...); no known layout of a "
            "VGG has such names"
        )
    return layout, layers


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


def _architecture(
    convolutions: Sequence[tuple[np.ndarray, np.ndarray]],
    connected: Sequence[tuple[np.ndarray, np.ndarray]],
    pooling: str,
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
    blocks = ARCHITECTURES[name].blocks
    for kernel, biases in [*convolutions, *connected]:
        if biases.shape != kernel.shape[-1:]:
            raise ValueError(f"it has {len(biases)} biases for a kernel of shape {kernel.shape}")
    if not connected:
        return Architecture(blocks, image_size=ARCHITECTURES[name].image_size), name
    sizes = [(math.prod(kernel.shape[:-1]), kernel.shape[-1]) for kernel, _ in connected]
    is_average = pooling == "average"
    window = 1 if is_average else math.isqrt(sizes[0][0] // widths[-1])
    chain = [sizes[0][1], sizes[0][1]]
    if (
        len(sizes) != 3
        or window < 1
        or sizes[0][0] != window**2 * widths[-1]
        or [size[0] for size in sizes[1:]] != chain
        or sizes[1][1] != sizes[0][1]
    ):
        raise ValueError(
            f"it has fully connected layers of {sizes} inputs and outputs; expected three, the "
            f"first with a square times {widths[-1]} inputs, the first two of one width"
        )
    size = ARCHITECTURES[name].image_size if is_average else window * 2 ** len(blocks)
    return Architecture(blocks, sizes[0][1], size, pooling), name


def _check_finite(values: Mapping[str, np.ndarray]) -> None:
    broken = [name for name, array in values.items() if not np.isfinite(array).all()]
    if broken:
        raise ValueError(f"its {', '.join(broken)} have values that are not finite; get it again")


def _of_torch(
    container: Container, arrays: Mapping[str, np.ndarray], pooling: str | None
) -> Published:
    """Identify the state dict of a PyTorch model."""
    vgg = torch_vgg.interpret(arrays, pooling)
    architecture, name, values = torch_vgg.network(vgg)
    _check_finite(values)
    head = vgg.head
    return Published(
        next(one for one in LAYOUTS if one.container == container.kind),
        architecture,
        name,
        head.num_classes if head else None,
        values,
        sorted({*vgg.left_out, *(set(container.arrays) - set(arrays))}),
        [*vgg.notes, *([head.note] if head and head.note else [])],
        vgg.preprocess or container.preprocess,
        container.labels if head and len(container.labels) == head.num_classes else (),
    )
