"""Custom gradients of convolutions on CPUs: the faster implementation, and no wrong results.

On a CPU TensorFlow has two implementations of convolutions, Eigen and oneDNN
(``TF_ENABLE_ONEDNN_OPTS=1``). oneDNN is faster for the forward pass and for the gradient with
respect to the input. The gradient with respect to the kernel is replaced in two cases:

* Without AVX-512, oneDNN takes up to twice as long as Eigen. TensorFlow does not use oneDNN for
  explicit padding, so the padding is passed as the equivalent explicit padding.
* For a strided 1x1 convolution with fewer input channels than a vector register holds (8 with AVX2,
  16 with AVX-512), oneDNN writes past its workspace: the gradient is wrong, or the process crashes
  (https://github.com/uxlfoundation/oneDNN/issues/6035). oneDNN does not support float64, so the
  gradient is computed in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef

_FAST = "VggTransferConv2D"
_STRIDED = "VggTransferStridedConv2D"
_STRIDED_TRANSPOSE = "VggTransferStridedConv2DTranspose"
_AVX512 = frozenset({"AVX512F", "AVX512_SKX", "X86_V4"})  # names in NumPy; the last since 2.4
_MAX_REGISTER = 16
"""Number of float32 values in an AVX-512 register."""


def with_cpu_gradients(graph_def: GraphDef) -> GraphDef:
    """A copy of the graph with the custom gradients; with a GPU, the unchanged graph."""
    if tf.config.list_logical_devices("GPU"):
        return graph_def
    kinds = {node.name: kind for node in graph_def.node if (kind := _kind(node)) is not None}
    if not kinds:
        return graph_def
    marked = GraphDef()
    marked.CopyFrom(graph_def)
    for node in marked.node:
        if node.name in kinds:
            node.attr["_gradient_op_type"].s = kinds[node.name].encode()
    return marked


def has_avx512() -> bool:
    """Whether the CPU supports AVX-512, according to NumPy."""
    known = np.show_config(mode="dicts").get("SIMD Extensions", {})
    return not _AVX512.isdisjoint([*known.get("baseline", []), *known.get("found", [])])


def _kind(node: NodeDef) -> str | None:
    """Name of the custom gradient of a node; ``None`` for TensorFlow's own."""
    if node.op not in ("Conv2D", "Conv2DBackpropInput"):
        return None
    if "data_format" in node.attr and node.attr["data_format"].s not in (b"", b"NHWC"):
        return None
    if {*node.attr["strides"].list.i} != {1}:
        return _STRIDED if node.op == "Conv2D" else _STRIDED_TRANSPOSE
    return _FAST if _is_plain(node) and not has_avx512() else None


def _is_plain(node: NodeDef) -> bool:
    """Whether a convolution of stride 1 has no dilation and SAME or VALID padding.

    Its padding then does not depend on the image size.
    """
    dilations = {*node.attr["dilations"].list.i} if "dilations" in node.attr else {1}
    return node.op == "Conv2D" and dilations == {1} and node.attr["padding"].s != b"EXPLICIT"


@tf.RegisterGradient(_FAST)
def _fast_gradient(op: tf.Operation, gradient: tf.Tensor) -> list[Any]:
    """Gradients with respect to the input and the kernel ``[height, width, in, out]``."""
    inputs, kernel = op.inputs
    padding = op.get_attr("padding").decode()
    to_inputs = tf.raw_ops.Conv2DBackpropInput(
        input_sizes=tf.shape(inputs),
        filter=kernel,
        out_backprop=gradient,
        strides=[1, 1, 1, 1],
        padding=padding,
    )
    pads: dict[str, Any] = {"padding": padding}
    height, width, *_ = _sizes(kernel)
    if height is not None and width is not None:
        sides = [*_pads(padding, height), *_pads(padding, width)]
        pads = {"padding": "EXPLICIT", "explicit_paddings": [0, 0, *sides, 0, 0]}
    to_kernel = tf.raw_ops.Conv2DBackpropFilter(
        input=inputs,
        filter_sizes=tf.shape(kernel),
        out_backprop=gradient,
        strides=[1, 1, 1, 1],
        **pads,
    )
    return [to_inputs, to_kernel]


@tf.RegisterGradient(_STRIDED)
def _strided_gradient(op: tf.Operation, gradient: tf.Tensor) -> list[Any]:
    """Gradients of a strided convolution with respect to its input and kernel."""
    inputs, kernel = op.inputs
    to_inputs = tf.raw_ops.Conv2DBackpropInput(
        input_sizes=tf.shape(inputs), filter=kernel, out_backprop=gradient, **_attributes(op)
    )
    return [to_inputs, _strided_kernel_gradient(op, inputs, kernel, gradient)]


@tf.RegisterGradient(_STRIDED_TRANSPOSE)
def _strided_transpose_gradient(op: tf.Operation, gradient: tf.Tensor) -> list[Any]:
    """Gradients of a strided transposed convolution with respect to sizes, kernel and input."""
    _, kernel, inputs = op.inputs
    to_inputs = tf.raw_ops.Conv2D(input=gradient, filter=kernel, **_attributes(op))
    return [None, _strided_kernel_gradient(op, gradient, kernel, inputs), to_inputs]


def _strided_kernel_gradient(
    op: tf.Operation, inputs: tf.Tensor, kernel: tf.Tensor, outputs: tf.Tensor
) -> tf.Tensor:
    """Gradient with respect to the kernel, in float64 where oneDNN may fail."""
    height, width, channels, _ = _sizes(kernel)
    may_be_one = height in (1, None) and width in (1, None)
    may_fail = may_be_one and (channels is None or channels < _MAX_REGISTER)
    dtype = tf.float64 if may_fail else inputs.dtype
    to_kernel = tf.raw_ops.Conv2DBackpropFilter(
        input=tf.cast(inputs, dtype),
        filter_sizes=tf.shape(kernel),
        out_backprop=tf.cast(outputs, dtype),
        **_attributes(op),
    )
    return tf.cast(to_kernel, kernel.dtype)


def _sizes(kernel: tf.Tensor) -> list[int | None]:
    return kernel.shape.as_list() if kernel.shape.rank == 4 else [None] * 4


def _attributes(op: tf.Operation) -> dict[str, Any]:
    names = ("strides", "padding", "explicit_paddings", "use_cudnn_on_gpu", "dilations")
    return {name: op.get_attr(name) for name in names}


def _pads(padding: str, size: int) -> tuple[int, int]:
    """Padding before and after, for a kernel of this size; as documented in ``tf.nn``."""
    total = size - 1 if padding == "SAME" else 0
    return total // 2, total - total // 2
