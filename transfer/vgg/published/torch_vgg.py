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
from transfer.vgg.published.heads import (
    Activation,
    Dense,
    Head,
    Normalization,
    Step,
    UnsupportedHeadError,
)

_EPSILON = 1e-5  # PyTorch's default; state dicts do not contain it
# Wrappers that add a name: DataParallel, torch.compile, FSDP.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_module"})
_PARTS = ("weight", "bias", "running_mean", "running_var")
# torchvision publishes weights of VGG16 for feature extraction whose classifier is NaN, and their
# normalization: images in 0..1, minus this mean, divided by 1/255. Source: torchvision,
# models/vgg.py, VGG16_Weights.IMAGENET1K_FEATURES.
FEATURES_MEAN = {"mean": [0.48235 * 255, 0.45882 * 255, 0.40784 * 255], "order": "RGB"}
_FEATURES = 4096  # outputs of fc6 and fc7
_STANDARD_HEAD = ((0, 3, 6), ())


@dataclass(eq=False)
class _Module:
    """A module with its own arrays. ``stem`` is its name with ``#`` for each number."""

    name: str
    parts: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        return re.sub(r"\d+", "#", self.name)

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(int(number[:9]) for number in re.findall(r"\d+", self.name))

    @property
    def kernel(self) -> np.ndarray:
        return self.parts["weight"]

    @property
    def is_norm(self) -> bool:
        return "running_mean" in self.parts or "running_var" in self.parts

    def has_kernel(self, *dimensions: int) -> bool:
        """Whether it has a kernel, of as many dimensions, and at most biases besides."""
        extra = self.parts.keys() - {"weight", "bias"}
        return not extra and "weight" in self.parts and self.kernel.ndim in dimensions

    def norm(self) -> BatchNorm:
        if not {"running_mean", "running_var"} <= self.parts.keys():
            raise ValueError(f"its batch norm {self.name} has {', '.join(self.parts)} only")
        return BatchNorm(
            self.parts["running_mean"],
            self.parts["running_var"],
            _EPSILON,
            self.parts.get("weight"),
            self.parts.get("bias"),
        )


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
    modules, rest = _modules(state)
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
        vgg.notes.append(f"batch norm folded with epsilon {_EPSILON:g}, PyTorch's default")
    behind = [module for module in modules if id(module) not in used]
    vgg.left_out = [*others, *rest]
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
    fitting = [path for path, state in states.items() if _convolutions(_modules(state)[0])]
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


def _modules(state: Mapping[str, np.ndarray]) -> tuple[list[_Module], list[str]]:
    """The modules of a state dict in its order, and the names of arrays without effect."""
    modules: dict[str, _Module] = {}
    rest = []
    for key, values in state.items():
        owner, _, part = key.rpartition(".")
        if part == "num_batches_tracked":
            continue
        if part not in _PARTS:
            if values.size > 4:  # not a mean of the channels, a temperature
                rest.append(key)
            continue
        name = _unwrapped(owner)
        modules.setdefault(name, _Module(name)).parts[part] = values
    return list(modules.values()), rest


def _unwrapped(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)


def _check_unknown(
    rest: Sequence[str], used: Sequence[_Module], convolutions: Sequence[_Module]
) -> None:
    """Check that no array of an unknown kind belongs to a layer of the network or stands between
    them.

    Raises:
        ValueError: names the array.
    """
    names = {module.name for module in used}
    for key in rest:
        owner = _Module(_unwrapped(key.rpartition(".")[0]))
        is_between = owner.stem == convolutions[0].stem and owner.numbers < convolutions[-1].numbers
        if owner.name in names or is_between:
            raise ValueError(
                f"its array {key} belongs to a layer of the network, and its kind is not known; a "
                f"VGG without it would compute something else. If it has no effect: "
                f"leave_out={'*' + key!r}"
            )


def _convolutions(modules: Sequence[_Module]) -> list[_Module] | None:
    """The convolutions of a VGG, or ``None``. Of several the one with the most layers is taken.
    3x3 convolutions that follow the last one, as in SSD, do not belong to it."""
    stems: dict[str, list[_Module]] = defaultdict(list)
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


def _no_vgg(modules: Sequence[_Module]) -> str:
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


