"""A network in conversion: its nodes, what they read, and the layers that replace them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.core.private_api import rename_operation
from transfer.graph import canonical, data_inputs, operation_of
from transfer.layers.native.names import Names
from transfer.layers.native.values import BATCHES, Values

PASSED = frozenset({"CheckNumerics", "EnsureShape", "Identity", "PreventGradient", "Snapshot"})
"""Operations that return their first input."""
ACTIVATIONS = {
    "Elu": "elu",
    "Relu": "relu",
    "Relu6": "relu6",
    "Selu": "selu",
    "Sigmoid": "sigmoid",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "Tanh": "tanh",
}
"""Operations to names of Keras activations."""
_SUMS = frozenset({"Add", "AddV2", "BiasAdd", "BiasAddV1"})

Layout = Callable[[tf.Tensor], tf.Tensor]


@dataclass(frozen=True)
class Static:
    """An operand that does not depend on the content of the images."""

    tensor: str
    values: tuple[np.ndarray, ...]
    is_trained: bool
    layout: Layout | None = None
    """How the weight of a layer is made from the tensor."""

    @property
    def value(self) -> np.ndarray:
        """Its value for every batch size.

        Raises:
            ValueError: if it depends on the batch size.
        """
        first, second = self.values
        if first.shape == second.shape and np.array_equal(first, second, equal_nan=True):
            return first
        if all((v == first.flat[0]).all() for v in self.values if v.size and first.size):
            return np.reshape(first.flat[0], ())  # zeros in the shape of a batch
        rows = [v[:1] for v in self.values if v.ndim]
        if (
            len(rows) == len(BATCHES)
            and rows[0].shape == rows[1].shape
            and all((v == rows[0]).all() for v in self.values)
        ):
            return rows[0]
        raise ValueError(f"its operand {self.tensor!r} depends on the batch size")

    def to(self, layout: Layout) -> Static:
        """The same tensor with another layout."""
        before = self.layout
        changed = layout if before is None else lambda tensor: layout(before(tensor))
        return Static(self.tensor, self.values, self.is_trained, changed)

    def laid_out(self) -> np.ndarray:
        """The weight that is made from it."""
        value = self.value
        return value if self.layout is None else self.layout(tf.constant(value)).numpy()


@dataclass(frozen=True)
class Link:
    """A weight of a layer, and the tensor of the network that it holds."""

    weight: keras.Variable
    tensor: str
    layout: Layout | None


@dataclass(frozen=True)
class Tail:
    """A node with the bias and the activation that follow it and that nothing else reads."""

    nodes: list[NodeDef]
    bias: Static | None = None
    activation: str | None = None


Operand = Any
"""A ``keras.KerasTensor`` or a ``Static``."""
Rule = Callable[["Walk", NodeDef], Any]


class Walk:
    """Converts the nodes of a network in order.

    Args:
        values: the network and what is static in it.
        images: the Keras tensor of its input.
        names: names of layers that are taken.
        dtype: dtype that the network computes in.
    """

    def __init__(self, values: Values, images: keras.KerasTensor, names: Names, dtype: str):
        self.values = values
        self.names = names
        self.dtype = dtype
        self.links: list[Link] = []
        self.tensors: dict[str, Any] = {values.network.input: images}
        self._layers: dict[Any, keras.layers.Layer] = {}
        self._used: dict[str, Any] = {}
        self._fused: set[str] = set()
        self._readers: dict[str, list[NodeDef]] = {}
        for node in values.nodes:
            for edge in data_inputs(node) if node.name in values.live else ():
                self._readers.setdefault(canonical(edge), []).append(node)

    def run(self, rules: Mapping[str, Rule]) -> Any:
        """The Keras tensor of the network's output, or those of its taps by name.

        Raises:
            ValueError: if a node cannot be expressed; gives its name and operation.
        """
        for node in self.values.nodes:
            if node.name not in self.values.live or node.name in self._fused:
                continue
            if f"{node.name}:0" in self.tensors:
                continue
            rule = rules.get(node.op)
            if rule is None:
                self.refuse(node, "Keras has no layer or operation for it that is known here")
            try:
                made = rule(self, node)
            except _RefusedError:
                raise
            except (ValueError, TypeError, NotImplementedError, IndexError) as error:
                self.refuse(node, " ".join(str(error).split())[:300])
            if node.name in self._fused:
                continue  # the output is that of a later node
            outputs = made if isinstance(made, list | tuple) else [made]
            for index, tensor in enumerate(outputs):
                self._set(node, f"{node.name}:{index}", tensor)
        network = self.values.network
        for output in network.outputs:
            if output not in self.tensors:
                raise ValueError(
                    f"cannot express {output!r} in stock Keras layers: it does not depend on the "
                    "images"
                )
        if network.taps:
            return {name: self.tensors[tensor] for name, tensor in network.taps.items()}
        return self.tensors[network.output]

    def _set(self, node: NodeDef, name: str, tensor: Any) -> None:
        self.tensors.setdefault(name, tensor)
        if name in self.values.shapes:
            expected = self.values.shape(name)
            if not self.values.rows(name):
                self.refuse(node, f"its output {expected} does not have a row for each image")
            if tuple(tensor.shape)[1:] != expected[1:]:
                self.refuse(node, f"it gives {expected}, Keras {tuple(tensor.shape)}")

    def refuse(self, node: NodeDef, why: str) -> NoReturn:
        """Raise the error about a node that cannot be expressed."""
        raise _RefusedError(
            f"cannot express node {node.name!r} ({node.op}) in stock Keras layers: {why}"
        )

    def operands(self, node: NodeDef) -> list[Operand]:
        """What a node reads."""
        return [self.operand(node, canonical(edge)) for edge in data_inputs(node)]

    def operand(self, node: NodeDef, tensor: str) -> Operand:
        """A tensor that a node reads."""
        if tensor in self.tensors:
            return self.tensors[tensor]
        operation = operation_of(tensor)
        if operation in self.values.random:
            self.refuse(node, f"it reads random numbers of {operation!r}")
        return Static(tensor, self.values.static[tensor], operation in self.values.trained)

    def static(self, node: NodeDef, index: int) -> np.ndarray:
        """The value of an operand that must be static."""
        operand = self.operand(node, canonical(data_inputs(node)[index]))
        if not isinstance(operand, Static):
            raise ValueError(f"its operand {node.input[index]!r} depends on the images")
        return operand.value

    def static_of(self, tensor: str) -> Static:
        """A static tensor that no live node reads."""
        if tensor not in self.values.static:
            self.values.add(tensor)
        trained = operation_of(tensor) in self.values.trained
        return Static(tensor, self.values.static[tensor], trained)

    def number(self, tensor: str) -> float | None:
        """The value of a static tensor that is one number and is not trained, else ``None``."""
        if operation_of(tensor) in self.values.trained:
            return None
        value = self.static_of(tensor).value
        return float(value.flat[0]) if value.size == 1 else None

    def replace(self, nodes: Sequence[NodeDef], output: Any) -> None:
        """Mark nodes as replaced, the last of them by a Keras tensor."""
        self._fused |= {node.name for node in nodes}
        self._set(nodes[-1], f"{nodes[-1].name}:0", output)

    def shape(self, node: NodeDef, index: int = 0) -> tuple[int | None, ...]:
        """The shape of an output; ``None`` for the batch."""
        return self.values.shape(f"{node.name}:{index}")

    def reader(self, node: NodeDef) -> NodeDef | None:
        """The node that reads output 0 of a node, if it is the only one that reads the node."""
        if node.name in map(operation_of, self.values.network.outputs):
            return None
        readers = self._readers.get(f"{node.name}:0", [])
        return readers[0] if len(readers) == 1 else None

    def tail(self, node: NodeDef, channels: int) -> Tail:
        """The bias and the activation after a linear operation."""
        nodes, bias, activation = [node], None, None
        while activation is None and (reader := self.reader(nodes[-1])) is not None:
            if reader.op in _SUMS and bias is None:
                other = self._bias(reader, nodes[-1], channels)
                if other is None:
                    break
                bias = other
            elif reader.op in ACTIVATIONS:
                activation = ACTIVATIONS[reader.op]
            elif reader.op not in PASSED:
                break
            nodes.append(reader)
        return Tail(nodes, bias, activation)

    def _bias(self, reader: NodeDef, node: NodeDef, channels: int) -> Static | None:
        """The operand of a sum that is a bias for each channel."""
        edges = [canonical(edge) for edge in data_inputs(reader)]
        others = [edge for edge in edges if operation_of(edge) != node.name]
        if len(others) != 1 or operation_of(others[0]) in self.values.live:
            return None
        other = self.operand(reader, others[0])
        if not isinstance(other, Static) or not other.is_trained:
            return None
        shape = other.values[0].shape
        if shape[-1:] != (channels,) or other.values[0].size != channels:
            return None
        return other.to(lambda tensor: tf.reshape(tensor, [channels]))

    def layer(
        self,
        make: type[keras.layers.Layer],
        nodes: Sequence[NodeDef],
        inputs: Any,
        weights: Iterable[Static | np.ndarray] = (),
        *,
        is_scope: bool = True,
        part: str = "",
        **config: Any,
    ) -> Any:
        """Replace nodes by a layer: the output of the layer.

        Nodes that read the same weights in the same way share a layer.

        Args:
            make: class of the layer.
            nodes: the nodes, in order.
            inputs: the Keras tensor or tensors that the layer reads.
            weights: its weights, in the order of the layer.
            is_scope: see ``Names.of``.
            part: what the layer does, if several layers replace the node.
            **config: arguments of the layer.

        Raises:
            ValueError: if a weight is used by another kind of layer too.
        """
        weights = list(weights)
        tensors = tuple(w.tensor for w in weights if isinstance(w, Static))
        key = (make, repr(sorted(config.items())), tensors)
        layer = self._layers.get(key) if tensors else None
        is_new = layer is None
        if layer is None:
            if "data_format" in inspect.signature(make).parameters:
                config["data_format"] = "channels_last"
            name = self.names.of([n.name for n in nodes], nodes[0].op, is_scope, part)
            layer = make(name=name, dtype=self.dtype, **config)
        outputs = layer(inputs)
        if weights and is_new:
            self._claim(nodes[0], weights, key)
            values = [w.laid_out() if isinstance(w, Static) else w for w in weights]
            layer.set_weights(values)
            self._layers[key] = layer
            self.links += [
                Link(variable, weight.tensor, weight.layout)
                for variable, weight in zip(layer.weights, weights, strict=True)
                if isinstance(weight, Static) and weight.is_trained
            ]
        if len(nodes) > 1:
            self.replace(nodes, outputs)
        return outputs

    def _claim(self, node: NodeDef, weights: Iterable[Any], key: Any) -> None:
        """Check that no other layer has the same weights: training would make them different."""
        for weight in weights:
            if not isinstance(weight, Static) or not weight.is_trained:
                continue
            for variable in self.values.variables_of(weight.tensor):
                if self._used.setdefault(variable, key) != key:
                    self.refuse(node, f"it shares the variable {variable!r} with another layer")

    def operation(
        self, node: NodeDef, function: Callable[..., Any], *args: Any, part: str = "", **kw: Any
    ) -> Any:
        """Replace a node, or a part of it, by an operation of ``keras.ops``: its output."""
        outputs = function(*args, **kw)
        first = outputs[0] if isinstance(outputs, list | tuple) else outputs
        name = self.names.of([node.name], node.op, False, part)
        rename_operation(first, name)
        return outputs


class _RefusedError(ValueError):
    """A node cannot be expressed; the message is complete."""
