"""Gradients of convolutions as a CPU computes them soonest.

On a CPU TensorFlow has two implementations of a convolution. oneDNN's (``TF_ENABLE_ONEDNN_OPTS=1``)
is the faster one for the outputs and for the gradient of the inputs. For the gradient of the kernel
it is so with AVX-512; without, it is the slower one, up to twice. It does not take that of a
convolution whose padding is given in numbers. So the same padding is given in numbers there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef

_NAME = "VggTransferConv2D"
_AVX512 = frozenset({"AVX512F", "AVX512_SKX", "X86_V4"})  # NumPy's names, those of 2.4 last


def with_fast_gradients(graph_def: GraphDef) -> GraphDef:
    """The same graph, whose gradients are computed sooner; on a GPU, and on a processor with
    AVX-512, the graph as it is."""
    if tf.config.list_logical_devices("GPU") or has_avx512():
        return graph_def
    marked = GraphDef()
    marked.CopyFrom(graph_def)
    for node in marked.node:
        if _is_plain(node):
            node.attr["_gradient_op_type"].s = _NAME.encode()
    return marked


def has_avx512() -> bool:
    """Whether the processor has AVX-512, as far as NumPy knows."""
    known = np.show_config(mode="dicts").get("SIMD Extensions", {})
    return not _AVX512.isdisjoint([*known.get("baseline", []), *known.get("found", [])])


def _is_plain(node: NodeDef) -> bool:
    """A convolution that moves by one pixel and pads by nothing or to its own size.

    Then the padding does not depend on the size of the image.
    """
    if node.op != "Conv2D":
        return False
    steps = [*node.attr["strides"].list.i]
    if "dilations" in node.attr:
        steps += node.attr["dilations"].list.i
    layout = node.attr["data_format"].s if "data_format" in node.attr else b"NHWC"
    padding = node.attr["padding"].s
    return {*steps} == {1} and layout in (b"", b"NHWC") and padding in (b"SAME", b"VALID")


@tf.RegisterGradient(_NAME)
def _gradient(op: tf.Operation, gradient: tf.Tensor) -> list[Any]:
    """Of the inputs and of the kernel ``[height, width, in, out]``."""
    inputs, kernel = op.inputs
    padding = op.get_attr("padding").decode()
    height, width = kernel.shape[:2]
    to_inputs = tf.raw_ops.Conv2DBackpropInput(
        input_sizes=tf.shape(inputs),
        filter=kernel,
        out_backprop=gradient,
        strides=[1, 1, 1, 1],
        padding=padding,
    )
    to_kernel = tf.raw_ops.Conv2DBackpropFilter(
        input=inputs,
        filter_sizes=tf.shape(kernel),
        out_backprop=gradient,
        strides=[1, 1, 1, 1],
        padding="EXPLICIT",
        explicit_paddings=[0, 0, *_pads(padding, height), *_pads(padding, width), 0, 0],
    )
    return [to_inputs, to_kernel]


def _pads(padding: str, size: int) -> tuple[int, int]:
    """Before and after, of a kernel of that size; as in the documentation of ``tf.nn``."""
    total = size - 1 if padding == "SAME" else 0
    return total // 2, total - total // 2