def _kind(modules: Sequence[_Module]) -> str:
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
    modules: Sequence[_Module], convolutions: Sequence[_Module], used: set[int]
) -> dict[int, BatchNorm]:
    """Batch norms by the number of their convolution; adds them to ``used``.

    Raises:
        ValueError: if a layer between the convolutions is neither, or the numbers leave no place
            for the ReLU of a convolution.
    """
    stem = convolutions[0].stem
    places = {module.numbers: number for number, module in enumerate(convolutions)}
    first, last = convolutions[0].numbers, convolutions[-1].numbers
    is_bare = _ends_with_number(stem)
    norms: dict[int, BatchNorm] = {}
    for module in modules:
        inside = module.stem == stem and first < module.numbers <= (*last[:-1], last[-1] + 2)
        if id(module) in used or not (inside or module.is_norm or _is_vector(module)):
            continue
        before = (*module.numbers[:-1], module.numbers[-1] - 1) if module.numbers else ()
        if module.stem == stem and is_bare and before in places and module.is_norm:
            norms[places[before]] = module.norm()
            used.add(id(module))
        elif module.stem == stem and module.numbers < first:
            raise ValueError(f"its layer {module.name} normalises the images; no VGG does")
        elif (inside and (module.is_norm or module.numbers < last)) or (
            (module.is_norm or _is_vector(module)) and _accompanies(module, convolutions)
        ):
            raise ValueError(_refusal(module, convolutions))
    if is_bare:
        _check_room(convolutions, norms)
    return norms


def _ends_with_number(stem: str) -> bool:
    """Whether modules are numbered by their place in an ``nn.Sequential``."""
    return stem.rpartition(".")[2] == "#"


def _is_vector(module: _Module) -> bool:
    """Whether it has a scale for each channel, as a group norm or a PReLU."""
    return "weight" in module.parts and module.kernel.ndim == 1 and not module.is_norm


def _accompanies(module: _Module, convolutions: Sequence[_Module]) -> bool:
    """Whether a normalization stands in the same module as the convolutions, and has as many
    channels as one of them."""
    size = next(iter(module.parts.values())).size
    parents = {one.name.rpartition(".")[0] for one in convolutions}
    is_beside = module.name.rpartition(".")[0] in parents
    return is_beside and any(len(one.kernel) == size for one in convolutions)


def _refusal(module: _Module, convolutions: Sequence[_Module]) -> str:
    before = [one for one in convolutions if one.numbers < module.numbers]
    owner = (before or convolutions)[-1 if before else 0]
    kind = "batch norm" if module.is_norm else "layer"
    return (
        f"its {kind} {module.name} does not directly follow its layer {owner.name}: there is a "
        "ReLU or a pooling between them, or the names do not say, and it cannot be folded; a VGG "
        "without it would compute something else. If it stands behind the network: "
        f"leave_out='*{module.name}.*'"
    )


def _check_room(convolutions: Sequence[_Module], norms: Mapping[int, BatchNorm]) -> None:
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
    convolutions: Sequence[_Module], norms: Mapping[int, BatchNorm]
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


def _add_head(
    vgg: TorchVGG, modules: list[_Module], convolutions: Sequence[_Module], pooling: str | None
) -> None:
    """Add the head, or the reason why it is left out."""
    dense = [module for module in modules if module.has_kernel(2, 4)]
    names = [f"{module.name}.{part}" for module in modules for part in module.parts]
    if not dense:
        vgg.left_out += names
        return
    channels = len(convolutions[-1].kernel)
    try:
        chain = _chain(dense, channels)
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
        steps, inside = _steps(chain, modules, channels)
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
        vgg.rounds_up = any(module.kernel.shape[1:] == (channels, 3, 3) for module in dense)
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


