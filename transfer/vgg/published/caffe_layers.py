"""Check the layers of a Caffe model: strides, paddings and dilations are not in its arrays.

DeepLab, SSD, FCN and HED have kernels of the shapes of VGG16, and compute other features with them.
Layers without a definition, in files of nothing but weights, are not checked.

Field numbers from caffe.proto (github.com/BVLC/caffe, src/caffe/proto).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
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
    connected: int
    pooling: int
    relu: int


FIELDS = {
    100: _Fields(1, 2, 3, 4, 7, 106, 117, 121, 123),
    2: _Fields(4, 5, 2, 3, 6, 10, 17, 19, 30),
}
"""Fields of NetParameter with layers, now and before 2015, to those of a layer."""
_LEGACY_KINDS = {4: "Convolution", 6: "Dropout", 14: "InnerProduct", 17: "Pooling", 18: "ReLU",
                 22: "Split"}  # fmt: skip
# Settings that matter: their fields in the message of a kind, and their default.
# DeepLab's version of Caffe had dilations under two other numbers, where Caffe has 0 and 1.
_SETTINGS: dict[str, dict[str, tuple[tuple[int, ...], int]]] = {
    "Convolution": {
        "kernel_size": ((4, 11, 12), 0),
        "stride": ((6, 13, 14), 1),
        "pad": ((3, 9, 10), 0),
        "dilation": ((16, 17, 18), 1),
        "group": ((5,), 1),
    },
    "InnerProduct": {"axis": ((5,), 1), "transpose": ((6,), 0)},
    "Pooling": {
        "pool": ((1,), 0),
        "kernel_size": ((2, 5, 6), 0),
        "stride": ((3, 7, 8), 1),
        "pad": ((4, 9, 10), 0),
    },
}
_POOLING = {"pool": 0, "kernel_size": 2, "stride": 2, "pad": 0}  # the maximum
# Settings of the layers of a VGG up to its last convolution, and of those that follow, whose fully
# connected layers may be convolutions.
_BASE = {
    "Convolution": {"kernel_size": 3, "stride": 1, "pad": 1, "dilation": 1, "group": 1},
    "Pooling": _POOLING,
}
_HEAD = {
    "Convolution": {"stride": 1, "pad": 0, "dilation": 1, "group": 1},
    "InnerProduct": {"axis": 1, "transpose": 0},
    "Pooling": _POOLING,
}
_INERT = ("Dropout", "Split")
_CONVOLUTION, _CONNECTED = re.compile(r"conv[1-5]_\d"), re.compile(r"fc[67]|fc8(?:[a-z_]\w*)?")
_VGG = re.compile(f"{_CONVOLUTION.pattern}|{_CONNECTED.pattern}")
_MAX_TENSORS = 1000  # of a layer


@dataclass(frozen=True)
class CaffeLayer:
    """``settings``: the values of the settings of its kind, those of height and width or one for
    both; empty if the file does not define it."""

    name: str
    kind: str
    bottoms: list[str]
    tops: list[str]
    blobs: list[wire.Value]
    settings: dict[str, tuple[int, ...]] = field(default_factory=dict)
    negative_slope: float = 0.0


def read(number: int, message: memoryview) -> CaffeLayer:
    """Read a layer, a field of NetParameter whose number is a key of ``FIELDS``.

    Raises:
        ValueError: if it is damaged, or has far more inputs or outputs than any layer.
    """
    at = FIELDS[number]
    parts: dict[int, list[wire.Value]] = {wanted: [] for wanted in at}
    for wanted, value in wire.fields(message):
        if wanted in parts:
            parts[wanted].append(value)
    if max(len(parts[at.bottoms]), len(parts[at.tops])) > _MAX_TENSORS:
        raise ValueError(f"one of its layers has over {_MAX_TENSORS:,} inputs or outputs")
    code = (*parts[at.kind], memoryview(b""))[0]
    kind = _LEGACY_KINDS.get(code, f"type {code}") if isinstance(code, int) else wire.text(code)
    owners = {
        "Convolution": at.convolution,
        "InnerProduct": at.connected,
        "Pooling": at.pooling,
    }
    settings = parts[owners.get(kind, at.relu)]
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


def _settings(kind: str, message: memoryview) -> dict[str, tuple[int, ...]]:
    values = list(wire.fields(message))
    found = {}
    for setting, (numbers, default) in _SETTINGS.get(kind, {}).items():
        given = wire.integers([value for number, value in values if number in numbers])
        found[setting] = tuple(max(value, default) for value in given) or (default,)
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
    if last is None:
        return
    if layers[last].kind != "Convolution":
        raise ValueError(f"its {layers[last].name} is a layer {layers[last].kind}, no Convolution")
    _check_settings(layers[last])
    has_relu = False
    names = {layers[last].name}
    for layer in _before(layers, last):
        names.add(layer.name)
        if layer.kind == "ReLU":
            if layer.negative_slope:
                raise ValueError(f"its layer {_sloped(layer)}")
            has_relu = True
        elif layer.kind in _BASE:
            _check_settings(layer)
            if layer.kind == "Convolution":
                if not has_relu:
                    raise ValueError(f"its convolution {layer.name} has no ReLU; expected one")
                if not _CONVOLUTION.fullmatch(layer.name):
                    raise ValueError(f"its convolution {layer.name} is none of a VGG")
                has_relu = False
        elif layer.kind not in _INERT and layer.bottoms:
            raise ValueError(
                f"its layer {layer.name} ({layer.kind}) stands before its last convolution, and a "
                "VGG without it would compute something else"
            )
    for layer in layers:
        if _CONVOLUTION.fullmatch(layer.name) and layer.blobs and layer.name not in names:
            raise ValueError(f"its convolution {layer.name} does not lead to {layers[last].name}")


def no_head(layers: Sequence[CaffeLayer]) -> str:
    """Why the layers after the convolutions are not those of a VGG; empty if they may be."""
    for layer in layers:
        if layer.name == "pool5" and (difference := _difference(layer, _POOLING)):
            return (
                f"its pool5 has {difference}, and so have its own features there; those of the "
                "converted network are equal up to conv5"
            )
    last = _last_convolution(layers)
    head = [n for n, one in enumerate(layers) if _CONNECTED.fullmatch(one.name) and one.blobs]
    if last is None or not head or not layers[head[-1]].bottoms:
        return ""
    expected = [layers[n].name for n in head]
    has_relu, has_pooling = True, False
    found: list[str] = []
    for layer in (layers[head[-1]], *_before(layers, head[-1])):
        has_weights = layer.kind in ("Convolution", "InnerProduct")
        if has_weights and not has_relu:
            return f"its layer {layer.name} has no ReLU"
        if layer is layers[last]:
            if not has_pooling:
                return f"there is no pooling between {layer.name} and {expected[0]}"
            is_chain = found[::-1] == expected
            return "" if is_chain else f"its {', '.join(expected)} do not follow each other"
        if layer.kind == "ReLU":
            if layer.negative_slope:
                return f"its layer {_sloped(layer)}"
            has_relu = True
        elif layer.kind in _HEAD and not has_pooling:
            if difference := _difference(layer, _HEAD[layer.kind]):
                return f"its layer {layer.name} has {difference}"
            has_pooling = layer.kind == "Pooling"
            if has_weights:
                has_relu = False
                found.append(layer.name)
        elif layer.kind not in _INERT:
            return f"its layer {layer.name} ({layer.kind}) is none of a VGG's head"
    return f"its {expected[-1]} does not depend on {layers[last].name} alone"


def beside(layers: Sequence[CaffeLayer]) -> set[str]:
    """The names of layers that the file defines and that its features do not depend on: those
    after the convolutions or beside them that are not fully connected layers of a VGG."""
    if _last_convolution(layers) is None:
        return set()
    return {layer.name for layer in layers if layer.bottoms and not _VGG.fullmatch(layer.name)}


def _last_convolution(layers: Sequence[CaffeLayer]) -> int | None:
    """The place of the last convolution of a VGG, of which the file says what it takes; SSD goes on
    with conv6_1."""
    places = [n for n, one in enumerate(layers) if _CONVOLUTION.fullmatch(one.name) and one.blobs]
    return places[-1] if places and layers[places[-1]].bottoms else None


def _before(layers: Sequence[CaffeLayer], place: int) -> Iterator[CaffeLayer]:
    """The layers before one, backwards, each with the first input of the previous one."""
    tensor = (*layers[place].bottoms, "")[0]
    for layer in reversed(layers[:place]):
        if tensor and tensor in layer.tops:
            yield layer
            tensor = (*layer.bottoms, "")[0]


def _check_settings(layer: CaffeLayer) -> None:
    if difference := _difference(layer, _BASE[layer.kind]):
        raise ValueError(f"its layer {layer.name} has {difference}")


def _difference(layer: CaffeLayer, expected: Mapping[str, int]) -> str:
    """The first setting that differs; empty if there is none, or the file does not say."""
    for setting, values in layer.settings.items():
        for value in values:
            if value != expected.get(setting, value):
                return f"{setting} {value}; expected {expected[setting]}"
    return ""


def _sloped(layer: CaffeLayer) -> str:
    return f"{layer.name} has negative_slope {layer.negative_slope:g}; expected 0"
