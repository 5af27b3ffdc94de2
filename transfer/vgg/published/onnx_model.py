"""Read an ONNX file: its graph as a chain of layers, with their arrays.

The layers are those of ``keras_model``, in channels-last layout, so that the same rules decide what
is a VGG. The file is read field by field, and no operation is run: the only operations on weights
are transpositions.

Field numbers from onnx.proto (github.com/onnx/onnx), meaning of the attributes from its
docs/Operators.md. Written by: torch.onnx, tf2onnx, the ONNX model zoo (vgg16-12, vgg19-7,
vgg16-bn-7, converted from MXNet).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transfer.vgg.published import wire
from transfer.vgg.published.heads import channels_last
from transfer.vgg.published.keras_model import Layer, Model
from transfer.vgg.published.onnx_file import Node, SideFiles, node_of, tensor_of, value_info

_MAX_NODES, _MAX_SHARED = 5000, 10_000
_TO_CHANNELS_FIRST, _TO_CHANNELS_LAST = (0, 3, 1, 2), (0, 2, 3, 1)
_ACTIVATIONS = {"Sigmoid": "sigmoid", "Tanh": "tanh", "Softplus": "softplus", "Elu": "elu"}
_NO_END = 10**9  # of a slice: tf2onnx writes this number, other exporters larger ones
_INERT = frozenset({"Identity", "Dropout"})
_FLOATS = (1, 10, 11)  # TensorProto.DataType
_GLOBAL = {
    "GlobalAveragePool": "GlobalAveragePooling2D",
    "ReduceMean": "GlobalAveragePooling2D",
    "GlobalMaxPool": "GlobalMaxPooling2D",
    "ReduceMax": "GlobalMaxPooling2D",
}


def read(data: memoryview, beside: SideFiles | None = None) -> Model | None:
    """The layers of an ONNX file; ``None`` if the data are not one.

    Args:
        data: contents of the file.
        beside: for arrays in files beside it; ``None`` refuses them.

    Raises:
        ValueError: if the graph is damaged, or not a chain of layers.
    """
    try:
        fields = {number: value for number, value in wire.fields(data) if number in (1, 7, 8)}
        graph = fields.get(7)
        if not isinstance(graph, memoryview) or not isinstance(fields.get(1), int):
            return None
        parts = list(wire.fields(graph))
    except ValueError:
        return None
    messages = [(number, value) for number, value in parts if isinstance(value, memoryview)]
    tensors = [value for number, value in messages if number == 5]
    if not tensors and not any(number == 1 for number, _ in messages):
        return None
    values = dict(tensor_of(tensor, beside) for tensor in tensors)
    nodes = [node_of(value, beside) for number, value in messages if number == 1]
    if len(nodes) > _MAX_NODES:
        raise ValueError(f"its graph has {len(nodes):,} nodes; expected at most {_MAX_NODES:,}")
    inputs = [value_info(value) for number, value in messages if number == 11]
    used = {name for node in nodes for name in node.inputs}
    images = [(name, shape) for name, shape in inputs if name in used - values.keys()]
    if len(images) != 1:
        raise ValueError(f"its graph has {len(images)} inputs; a VGG has one")
    return _Chain(nodes, values).layers(*images[0])


@dataclass
class _Chain:
    """The nodes between the images and the classes, each with one input that is not constant."""

    nodes: Sequence[Node]
    values: dict[str, np.ndarray]
    found: list[Layer] = field(default_factory=list)
    is_channels_first: bool = True
    is_flat: bool = False
    channels: int = 0  # of a feature map that was flattened channels first

    def layers(self, image: str, shape: Sequence[int]) -> Model:
        users: dict[str, list[Node]] = {}
        for node in self.nodes:
            self._fold(node)
            for name in set(node.inputs):
                users.setdefault(name, []).append(node)
        for name, value in self.values.items():
            # Each use may make a copy; so memory is bounded by the size of the file.
            if value.size > _MAX_SHARED and len(users.get(name, [])) > 1:
                raise ValueError(f"its array {name!r} {value.shape} is used by several nodes")
        self.is_channels_first = len(shape) != 4 or shape[3] != 3 or shape[1] == 3
        size = (shape[2:4] if self.is_channels_first else shape[1:3]) if len(shape) == 4 else ()
        self._add("InputLayer", image, {"batch_shape": [None, *size, 3] if size else None})
        tensor, branches = image, list[Layer]()
        for _ in range(len(self.nodes)):
            following = [node for node in users.get(tensor, []) if node.kind != "Shape"]
            if reversal := self._reversal_of_slices(following, users):
                self._add("ReverseChannels", reversal.name, {})
                tensor = reversal.outputs[0]
                continue
            if len(following) != 1 or len(self._data(following[0])) != 1:
                branches = [Layer(node.name, node.kind, {}) for node in following]
                break
            self._append(following[0])
            tensor = following[0].outputs[0]
        return Model(self.found, branches, [])

    def _fold(self, node: Node) -> None:
        """Evaluate constants, and weights that are transposed or passed on."""
        if not node.outputs:
            return
        if node.kind == "Constant" and isinstance(node.attributes.get("value"), np.ndarray):
            self.values[node.outputs[0]] = node.attributes["value"]
        elif (
            node.kind in ("Identity", "Transpose")
            and node.inputs[:1]
            and (value := self.values.get(node.inputs[0])) is not None
        ):
            if node.kind == "Transpose":
                axes = node.attributes.get("perm", tuple(range(value.ndim))[::-1])
                if sorted(axes) != list(range(value.ndim)):
                    raise ValueError(f"its {node.name} transposes {value.shape} by {axes}")
                value = value.transpose(axes)
            self.values[node.outputs[0]] = value

    def _data(self, node: Node) -> list[str]:
        """The inputs that depend on the images. The shape of a ``Reshape`` may be computed."""
        names = node.inputs[:1] if node.kind == "Reshape" else node.inputs
        return [name for name in names if name and name not in self.values]

    def _add(
        self, kind: str, name: str, config: Mapping[str, Any], **arrays: np.ndarray | None
    ) -> None:
        kept = {role: value for role, value in arrays.items() if value is not None}
        self.found.append(Layer(name, kind, config, kept))

    def _constants(self, node: Node) -> list[np.ndarray]:
        return [self.values[name] for name in node.inputs if name in self.values]

    def _indices(self, node: Node) -> list[list[Any]]:
        """The constants of a node that selects channels; empty lists for those that are too long
        for that."""
        return [v.ravel().tolist() if v.size <= 8 else [] for v in self._constants(node)]

    def _append(self, node: Node) -> None:
        attributes, name = node.attributes, node.name
        if (
            node.kind in _INERT
            or (node.kind == "AveragePool" and _is_identity(attributes))
            or (node.kind == "Cast" and attributes.get("to") in _FLOATS)
        ):
            return
        if node.kind == "Transpose":
            self._transpose(node)
        elif node.kind == "Conv":
            self._convolution(node)
        elif node.kind == "MaxPool":
            self._add("MaxPooling2D", name, _pooling(node))
        elif node.kind == "BatchNormalization":
            self._batch_norm(node)
        elif node.kind == "Relu":
            self._add("ReLU", name, {})
        elif node.kind in _ACTIVATIONS and attributes.get("alpha", 1.0) == 1.0:
            self._add("Activation", name, {"activation": _ACTIVATIONS[node.kind]})
        elif node.kind == "Softmax":
            self._add("Softmax", name, {})
        elif node.kind in _GLOBAL:
            self._global_pooling(node)
        elif node.kind in ("Flatten", "Reshape", "Squeeze"):
            if not self.is_flat and not self._flattens(node):
                self._add(f"{node.kind} to other axes", name, {})
                return
            if not self.is_flat:
                self.channels = self._last_channels() if self.is_channels_first else 0
                self._add("Flatten", name, {})
            self.is_flat = True
        elif node.kind in ("Gemm", "MatMul"):
            self._dense(node)
        elif node.kind in ("Add", "Sub", "Mul", "Div"):
            self._arithmetic(node)
        elif node.kind in ("Gather", "Slice") and self._is_reversal(node):
            self._add("ReverseChannels", name, {})
        else:
            self._add(node.kind, name, {})

    def _flattens(self, node: Node) -> bool:
        """Whether a node keeps one axis of features besides the images; the shape of a ``Reshape``
        may be unknown."""
        if node.kind == "Flatten":
            return node.attributes.get("axis", 1) in (1, -3)
        shapes = self._constants(node) if node.kind == "Reshape" else []
        return not shapes or shapes[0].size == 2

    def _transpose(self, node: Node) -> None:
        axes = tuple(node.attributes.get("perm", ()))
        expected = _TO_CHANNELS_LAST if self.is_channels_first else _TO_CHANNELS_FIRST
        if axes != expected or self.channels:  # 0 after a global pooling, whose map is one pixel
            raise ValueError(f"its {node.name} transposes by {axes}; expected {expected}")
        self.is_channels_first = not self.is_channels_first

    def _convolution(self, node: Node) -> None:
        arrays = self._constants(node)
        if not arrays or arrays[0].ndim != 4 or not self.is_channels_first:
            raise ValueError(f"its convolution {node.name} has no constant kernel of 2 dimensions")
        attributes = node.attributes
        kernel = arrays[0].transpose(2, 3, 1, 0)
        pads = tuple(attributes.get("pads", (0, 0, 0, 0)))
        half = tuple(extent // 2 for extent in kernel.shape[:2])
        is_same = attributes.get("auto_pad") in (b"SAME_UPPER", b"SAME_LOWER") or pads == half * 2
        config = {
            "kernel_size": list(kernel.shape[:2]),
            "strides": attributes.get("strides"),
            "dilation_rate": attributes.get("dilations"),
            "groups": attributes.get("group"),
            "padding": "same" if is_same else f"pads {pads}",
            "use_bias": len(arrays) > 1,
        }
        config = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
        self._add("Conv2D", node.name, config, kernel=kernel, bias=_second(arrays))

    def _batch_norm(self, node: Node) -> None:
        arrays = self._constants(node)
        if len(arrays) != 4:
            raise ValueError(f"its batch norm {node.name} has {len(arrays)} arrays; expected 4")
        config = {"epsilon": node.attributes.get("epsilon", 1e-5)}
        gamma, beta, mean, variance = arrays
        norm = {"gamma": gamma, "beta": beta, "moving_mean": mean, "moving_variance": variance}
        if not self.is_channels_first and not self.is_flat:
            raise ValueError(f"its batch norm {node.name} is along the width")
        if self.is_flat and self.channels and len(mean) > self.channels:
            norm = {role: self._reordered(value) for role, value in norm.items()}
        self._add("BatchNormalization", node.name, config, **norm)

    def _global_pooling(self, node: Node) -> None:
        spatial = {2, 3} if self.is_channels_first else {1, 2}
        if node.kind.startswith("Reduce"):
            axes = node.attributes.get("axes") or [
                int(axis) for value in self._constants(node) for axis in value.ravel()[:4]
            ]
            if {axis % 4 for axis in axes} != spatial:
                raise ValueError(f"its {node.name} reduces the axes {list(axes)}")
        elif not self.is_channels_first:
            raise ValueError(f"its {node.name} pools over the channels")
        self._add(_GLOBAL[node.kind], node.name, {})
        self.is_flat, self.channels = True, 0

    def _dense(self, node: Node) -> None:
        arrays, attributes = self._constants(node), node.attributes
        if not arrays or arrays[0].ndim != 2 or node.inputs[1:2] == self._data(node):
            raise ValueError(f"its {node.name} ({node.kind}) has no constant matrix")
        if attributes.get("transA") or {attributes.get(k, 1.0) for k in ("alpha", "beta")} != {1.0}:
            raise ValueError(f"its {node.name} is a Gemm with transA, alpha or beta")
        kernel = arrays[0].T if attributes.get("transB") else arrays[0]
        if self.channels:
            kernel = self._reordered(kernel)
        self.is_flat, self.channels = True, 0
        bias = _second(arrays)
        bias = None if bias is None else np.broadcast_to(bias, (kernel.shape[1],))
        config = {"activation": "linear", "use_bias": bias is not None}
        self._add("Dense", node.name, config, kernel=kernel, bias=bias)

    def _reordered(self, values: np.ndarray) -> np.ndarray:
        """Rows in the order channel, height, width to height, width, channel."""
        rows = len(values)
        window = math.isqrt(rows // self.channels)
        if window**2 * self.channels != rows:
            raise ValueError(f"its first dense layer takes {rows} inputs; expected squares")
        return channels_last(values, self.channels)

    def _arithmetic(self, node: Node) -> None:
        """The biases of a matrix product, or arithmetic on the images."""
        value = self._constants(node)[0]
        last = self.found[-1]
        is_first = node.inputs[0] in self.values
        if node.kind == "Add" and last.kind == "Dense" and "bias" not in last.arrays:
            width = last.arrays["kernel"].shape[1]
            if value.size not in (1, width):
                raise ValueError(f"its {node.name} adds {value.shape} to {width} outputs")
            bias = np.broadcast_to(value.ravel(), (width,))
            arrays = {**last.arrays, "bias": bias}
            self.found[-1] = Layer(last.name, "Dense", {**last.config, "use_bias": True}, arrays)
            return
        is_preprocessing = all(
            layer.kind in ("InputLayer", "Rescaling", "ReverseChannels") for layer in self.found
        )
        axis = 1 if self.is_channels_first else 3
        shape = (1,) * (4 - value.ndim) + value.shape
        is_per_channel = is_preprocessing and (
            value.size == 1 or (value.size == 3 and value.ndim <= 4 and shape[axis] == 3)
        )
        if not is_preprocessing and (width := self._width(shape)):
            is_per_channel = True
            value = np.broadcast_to(value.ravel(), (width,))
        if not is_per_channel or (is_first and node.kind == "Div"):
            self._add(node.kind, node.name, {})
            return
        numbers: np.ndarray = value.astype(np.float64).ravel()
        scale, offset = np.ones_like(numbers), np.zeros_like(numbers)
        if node.kind in ("Mul", "Div"):
            with np.errstate(divide="ignore"):
                scale = numbers if node.kind == "Mul" else 1 / numbers
        elif node.kind == "Add":
            offset = numbers
        else:
            scale, offset = (-scale, numbers) if is_first else (scale, -numbers)
        if is_preprocessing:
            config = {"scale": scale.tolist(), "offset": offset.tolist()}
            self._add("Rescaling", node.name, config)
            return
        norm = {"gamma": scale, "beta": offset, "moving_mean": 0 * scale}
        norm["moving_variance"] = np.ones_like(scale)
        self._add("BatchNormalization", node.name, {"epsilon": 0.0}, **norm)

    def _width(self, shape: Sequence[int]) -> int:
        """The number of features that arithmetic with an array of this shape is along, as in a
        batch norm that an exporter has split; 0 if it is along other axes."""
        with_kernel = [layer for layer in self.found if "kernel" in layer.arrays]
        width = int(with_kernel[-1].arrays["kernel"].shape[-1]) if with_kernel else 0
        axis = 3 if self.is_flat or not self.is_channels_first else 1
        is_along = math.prod(shape) == 1 or (
            math.prod(shape) == width and len(shape) == 4 and shape[axis] == width
        )
        return width if is_along and not self.channels else 0

    def _is_reversal(self, node: Node) -> bool:
        """Whether a node reverses the order of the channels."""
        channels = 1 if self.is_channels_first else 3
        constants = self._indices(node)
        if node.kind == "Gather":
            axis = node.attributes.get("axis", 0) % 4
            return axis == channels and constants == [[2, 1, 0]]
        if len(constants) != 4 or len({len(values) for values in constants}) != 1:
            return False
        slices = {
            axis % 4: part
            for *part, axis in zip(*(constants[n] for n in (0, 1, 3, 2)), strict=True)
        }
        start, end, step = slices.pop(channels, (0, 0, 0))
        is_whole = all(s == 0 and e >= _NO_END and t == 1 for s, e, t in slices.values())
        return is_whole and step == -1 and (start >= 2 or start == -1) and end < -3

    def _reversal_of_slices(
        self, nodes: Sequence[Node], users: Mapping[str, Sequence[Node]]
    ) -> Node | None:
        """The concatenation of the channels in reverse order, if these nodes are its slices."""
        channels = 1 if self.is_channels_first else 3
        following = [users.get(node.outputs[0], []) for node in nodes if node.outputs]
        if len(nodes) != 3 or [len(one) for one in following] != [1] * 3:
            return None
        joined = following[0][0]
        order = []
        for name in joined.inputs:
            node = next((one for one in nodes if one.outputs[0] == name), None)
            values = self._indices(node) if node else []
            if node is None or node.kind != "Slice" or len(values) not in (3, 4):
                return None
            start, end, axis, *step = values
            if (len(start), len(end), axis, step) != (1, 1, [channels], [[1]] * len(step)):
                return None
            order.append((start[0], end[0]))
        is_joined = joined.kind == "Concat" and joined.attributes.get("axis") == channels
        return joined if is_joined and order == [(2, 3), (1, 2), (0, 1)] else None

    def _last_channels(self) -> int:
        kernels = [layer for layer in self.found if layer.kind == "Conv2D"]
        return int(kernels[-1].arrays["kernel"].shape[-1]) if kernels else 0


def _second(arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    return arrays[1] if len(arrays) > 1 else None


def _is_identity(attributes: Mapping[str, Any]) -> bool:
    """Whether a pooling has windows of one pixel, as an adaptive pooling to the size at hand."""
    strides = attributes.get("strides", (1, 1))
    return tuple(attributes.get("kernel_shape", ())) == tuple(strides) == (1, 1)


def _pooling(node: Node) -> dict[str, Any]:
    attributes = node.attributes
    pads = tuple(attributes.get("pads", (0, 0, 0, 0)))
    if any(pads):
        raise ValueError(f"its pooling {node.name} has pads {pads}; expected none")
    if any(step != 1 for step in attributes.get("dilations", ())):
        raise ValueError(f"its pooling {node.name} is dilated; no VGG's is")
    if attributes.get("auto_pad") == b"SAME_LOWER":
        raise ValueError(f"its pooling {node.name} pads odd sizes at the top; expected the bottom")
    is_up = attributes.get("ceil_mode") == 1 or attributes.get("auto_pad") == b"SAME_UPPER"
    return {
        "pool_size": list(attributes.get("kernel_shape", ())),
        "strides": list(attributes.get("strides", (1, 1))),
        "padding": "same" if is_up else "valid",
    }