def _chain(dense: Sequence[_Module], channels: int) -> list[_Module]:
    """The fully connected layers in order: each takes the outputs of the one before.

    Raises:
        UnsupportedHeadError: if there is no such order, or more than one.
    """
    windows = [module for module in dense if module.kernel.ndim == 4]
    for module in windows:
        if module.kernel.shape[2:] == (3, 3):  # dilated fc6 of SSD and DeepLab
            raise UnsupportedHeadError(
                f"its layer {module.name} {module.kernel.shape} is a convolution, whose stride and "
                "dilation the file does not tell"
            )
    by_stem: dict[str, list[_Module]] = defaultdict(list)
    for module in dense:
        by_stem[module.stem].append(module)
    groups = [sorted(group, key=lambda module: module.numbers) for group in by_stem.values()]
    orders = [groups, sorted(groups, key=lambda group: "head" in group[0].stem)]
    for order in orders:
        chain = [module for group in order for module in group]
        sizes = [math.prod(module.kernel.shape[1:]) for module in chain]
        window = math.isqrt(sizes[0] // channels)
        follows = all(
            len(module.kernel) == size for module, size in zip(chain[:-1], sizes[1:], strict=True)
        )
        if follows and window and window**2 * channels == sizes[0]:
            return chain
    shown = ", ".join(f"{module.name} {module.kernel.shape}" for module in dense[:4])
    raise UnsupportedHeadError(
        f"its layers {shown}{', ...' if len(dense) > 4 else ''} are not a chain that begins with a "
        f"square times {channels} inputs"
    )


def _steps(
    chain: Sequence[_Module], modules: Sequence[_Module], channels: int
) -> tuple[list[Step], list[_Module]]:
    """The steps of a head, and the batch norms among them.

    In an ``nn.Sequential`` the numbers tell the order. A batch norm directly after a layer comes
    before its ReLU, one further behind comes after it.
    """
    steps: list[Step] = []
    inside: list[_Module] = []
    others = [module for module in modules if module not in chain]
    for module in others:
        if not (module.is_norm or _is_vector(module)):
            raise UnsupportedHeadError(f"its layer {module.name} is not known")
    if others:
        stem = chain[0].stem
        together = all(module.stem == stem for module in (*chain, *others))
        if not together or not _ends_with_number(stem) or any(_is_vector(m) for m in others):
            raise UnsupportedHeadError(f"the names do not say where its {others[0].name} stands")
    ordered = sorted([*chain, *others], key=lambda module: module.numbers) if others else chain
    is_active = True
    for index, module in enumerate(ordered):
        if module in others:
            inside.append(module)
            place = module.numbers[-1]
            if not is_active and place - ordered[index - 1].numbers[-1] > 1:
                steps.append(Activation(module.name, "relu"))
                is_active = True
            norm = module.norm()
            if not any(isinstance(step, Dense) for step in steps):
                norm = _rows_first(norm, channels)
            steps.append(Normalization(module.name, norm))
            continue
        if not is_active and _has_room(ordered[index - 1], module):
            steps.append(Activation(module.name, "relu"))
        kernel = _matrix(module.kernel, channels if module is chain[0] else None)
        steps.append(Dense(module.name, kernel, module.parts.get("bias")))
        is_active = False
    return steps, inside


def _has_room(before: _Module, module: _Module) -> bool:
    """Whether there is a layer without weights between two modules of an ``nn.Sequential``; in
    other places nothing tells, and there is one."""
    if before.stem != module.stem or not _ends_with_number(module.stem):
        return True
    return module.numbers[:-1] != before.numbers[:-1] or (
        module.numbers[-1] - before.numbers[-1] > 1
    )


def _matrix(kernel: np.ndarray, channels: int | None) -> np.ndarray:
    """``[outputs, inputs]`` or ``[outputs, inputs, height, width]`` to ``[inputs, outputs]``, with
    the inputs of the first layer in the order height, width, channel instead of channel first."""
    matrix = kernel.reshape(len(kernel), -1).T
    return matrix if channels is None else heads.channels_last(matrix, channels)


def _rows_first(norm: BatchNorm, channels: int) -> BatchNorm:
    """A batch norm of a flattened feature map in the order height, width, channel."""
    window = math.isqrt(norm.mean.size // channels)

    def reordered(values: np.ndarray) -> np.ndarray:
        if values.size != channels * window**2:
            return values
        return heads.channels_last(values, channels)

    gamma, beta = (v if v is None else reordered(v) for v in (norm.gamma, norm.beta))
    return BatchNorm(reordered(norm.mean), reordered(norm.variance), norm.epsilon, gamma, beta)
