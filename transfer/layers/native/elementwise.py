"""Arithmetic on each value, activations, and choices between values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from transfer.graph import dtype_of
from transfer.layers.native.batch_norm import composed_batch_norm
from transfer.layers.native.normalization import scaled
from transfer.layers.native.rules import rule
from transfer.layers.native.walk import ACTIVATIONS, Static, Walk

ops = keras.ops
_UNARY: dict[str, Callable[[Any], Any]] = {
    "Abs": ops.abs,
    "Ceil": ops.ceil,
    "Cos": ops.cos,
    "Erf": ops.erf,
    "Exp": ops.exp,
    "Expm1": ops.expm1,
    "Floor": ops.floor,
    "Inv": ops.reciprocal,
    "IsFinite": ops.isfinite,
    "IsInf": ops.isinf,
    "IsNan": ops.isnan,
    "Log": ops.log,
    "Log1p": ops.log1p,
    "LogicalNot": ops.logical_not,
    "Neg": ops.negative,
    "OnesLike": ops.ones_like,
    "Reciprocal": ops.reciprocal,
    "Rint": ops.round,
    "Round": ops.round,
    "Rsqrt": ops.rsqrt,
    "Sign": ops.sign,
    "Sin": ops.sin,
    "Sqrt": ops.sqrt,
    "Square": ops.square,
    "Tan": ops.tan,
    "ZerosLike": ops.zeros_like,
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": ops.add,
    "AddV2": ops.add,
    "BiasAdd": ops.add,
    "BiasAddV1": ops.add,
    "Div": ops.divide,
    "Equal": ops.equal,
    "FloorDiv": ops.floor_divide,
    "FloorMod": ops.mod,
    "Greater": ops.greater,
    "GreaterEqual": ops.greater_equal,
    "Less": ops.less,
    "LessEqual": ops.less_equal,
    "LogicalAnd": ops.logical_and,
    "LogicalOr": ops.logical_or,
    "Maximum": ops.maximum,
    "Minimum": ops.minimum,
    "Mul": ops.multiply,
    "NotEqual": ops.not_equal,
    "Pow": ops.power,
    "RealDiv": ops.divide,
    "Sub": ops.subtract,
}
_MERGES = {
    "Add": keras.layers.Add,
    "AddV2": keras.layers.Add,
    "Maximum": keras.layers.Maximum,
    "Minimum": keras.layers.Minimum,
    "Mul": keras.layers.Multiply,
    "Sub": keras.layers.Subtract,
}
"""Layers for operands of the same shape."""
_SUMS = frozenset({"Add", "AddV2", "BiasAdd", "BiasAddV1"})


@rule("CheckNumerics EnsureShape Identity PreventGradient Snapshot PlaceholderWithDefault")
def _passed(walk: Walk, node: NodeDef) -> Any:
    return walk.operands(node)[0]


@rule("IdentityN")
def _all_passed(walk: Walk, node: NodeDef) -> Any:
    return walk.operands(node)


@rule(" ".join(_UNARY))
def _unary(walk: Walk, node: NodeDef) -> Any:
    return walk.operation(node, _UNARY[node.op], walk.operands(node)[0])


@rule(" ".join([*ACTIVATIONS, "LogSoftmax", "Softmax"]))
def _activation(walk: Walk, node: NodeDef) -> Any:
    (values,) = walk.operands(node)
    name = ACTIVATIONS.get(node.op) or {"Softmax": "softmax", "LogSoftmax": "log_softmax"}[node.op]
    return walk.layer(keras.layers.Activation, [node], values, activation=name, is_scope=False)


@rule("LeakyRelu")
def _leaky_relu(walk: Walk, node: NodeDef) -> Any:
    slope = node.attr["alpha"].f if "alpha" in node.attr else 0.2
    (values,) = walk.operands(node)
    return walk.layer(
        keras.layers.LeakyReLU, [node], values, negative_slope=float(slope), is_scope=False
    )


@rule("Cast")
def _cast(walk: Walk, node: NodeDef) -> Any:
    (values,) = walk.operands(node)
    dtype = dtype_of(node)
    if dtype is None or values.dtype == dtype.name:
        return values
    return walk.operation(node, ops.cast, values, dtype.name)


@rule(" ".join(_BINARY))
def _binary(walk: Walk, node: NodeDef) -> Any:
    first, second = walk.operands(node)
    for index, operand in enumerate((first, second)):
        if isinstance(operand, Static) and operand.is_trained:
            return _with_weight(walk, node, (second, first)[index], operand, is_first=index == 0)
    if isinstance(first, Static) or isinstance(second, Static):
        rank = max(len(o.shape) for o in (first, second) if not isinstance(o, Static))
        return walk.operation(
            node, _BINARY[node.op], _constant(first, rank), _constant(second, rank)
        )
    if node.op in _MERGES and first.shape == second.shape:
        if first is second and node.op == "Mul":
            return walk.operation(node, ops.square, first)
        if first is not second:
            merge = _MERGES[node.op]
            return walk.layer(merge, [node], [first, second], is_scope=node.op in _SUMS)
    return walk.operation(node, _BINARY[node.op], first, second)


def _with_weight(walk: Walk, node: NodeDef, images: Any, weight: Static, *, is_first: bool) -> Any:
    """The result of an operation with a weight: its scale and offset."""
    if node.op == "Mul":
        normalized = composed_batch_norm(walk, node, images, weight)
        if normalized is not None:
            return normalized
        tail = walk.tail(node, images.shape[-1])
        if tail.bias is not None and tail.activation is None:
            return scaled(walk, tail.nodes, images, weight, tail.bias)
        return scaled(walk, [node], images, weight)
    if node.op in _SUMS:
        return scaled(walk, [node], images, None, weight)
    if node.op == "Sub" and not is_first:
        return scaled(walk, [node], images, None, weight.to(tf.negative))
    if node.op in ("Div", "RealDiv") and not is_first:
        return scaled(walk, [node], images, weight.to(tf.math.reciprocal))
    if node.op == "Sub":
        negative = walk.operation(node, ops.negative, images, part="negative")
        return scaled(walk, [node], negative, None, weight)
    walk.refuse(node, f"its operand {weight.tensor!r} is trained")


def _constant(operand: Any, rank: int) -> Any:
    """An operand as ``keras.ops`` takes it: a number, an array or a Keras tensor."""
    if not isinstance(operand, Static):
        return operand
    value = operand.value
    return value.reshape(()).item() if value.size == 1 and value.ndim <= rank else value


@rule("SquaredDifference")
def _squared_difference(walk: Walk, node: NodeDef) -> Any:
    first, second = walk.operands(node)
    for operand in (first, second):
        if isinstance(operand, Static) and operand.is_trained:
            walk.refuse(node, f"its operand {operand.tensor!r} is trained")
    rank = max(len(o.shape) for o in (first, second) if not isinstance(o, Static))
    difference = walk.operation(
        node, ops.subtract, _constant(first, rank), _constant(second, rank), part="root"
    )
    return walk.operation(node, ops.square, difference)


@rule("AddN")
def _sum(walk: Walk, node: NodeDef) -> Any:
    operands = walk.operands(node)
    if any(isinstance(operand, Static) for operand in operands):
        walk.refuse(node, "an operand does not depend on the images")
    return operands[0] if len(operands) == 1 else walk.layer(keras.layers.Add, [node], operands)


@rule("Select SelectV2")
def _selection(walk: Walk, node: NodeDef) -> Any:
    operands = walk.operands(node)
    trained = [o.tensor for o in operands if isinstance(o, Static) and o.is_trained]
    if trained:
        walk.refuse(node, f"its operand {trained[0]!r} is trained")
    rank = max(len(o.shape) for o in operands if not isinstance(o, Static))
    return walk.operation(node, ops.where, *(_constant(operand, rank) for operand in operands))


@rule("ClipByValue")
def _clip(walk: Walk, node: NodeDef) -> Any:
    images, low, high = walk.operands(node)
    bounds = [np.ravel(bound.value) for bound in (low, high)]
    if any(bound.size != 1 for bound in bounds) or low.is_trained or high.is_trained:
        walk.refuse(node, "its bounds are not two numbers")
    return walk.operation(node, ops.clip, images, *(bound[0].item() for bound in bounds))
