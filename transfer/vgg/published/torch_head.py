"""The head of a VGG in a PyTorch state dict: its fully connected layers and batch norms, in order.

A state dict does not say what stands between layers with weights: numbers of an ``nn.Sequential``
tell where a ReLU has room.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from transfer.vgg.published import heads
from transfer.vgg.published.batch_norm import BatchNorm
from transfer.vgg.published.heads import (
    Activation,
    Dense,
    Normalization,
    Step,
    UnsupportedHeadError,
)
from transfer.vgg.published.torch_modules import Module, ends_with_number, is_vector


def chain_of(dense: Sequence[Module], channels: int) -> list[Module]:
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
    by_stem: dict[str, list[Module]] = defaultdict(list)
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


def steps_of(
    chain: Sequence[Module], modules: Sequence[Module], channels: int
) -> tuple[list[Step], list[Module]]:
    """The steps of a head, and the batch norms among them.

    In an ``nn.Sequential`` the numbers tell the order. A batch norm directly after a layer comes
    before its ReLU, one further behind comes after it.
    """
    steps: list[Step] = []
    inside: list[Module] = []
    others = [module for module in modules if module not in chain]
    for module in others:
        if not (module.is_norm or is_vector(module)):
            raise UnsupportedHeadError(f"its layer {module.name} is not known")
    if others:
        stem = chain[0].stem
        together = all(module.stem == stem for module in (*chain, *others))
        if not together or not ends_with_number(stem) or any(is_vector(m) for m in others):
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


def _has_room(before: Module, module: Module) -> bool:
    """Whether there is a layer without weights between two modules of an ``nn.Sequential``; in
    other places nothing tells, and there is one."""
    if before.stem != module.stem or not ends_with_number(module.stem):
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
