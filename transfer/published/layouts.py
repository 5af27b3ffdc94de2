"""How published weights are laid out: names and shapes → a VGG's layers, in one layout.

Here all are float32: kernels of convolutions ``[3, 3, inputs, outputs]``, of fully connected layers
``[inputs, outputs]`` with the inputs of fc6 in the order height, width, channel. The order of the
colours stays that of the source, and so does what it expects of its images: ``preprocess``.

The layouts and where they come from:

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

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from transfer.published.containers import Container
from transfer.vgg import ARCHITECTURES, Architecture

_OXFORD = "CC BY 4.0 (weights: Visual Geometry Group, University of Oxford)"
_BATCH_NORM_EPSILON = 1e-5  # of torch.nn.BatchNorm2d


@dataclass(frozen=True)
class Layout:
    """One way to write a VGG down.

    Args:
        name: for people.
        container: what kind of file it comes in.
        pattern: of an array's name, with a group ``layer``.
        preprocess: what the weights expect: a key of ``transfer.preprocess.CONVENTIONS``.
        licence: of the published weights.
        outputs_first: kernels are ``[outputs, inputs, height, width]`` and ``[outputs, inputs]``,
            and the inputs of fc6 are in the order channel, height, width.
        columns_first: the two spatial axes are exchanged.
    """

    name: str
    container: str
    pattern: str
    preprocess: str
    licence: str | None = _OXFORD
    outputs_first: bool = False
    columns_first: bool = False


# Layers in their order, by the beginning of their names; any other is the last one.
_KINDS = ("block", "conv", "features", "fc", "dense", "pre_logits", "classifier")
_LAYER = r"(?P<layer>conv\d_\d|fc[678])"
_TORCH = (
    r"(?:.*/)?(?:module\.|model\.)?(?P<layer>(?:features|classifier)\.\d+|pre_logits\.fc[12]|head\.fc)"
    r"\.(?:weight|bias|running_mean|running_var)$"
)
LAYOUTS = (
    Layout("keras", "HDF5", r"(?:.*/)?(?P<layer>block\d_conv\d|fc[12]|predictions)/.*", "caffe"),
    Layout("keras", "HDF5", r"(?:.*/)?(?P<layer>(?:conv2d|dense)(?:_\d+)?)/(?:.*/)?[^/]*", "caffe"),
    Layout(
        "tf-slim", "checkpoint", rf"vgg_\w+/(?:conv\d/|fc/)?{_LAYER}/(?:weights|biases)$", "slim"
    ),
    Layout("frossard", "npz", rf"{_LAYER}_[Wb]$", "slim", None),
    Layout("machrisaa", "npy", rf"(?:.*/)?{_LAYER}/[01]$", "caffe", None),
    Layout("torchvision", "PyTorch", _TORCH, "torch", "BSD-3-Clause", outputs_first=True),
    Layout("timm", "safetensors", _TORCH, "torch", "BSD-3-Clause", outputs_first=True),
    Layout("matconvnet", "MatConvNet", rf"{_LAYER}/[01]$", "slim"),
    Layout(
        "matconvnet, before 1.0-beta9",
        "MatConvNet",
        rf"{_LAYER}/(?:filters|biases)$",
        "slim",
        columns_first=True,
    ),
    Layout("caffe", "Caffe", rf"{_LAYER}/[01]$", "caffe", outputs_first=True),
    Layout("tfmodel", "frozen graph", rf"(?:import/)?{_LAYER}/[a-z]+$", "caffe", None),
)


@dataclass(frozen=True)
class Published:
    """The weights of a VGG, as ``vgg.build_graph`` names them, and what they expect.

    ``num_classes`` is ``None`` where there are no fully connected layers. ``left_out`` are arrays
    that are no part of it.
    """

    layout: Layout
    architecture: Architecture
    name: str
    num_classes: int | None
    values: dict[str, np.ndarray]
    left_out: list[str]

    @property
    def licence(self) -> str | None:
        """That of the published weights, if these may be them: a network for ImageNet, or what is
        below its classes."""
        is_torch = self.layout.preprocess == "torch"
        may_be = self.num_classes in (None, 1000) and (is_torch or self.name in ("vgg16", "vgg19"))
        return self.layout.licence if may_be else None


def identify(container: Container, *, columns_first: bool | None = None) -> Published:
    """Tell which layout a file has, and bring it into ours.

    Args:
        container: from ``containers.read``.
        columns_first: overrules the layout's; only MatConvNet's files are known in both orders.

    Raises:
        ValueError: says what was found and what was expected.
    """
    candidates = [layout for layout in LAYOUTS if layout.container == container.kind]
    found = [(layout, _layers(layout, container.arrays)) for layout in candidates]
    layout, layers = max(found, key=lambda pair: len(pair[1]), default=(None, {}))
    if layout is None or not layers:
        names = ", ".join(list(container.arrays)[:6]) or "none"
        raise ValueError(
            f"it is a {container.kind} file with {len(container.arrays)} arrays ({names}, ...); no "
            "known layout of a VGG has such names"
        )
    if columns_first is not None and layout.container != "MatConvNet":
        raise ValueError(
            f"its layout is {layout.name}, whose spatial order is known; only MatConvNet's files "
            "come in two orders"
        )
    taken = {name for layer in layers.values() for name in layer}
    left_out = sorted(set(container.arrays) - taken)
    if columns_first is None:
        columns_first = layout.columns_first
    convolutions: list[tuple[np.ndarray, np.ndarray]] = []
    connected: list[tuple[np.ndarray, np.ndarray]] = []
    for name, arrays in _in_order(layers):
        kernel, biases = _kernel_and_biases(name, list(arrays.values()))
        if layout.outputs_first:
            is_first = convolutions and not connected and kernel.ndim == 2
            kernel = _outputs_last(kernel, convolutions[-1][0].shape[-1] if is_first else None)
        if columns_first and kernel.ndim == 4:
            kernel = kernel.transpose(1, 0, 2, 3)
        is_convolution = _position(name)[0] < _KINDS.index("fc")
        (convolutions if is_convolution else connected).append((kernel, biases))
    architecture, name = _architecture(convolutions, connected)
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
    return Published(layout, architecture, name, num_classes, values, left_out)


def _layers(layout: Layout, arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Layer to its arrays by name."""
    layers: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for name, values in arrays.items():
        if match := re.fullmatch(layout.pattern, name):
            layers[match["layer"]][name] = values
    return dict(layers)


