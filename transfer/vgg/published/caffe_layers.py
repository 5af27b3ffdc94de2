"""Check the layers of a Caffe model: strides, paddings and dilations are not in its arrays.

DeepLab, SSD, FCN and HED have kernels of the shapes of VGG16, and compute other features with them.
Layers without a definition, in files of nothing but weights, are not checked.

Field numbers from caffe.proto (github.com/BVLC/caffe, src/caffe/proto).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from transfer.vgg.published import wire


class _Fields(NamedTuple):
    name: int
    kind: int
    bottoms: int
    tops: int
    blobs: int
    convolution: int
    pooling: int
    relu: int


FIELDS = {100: _Fields(1, 2, 3, 4, 7, 106, 121, 123), 2: _Fields(4, 5, 2, 3, 6, 10, 19, 30)}
"""Fields of NetParameter with layers, now and before 2015, to those of a layer."""
_LEGACY_KINDS = {4: "Convolution", 6: "Dropout", 14: "InnerProduct", 17: "Pooling", 18: "ReLU",
                 22: "Split"}  # fmt: skip
# Settings of ConvolutionParameter and PoolingParameter: their fields, default, and value in a VGG.
# DeepLab's version of Caffe had dilations under two other numbers, where Caffe has 0 and 1.
_SETTINGS = {
    "Convolution": {
        "kernel_size": ((4, 11, 12), 0, 3),
        "stride": ((6, 13, 14), 1, 1),
        "pad": ((3, 9, 10), 0, 1),
        "dilation": ((16, 17, 18), 1, 1),
        "group": ((5,), 1, 1),
    },
    "Pooling": {
        "pool": ((1,), 0, 0),  # the maximum
        "kernel_size": ((2, 5, 6), 0, 2),
        "stride": ((3, 7, 8), 1, 2),
        "pad": ((4, 9, 10), 0, 0),
    },
}
_INERT = ("Dropout", "Split")


@dataclass(frozen=True)
class CaffeLayer:
    """``settings``: those of a convolution or a pooling, empty if the file does not define it. Of
    height and width, the value is taken that differs from a VGG's, if one does."""

    name: str
    kind: str
    bottoms: list[str]
    tops: list[str]
    blobs: list[wire.Value]
    settings: dict[str, int] = field(default_factory=dict)
    negative_slope: float = 0.0


def read(number: int, message: memoryview) -> CaffeLayer:
    """Read a layer, a field of NetParameter whose number is a key of ``FIELDS``.

    Raises:
        ValueError: if it is damaged.
    """
    at = FIELDS[number]
    parts: dict[int, list[wire.Value]] = {wanted: [] for wanted in at}
    for wanted, value in wire.fields(message):
        if wanted in parts:
            parts[wanted].append(value)
    code = (*parts[at.kind], memoryview(b""))[0]
    kind = _LEGACY_KINDS.get(code, f"type {code}") if isinstance(code, int) else wire.text(code)
    settings = parts[{"Convolution": at.convolution, "Pooling": at.pooling}.get(kind, at.relu)]
    defined = next((value for value in settings if isinstance(value, memoryview)), memoryview(b""))
    return CaffeLayer(
        next(map(wire.text, parts[at.name]), ""),
        kind,
        [wire.text(value) for value in parts[at.bottoms]],
        [wire.text(value) for value in parts[at.tops]],
        parts[at.blobs],
        _settings(kind, defined) if settings else {},
        _slope(defined) if kind == "ReLU" else 0.0,
    )


def _settings(kind: str, message: memoryview) -> dict[str, int]:
    values = list(wire.fields(message))
    found = {}
    for setting, (numbers, default, expected) in _SETTINGS.get(kind, {}).items():
        given = wire.integers([value for number, value in values if number in numbers])
        of_axes = [max(value, default) for value in given] or [default]
        found[setting] = next((value for value in of_axes if value != expected), expected)
    return found


def _slope(message: memoryview) -> float:
    slope = dict(wire.fields(message)).get(1)  # negative_slope
    if not isinstance(slope, memoryview) or len(slope) != 4:
        return 0.0
    return float(np.frombuffer(slope, "<f4")[0])


def check(layers: Sequence[CaffeLayer]) -> None:
    """Check that the layers between the images and the last convolution are those of a VGG.

    Raises:
        ValueError: names the layer that is not.
    """
    last = _last_convolution(layers)
    tensor = (layers[last].bottoms or [""])[0] if last is not None else ""
    if last is None or not tensor:
        return
    _check_settings(layers[last])
    has_relu = False
    for layer in reversed(layers[:last]):
        if tensor not in layer.tops:
            continue
        if layer.kind == "ReLU":
            if layer.negative_slope:
                raise ValueError(
                    f"its layer {layer.name} has negative_slope {layer.negative_slope:g}; "
                    "expected 0"
                )
            has_relu = True
        elif layer.kind in _SETTINGS:
            _check_settings(layer)
            if layer.kind == "Convolution":
                if not has_relu:
                    raise ValueError(f"its convolution {layer.name} has no ReLU; expected one")
                has_relu = False
        elif layer.kind not in _INERT and layer.bottoms:
            raise ValueError(
                f"its layer {layer.name} ({layer.kind}) stands before its last convolution, and a "
                "VGG without it would compute something else"
            )
        if not layer.bottoms:
            return
        tensor = layer.bottoms[0]


def no_head(layers: Sequence[CaffeLayer]) -> str:
    """Why the layers after the convolutions are not those of a VGG; empty if they may be."""
    for layer in layers:
        if layer.name == "pool5" and (difference := _difference(layer)):
            return (
                f"its pool5 has {difference}, and so have its own features there; those of the "
                "converted network are equal up to conv5"
            )
        dilation = layer.settings.get("dilation", 1)
        if layer.name == "fc6" and dilation != 1:
            return f"its fc6 is a convolution with dilation {dilation}"
    return ""


def _last_convolution(layers: Sequence[CaffeLayer]) -> int | None:
    """The place of the last convolution of a VGG; SSD goes on with conv6_1."""
    places = [n for n, layer in enumerate(layers) if re.fullmatch(r"conv[1-5]_\d", layer.name)]
    return places[-1] if places else None


def _check_settings(layer: CaffeLayer) -> None:
    if difference := _difference(layer):
        raise ValueError(f"its layer {layer.name} has {difference}")


def _difference(layer: CaffeLayer) -> str:
    """The first setting that no VGG has; empty if there is none, or the file does not say."""
    if not layer.settings:
        return ""
    for setting, (_, _, expected) in _SETTINGS[layer.kind].items():
        if (value := layer.settings[setting]) != expected:
            return f"{setting} {value}; expected {expected}"
    return ""
