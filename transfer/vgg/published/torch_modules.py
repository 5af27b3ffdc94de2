"""The modules of a PyTorch state dict, with their arrays, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from transfer.vgg.published.batch_norm import BatchNorm

EPSILON = 1e-5  # PyTorch's default; state dicts do not contain it
# Wrappers that add a name: DataParallel, torch.compile, FSDP.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_module"})
_PARTS = ("weight", "bias", "running_mean", "running_var")


@dataclass(eq=False)
class Module:
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
            EPSILON,
            self.parts.get("weight"),
            self.parts.get("bias"),
        )


def modules_of(state: Mapping[str, np.ndarray]) -> tuple[list[Module], list[str]]:
    """The modules of a state dict in its order, and the names of arrays without effect."""
    modules: dict[str, Module] = {}
    rest = []
    for key, values in state.items():
        owner, _, part = key.rpartition(".")
        if part == "num_batches_tracked":
            continue
        if part not in _PARTS:
            if values.size > 4:  # not a mean of the channels, a temperature
                rest.append(key)
            continue
        name = unwrapped(owner)
        modules.setdefault(name, Module(name)).parts[part] = values
    return list(modules.values()), rest


def unwrapped(name: str) -> str:
    """A name without those of wrappers such as ``DataParallel``."""
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)


def ends_with_number(stem: str) -> bool:
    """Whether modules are numbered by their place in an ``nn.Sequential``."""
    return stem.rpartition(".")[2] == "#"


def is_vector(module: Module) -> bool:
    """Whether it has a scale for each channel, as a group norm or a PReLU."""
    return "weight" in module.parts and module.kernel.ndim == 1 and not module.is_norm


def is_loss(module: Module) -> bool:
    """Whether it is a loss with a weight for each class, such as ``nn.CrossEntropyLoss``, which a
    Lightning module saves with its model."""
    has_name = re.search(r"(^|[._])(criterion|loss|losses)([._]|$)", module.name, re.IGNORECASE)
    return bool(has_name) and is_vector(module) and "bias" not in module.parts
