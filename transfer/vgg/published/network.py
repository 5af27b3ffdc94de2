"""The network that the layers of a weight file make, under the names of ``architectures``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from transfer.images.preprocess import Size, as_size
from transfer.vgg.architectures import ARCHITECTURES, Architecture
from transfer.vgg.published.containers import Container
from transfer.vgg.published.heads import Head
from transfer.vgg.published.known_layouts import Layout


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


def build(
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
    architecture, name = architecture_of(convolutions, head, size, padding)
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


def architecture_of(
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
