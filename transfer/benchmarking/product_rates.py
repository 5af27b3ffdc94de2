"""Throughput of matrix products in each precision: the limit of a network computed in it."""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef

from transfer.core import measurement
from transfer.graph import Network, Variable
from transfer.layers.graph_layer import GraphLayer
from transfer.quantization import engines
from transfer.quantization.engines import Engine

# Several products, one after the other: to convert the input to int8 and the output back should
# take little of the time, also on processors with units for matrices, such as AMX. The kernel fits
# in the caches of a core: one of 2048 channels does not, and its loading is what is measured.
_SIDE, _KERNEL, _CHANNELS, _IMAGES, _DEPTH = 32, 3, 512, 4, 8
_REPEAT = 4


def product_gflops(precision: str, engine: Engine) -> float:
    """Multiplications and additions per second of convolutions of many channels, in units of 1e9.

    Each is of the result of the one before. The library is that which computes the network: LiteRT
    or OpenVINO for int8, TensorFlow for the others.

    Args:
        precision: ``float32``, ``int8``, ``mixed_bfloat16`` or ``mixed_float16``.
        engine: the library that computes in int8.
    """
    generator = np.random.default_rng(0)
    shape = (_KERNEL, _KERNEL, _CHANNELS, _CHANNELS)
    kernel = generator.normal(size=shape).astype(np.float32)
    kernel /= math.prod(shape[:3]) ** 0.5  # so that values keep their size
    images = generator.normal(size=(_IMAGES, _SIDE, _SIDE, _CHANNELS)).astype(np.float32)
    network = _convolutions(shape)
    if precision == "int8":
        quantized = engines.quantize(engine, GraphLayer(network, {"kernel": kernel}), images[:2])
        seconds = measurement.best_seconds(lambda: quantized(images), _REPEAT)
    else:
        layer = GraphLayer(network, {"kernel": kernel}, dtype=precision)
        compiled = tf.function(layer, autograph=False)
        batch = tf.constant(images)
        seconds = measurement.best_seconds(lambda: compiled(batch).numpy(), _REPEAT)
    return round(2e-9 * _DEPTH * _IMAGES * _SIDE**2 * math.prod(shape) / seconds, 1)


def _convolutions(shape: tuple[int, ...]) -> Network:
    graph_def = GraphDef()
    values = "images"
    for number in range(_DEPTH):
        node = graph_def.node.add(name=f"product{number}", op="Conv2D", input=[values, "kernel"])
        node.attr["T"].type = tf.float32.as_datatype_enum
        node.attr["strides"].list.i.extend([1, 1, 1, 1])
        node.attr["padding"].s = b"SAME"
        values = node.name
    return Network(
        graph_def,
        input="images:0",
        input_dtype=tf.float32,
        output=f"{values}:0",
        variables=(Variable("kernel", tf.float32, shape),),
        input_shape=(None, _SIDE, _SIDE, _CHANNELS),
    )
