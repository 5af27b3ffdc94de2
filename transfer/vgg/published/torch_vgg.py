"""Find a VGG in the state dict of a PyTorch model, whatever the names around it.

A state dict names modules by their place in the model, ``backbone.features.0.weight``, and says
nothing of layers without weights. Here, the convolutions are those 3x3 kernels whose names differ
in numbers only and whose widths are those of a VGG; names before these numbers do not matter.
Numbers of an ``nn.Sequential`` tell where other layers stand: a batch norm directly after its
convolution is folded, one after a ReLU is refused; ``nn.Linear`` after the convolutions, wherever
they are in the model, are the head if each takes the outputs of the one before.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from transfer.vgg.architectures import ARCHITECTURES
from transfer.vgg.published import heads
from transfer.vgg.published.batch_norm import BatchNorm
from transfer.vgg.published.heads import Head, UnsupportedHeadError
from transfer.vgg.published.torch_head import chain_of, steps_of
from transfer.vgg.published.torch_modules import (
    EPSILON,
    Module,
    ends_with_number,
    is_loss,
    is_vector,
    modules_of,
    unwrapped,
)

# torchvision publishes weights of VGG16 for feature extraction whose classifier is NaN, and their
# normalization: images in 0..1, minus this mean, divided by 1/255. Source: torchvision,
# models/vgg.py, VGG16_Weights.IMAGENET1K_FEATURES.
FEATURES_MEAN = {"mean": [0.48235 * 255, 0.45882 * 255, 0.40784 * 255], "order": "RGB"}
_FEATURES = 4096  # outputs of fc6 and fc7
_STANDARD_HEAD = ((0, 3, 6), ())


@dataclass
class TorchVGG:
    """``convolutions``: kernels ``[height, width, inputs, outputs]`` and biases. ``left_out``:
    modules and arrays that are not part of the network. ``names``: those of the convolutions."""

    convolutions: list[tuple[np.ndarray, np.ndarray]]
    names: list[str]
    head: Head | None = None
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    preprocess: dict[str, Any] | None = None
    rounds_up: bool = False


def interpret(arrays: Mapping[str, np.ndarray], pooling: str | None = None) -> TorchVGG:
    """Find the layers of a VGG.

    Args:
        arrays: from ``torch_file``, ``<path of the dictionary>/<name>``, or ``<name>``.
        pooling: the layer before the first fully connected layer, if the file does not say.

    Raises:
        ValueError: if the arrays hold no VGG, or one with other layers between its convolutions.
    """
    state, origins, others, notes = _chosen(arrays)
    modules, rest = modules_of(state)
    if adapter := next((key for key in state if re.search(r"(^|\.)lora_[AB]\.", key)), None):
        raise ValueError(
            f"its array {adapter} is that of an adapter (LoRA), which changes the layers; save "
            "model.merge_and_unload().state_dict()"
        )
    convolutions = _convolutions(modules)
    if convolutions is None:
        raise ValueError(_no_vgg(modules))
    used = {id(module) for module in convolutions}
    norms = _norms(modules, convolutions, used)
    _check_unknown(rest, [module for module in modules if id(module) in used], convolutions)
    vgg = TorchVGG(_folded(convolutions, norms), [module.name for module in convolutions])
    vgg.notes += notes
    if norms:
        vgg.notes.append(f"batch norm folded with epsilon {EPSILON:g}, PyTorch's default")
    losses = [f"{module.name}.weight" for module in modules if is_loss(module)]
    behind = [module for module in modules if id(module) not in used and not is_loss(module)]
    vgg.left_out = [*others, *rest, *losses]
    _add_head(vgg, behind, convolutions, pooling)
    vgg.left_out = [origins.get(name, name) for name in vgg.left_out]
    return vgg


def _chosen(
    arrays: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, str], list[str], list[str]]:
    """The state dict with a VGG: its arrays, their names in the file, the names of other arrays,
    and notes.

    Of weights and their exponential moving average, the average is taken: it is what such
    trainings evaluate. A classifier that was saved beside its features belongs to them, if there is
    one of each.
    """
    states: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for name, values in arrays.items():
        path, separator, key = name.rpartition("/")
        states[path + separator][key] = values
    fitting = [path for path, state in states.items() if _convolutions(modules_of(state)[0])]
    if not fitting:  # the largest one, for the message
        fitting = [max(states, key=lambda path: len(states[path]), default="")]
    averages = [path for path in fitting if re.search(r"(^|[/_.])ema([/_.]|$)", path, re.I)]
    chosen = (averages or fitting)[0]
    state = dict(states.get(chosen, {}))
    origins = {key: f"{chosen}{key}" for key in state}
    with_matrices = [
        path for path in states if any(values.ndim == 2 for values in states[path].values())
    ]
    joined = ""
    if len(fitting) == len(with_matrices) == 1 and chosen not in with_matrices:
        (joined,) = with_matrices
        name = joined.rstrip("/").rpartition("/")[2] or "head"
        for key, values in states[joined].items():
            state[f"{name}.{key}"] = values
            origins[f"{name}.{key}"] = f"{joined}{key}"
    others = [f"{path}*" for path in states if path not in (chosen, joined or chosen)]
    notes = []
    if len(fitting) > 1:
        among = ", ".join(path.rstrip("/") or "the file itself" for path in fitting)
        notes.append(
            f"the weights of {chosen.rstrip('/') or 'the file itself'} are taken, of {among}; "
            f"leave_out={chosen + '*'!r} takes another"
        )
    return state, origins, others, notes


def _check_unknown(
    rest: Sequence[str], used: Sequence[Module], convolutions: Sequence[Module]
) -> None:
    """Check that no array of an unknown kind belongs to a layer of the network or stands between
    them.

    Raises:
        ValueError: names the array.
    """
    names = {module.name for module in used}
    for key in rest:
        owner = Module(unwrapped(key.rpartition(".")[0]))
        is_between = owner.stem == convolutions[0].stem and owner.numbers < convolutions[-1].numbers
        if owner.name in names or is_between:
            raise ValueError(
                f"its array {key} belongs to a layer of the network, and its kind is not known; a "
                f"VGG without it would compute something else. If it has no effect: "
                f"leave_out={'*' + key!r}"
            )


def _convolutions(modules: Sequence[Module]) -> list[Module] | None:
    """The convolutions of a VGG, or ``None``. Of several the one with the most layers is taken.
    3x3 convolutions that follow the last one, as in SSD, do not belong to it."""
    stems: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        if module.has_kernel(4):
            stems[module.stem].append(module)
    known = [
        (len(widths), widths)
        for table in ARCHITECTURES.values()
        for widths in [[width for block in table.blocks for width in block]]
    ]
    for count, widths in sorted(known, reverse=True):
        shapes = [
            (after, before, 3, 3) for before, after in zip([3, *widths[:-1]], widths, strict=True)
        ]
        for members in stems.values():
            ordered = sorted(members, key=lambda module: module.numbers)[:count]
            if [module.kernel.shape for module in ordered] == shapes:
                return ordered
    return None


def _no_vgg(modules: Sequence[Module]) -> str:
    convolutions = [module for module in modules if module.has_kernel(4)]
    names = ", ".join(module.name for module in modules[:5]) or "none"
    widths = [module.kernel.shape[0] for module in convolutions]
    if convolutions and convolutions[0].kernel.shape == (3, 3, 1, 1):
        return (
            f"its first layer {convolutions[0].name} is a 1x1 convolution of colours: it is the "
            "encoder of a style transfer (AdaIN's vgg_normalised.pth), which pads by reflection; a "
            "VGG pads with zeros, and its features would differ near the borders"
        )
    known = ", ".join(ARCHITECTURES)
    kind = _kind(modules)
    return (
        f"it is {kind} with {len(convolutions)} convolutions of widths {widths[:20]} (modules "
        f"{names}, ...); expected the 3x3 convolutions of {known}"
        + ("" if kind == "a network" else ". This converter takes VGGs only")
    )


def _kind(modules: Sequence[Module]) -> str:
    """A well-known architecture by the names of its modules."""
    names = {module.name for module in modules}
    for kind, pattern in (
        ("a ResNet", r"(.*\.)?layer\d\.\d+\.(conv|downsample).*"),
        ("a DenseNet", r"(.*\.)?denseblock\d\.denselayer\d+\..*"),
        ("an Inception or GoogLeNet", r"(.*\.)?(Mixed_\d\w|inception\d\w)\..*"),
        ("a vision transformer", r"(.*\.)?(encoder\.layers|blocks|layers)[._].*(attn|attention).*"),
        ("a SqueezeNet", r"(.*\.)?features\.\d+\.squeeze"),
        ("a MobileNet or EfficientNet", r"(.*\.)?(features|blocks)\.\d+\.(\d+|block|conv).*"),
    ):
        if any(re.fullmatch(pattern, name) for name in names):
            return kind
    shapes = [module.kernel.shape for module in modules if module.has_kernel(4)]
    return "an AlexNet" if shapes and shapes[0][2:] == (11, 11) else "a network"


def _norms(
    modules: Sequence[Module], convolutions: Sequence[Module], used: set[int]
) -> dict[int, BatchNorm]:
    """Batch norms by the number of their convolution; adds them to ``used``.

    Raises:
        ValueError: if a layer between the convolutions is neither, or the numbers leave no place
            for the ReLU of a convolution.
    """
    stem = convolutions[0].stem
    places = {module.numbers: number for number, module in enumerate(convolutions)}
    first, last = convolutions[0].numbers, convolutions[-1].numbers
    is_bare = ends_with_number(stem)
    norms: dict[int, BatchNorm] = {}
    for module in modules:
        inside = module.stem == stem and first < module.numbers <= (*last[:-1], last[-1] + 2)
        if id(module) in used or not (inside or module.is_norm or is_vector(module)):
            continue
        before = (*module.numbers[:-1], module.numbers[-1] - 1) if module.numbers else ()
        if module.stem == stem and is_bare and before in places and module.is_norm:
            norms[places[before]] = module.norm()
            used.add(id(module))
        elif module.stem == stem and module.numbers < first:
            raise ValueError(f"its layer {module.name} normalises the images; no VGG does")
        elif (inside and (module.is_norm or module.numbers < last)) or (
            (module.is_norm or is_vector(module)) and _accompanies(module, convolutions)
        ):
            raise ValueError(_refusal(module, convolutions))
    if is_bare:
        _check_room(convolutions, norms)
    return norms


def _accompanies(module: Module, convolutions: Sequence[Module]) -> bool:
    """Whether a normalization stands in the same module as the convolutions, and has as many
    channels as one of them."""
    size = next(iter(module.parts.values())).size
    parents = {one.name.rpartition(".")[0] for one in convolutions}
    is_beside = module.name.rpartition(".")[0] in parents
    return is_beside and any(len(one.kernel) == size for one in convolutions)


def _refusal(module: Module, convolutions: Sequence[Module]) -> str:
    before = [one for one in convolutions if one.numbers < module.numbers]
    owner = (before or convolutions)[-1 if before else 0]
    kind = "batch norm" if module.is_norm else "layer"
    return (
        f"its {kind} {module.name} does not directly follow its layer {owner.name}: there is a "
        "ReLU or a pooling between them, or the names do not say, and it cannot be folded; a VGG "
        "without it would compute something else. If it stands behind the network: "
        f"leave_out='*{module.name}.*'"
    )


def _check_room(convolutions: Sequence[Module], norms: Mapping[int, BatchNorm]) -> None:
    """Check that the numbers leave places for a ReLU after each convolution; lists of convolutions
    alone have none."""
    gaps = []
    for number, (one, following) in enumerate(itertools.pairwise(convolutions)):
        if one.numbers[:-1] == following.numbers[:-1]:
            gaps.append((one, following.numbers[-1] - one.numbers[-1] - (number in norms)))
    if gaps and not all(gap == 1 for _, gap in gaps):
        for one, gap in gaps:
            if gap < 2:
                raise ValueError(
                    f"its convolution {one.name} is directly followed by another one; a VGG has a "
                    "ReLU between them"
                )


def _folded(
    convolutions: Sequence[Module], norms: Mapping[int, BatchNorm]
) -> list[tuple[np.ndarray, np.ndarray]]:
    layers = []
    has_biases = any("bias" in module.parts for module in convolutions)
    for number, module in enumerate(convolutions):
        kernel, biases = module.kernel, module.parts.get("bias")
        if number in norms:
            kernel, biases = norms[number].folded(f"after {module.name}", kernel, biases, 0)
        elif biases is None and has_biases:
            raise ValueError(
                f"its layer {module.name} has arrays {kernel.shape}; expected a kernel and biases"
            )
        if biases is None:
            biases = np.zeros(len(kernel), np.float32)
        layers.append((kernel.transpose(2, 3, 1, 0), biases))
    return layers


def _is_ssd(dense: Sequence[Module], channels: int) -> bool:
    """Whether the layers after the base begin with the fc6 and fc7 of SSD: a 3x3 convolution and a
    1x1 convolution of as many outputs. The decoder of a U-Net has 3x3 convolutions alone."""
    if len(dense) < 2:
        return False
    fc6, fc7 = dense[0].kernel.shape, dense[1].kernel.shape
    return fc6[1:] == (channels, 3, 3) and fc7 == (fc6[0], fc6[0], 1, 1)


def _add_head(
    vgg: TorchVGG, modules: list[Module], convolutions: Sequence[Module], pooling: str | None
) -> None:
    """Add the head, or the reason why it is left out."""
    dense = [module for module in modules if module.has_kernel(2, 4)]
    names = [f"{module.name}.{part}" for module in modules for part in module.parts]
    if not dense:
        vgg.left_out += names
        return
    channels = len(convolutions[-1].kernel)
    try:
        chain = chain_of(dense, channels)
        if all(np.isnan(module.kernel).all() for module in chain):
            if len(convolutions) == 13:
                vgg.preprocess = dict(FEATURES_MEAN)
            raise UnsupportedHeadError(
                "its weights are NaN, as in torchvision's IMAGENET1K_FEATURES, whose preprocessing "
                "is taken"
            )
        if len(chain[-1].kernel) == _FEATURES:
            raise UnsupportedHeadError(
                f"its last layer {chain[-1].name} has {_FEATURES} outputs, those of fc7: the layer "
                "of the classes was cut off"
            )
        steps, inside = steps_of(chain, modules, channels)
        window = math.prod(chain[0].kernel.shape[1:]) // channels
        if pooling is None and window == 1:
            raise UnsupportedHeadError(
                f"its first layer takes {channels} inputs, which are those of a flattening where "
                "images have 32 pixels, or an average or a maximum over space, and the file does "
                "not say; pooling=flatten, pooling=average or pooling=max keeps it"
            )
        head = heads.build(steps, cast(heads.Pooling, pooling or "flatten"))
    except (UnsupportedHeadError, ValueError) as reason:
        vgg.notes.append(f"the head is left out: {reason}")
        vgg.left_out += names
        vgg.rounds_up = _is_ssd(dense, channels)
        return
    places = tuple(module.numbers[-1] if module.numbers else 0 for module in chain)
    if len(chain) > 1 and (places, tuple(inside)) != _STANDARD_HEAD:
        note = "a ReLU after each layer of its head but the last is assumed"
        head = replace(head, note="; ".join(filter(None, (note, head.note))))
    vgg.head = head
    kept = {id(module) for module in (*chain, *inside)}
    vgg.left_out += [
        f"{module.name}.{part}" for module in modules if id(module) not in kept
        for part in module.parts
    ]  # fmt: skip