def _in_order(
    layers: Mapping[str, dict[str, np.ndarray]],
) -> list[tuple[str, dict[str, np.ndarray]]]:
    """From the images on. Batch norm is folded into the convolution before it."""
    ordered: list[tuple[str, dict[str, np.ndarray]]] = []
    for name in sorted(layers, key=_position):
        arrays = layers[name]
        if any(key.endswith("running_mean") for key in arrays):
            if not ordered:
                raise ValueError(f"its layer {name} normalises the images; no VGG does")
            ordered[-1] = (ordered[-1][0], _folded(ordered[-1][1], arrays))
        else:
            ordered.append((name, arrays))
    return ordered


def _position(layer: str) -> tuple[int, list[int]]:
    kind = next((i for i, kind in enumerate(_KINDS) if layer.startswith(kind)), len(_KINDS))
    return kind, [int(number) for number in re.findall(r"\d+", layer.removeprefix("conv2d"))]


def _kernel_and_biases(name: str, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    kernels = [values for values in arrays if values.ndim > 1]
    biases = [values for values in arrays if values.ndim == 1]
    if len(kernels) != 1 or len(biases) != 1:
        shapes = ", ".join(str(values.shape) for values in arrays)
        raise ValueError(f"its layer {name} has arrays {shapes}; expected a kernel and biases")
    return kernels[0], biases[0]


def _folded(
    convolution: Mapping[str, np.ndarray], norm: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A convolution that does what it and the batch norm after it do, kernel ``[outputs, ...]``."""
    by_part = {name.rsplit(".", 1)[1]: values for name, values in norm.items()}
    kernel, biases = _kernel_and_biases("before a batch norm", list(convolution.values()))
    try:
        scale = by_part["weight"] / np.sqrt(by_part["running_var"] + _BATCH_NORM_EPSILON)
        shift = by_part["bias"] - by_part["running_mean"] * scale
        return {"kernel": kernel * scale[:, None, None, None], "biases": biases * scale + shift}
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"a batch norm of it does not fit its convolution: {error}") from error


def _outputs_last(kernel: np.ndarray, channels: int | None) -> np.ndarray:
    """``[outputs, inputs, height, width]`` or ``[outputs, inputs]`` to ``[height, width, inputs,
    outputs]``; with ``channels`` the inputs of a matrix are in the order channel, height, width."""
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
) -> tuple[Architecture, str]:
    """The one with these layers, and its name in ``vgg.ARCHITECTURES``."""
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
    window = math.isqrt(sizes[0][0] // widths[-1])
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
    return Architecture(blocks, sizes[0][1], window * 2 ** len(blocks)), name


def _check_finite(values: Mapping[str, np.ndarray]) -> None:
    broken = [name for name, array in values.items() if not np.isfinite(array).all()]
    if broken:
        raise ValueError(f"its {', '.join(broken)} hold numbers that are not finite; get it again")
