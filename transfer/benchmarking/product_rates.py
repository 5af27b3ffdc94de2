"""Throughput of matrix products in each precision: the limit of a network computed in it."""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef

from transfer.core import measurement
from transfer.graph import Network, Variable
from transfer.layers.graph_layer import GraphLayer
from transfer.quantization import engines
from transfer.quantization.engines import Engine

# Many channels: to convert input and output to int8 and back should take little of the time.
_SIDE, _CHANNELS, _IMAGES = 16, 2048, 4
_REPEAT = 5


def product_gflops(precision: str, engine: Engine) -> float:
    """Multiplications and additions per second of large matrix products, in units of 1e9.

    The product is a 1x1 convolution with many channels, computed by the library that computes the
    network: LiteRT or OpenVINO for int8, TensorFlow for the others.

    Args:
        precision: ``float32``, ``int8``, ``mixed_bfloat16`` or ``mixed_float16``.
        engine: the library that computes in int8.
    """
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(1, 1, _CHANNELS, _CHANNELS)).astype(np.float32)
    images = generator.normal(size=(_IMAGES, _SIDE, _SIDE, _CHANNELS)).astype(np.float32)
    network = _convolution()
    if precision == "int8":
        quantized = engines.quantize(engine, GraphLayer(network, {"kernel": kernel}), images[:2])
        seconds = measurement.best_seconds(lambda: quantized(images), _REPEAT)
    else:
        layer = GraphLayer(network, {"kernel": kernel}, dtype=precision)
        compiled = tf.function(layer, autograph=False)
        batch = tf.constant(images)
        seconds = measurement.best_seconds(lambda: compiled(batch).numpy(), _REPEAT)
    return round(2e-9 * _IMAGES * _SIDE**2 * _CHANNELS**2 / seconds, 1)


def _convolution() -> Network:
    graph_def = GraphDef()
    node = graph_def.node.add(name="product", op="Conv2D", input=["images", "kernel"])
    node.attr["T"].type = tf.float32.as_datatype_enum
    node.attr["strides"].list.i.extend([1, 1, 1, 1])
    node.attr["padding"].s = b"VALID"
    return Network(
        graph_def,
        input="images:0",
        input_dtype=tf.float32,
        output="product:0",
        variables=(Variable("kernel", tf.float32, (1, 1, _CHANNELS, _CHANNELS)),),
        input_shape=(None, _SIDE, _SIDE, _CHANNELS),
    )
