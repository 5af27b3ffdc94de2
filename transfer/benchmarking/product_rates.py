"""Throughput of matrix products in each precision: the limit of a network computed in it."""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef

from transfer.core import measurement
from transfer.graph import Network, Variable
from transfer.layers.backbone import MIXED_PRECISIONS, GraphLayer
from transfer.quantization import engines
from transfer.quantization.engines import Engine

_SIDE, _CHANNELS, _IMAGES = 32, 512, 8


def product_gflops(precision: str, engine: Engine) -> float:
    """Multiplications and additions per second of large matrix products, in units of 1e9.

    Each is computed by the library that computes the network: float32 is ``sgemm_gflops``; the
    others are a 1x1 convolution with many channels, a matrix product of the shape that the kernels
    for networks are made for.

    Args:
        precision: ``float32``, ``int8``, ``mixed_bfloat16`` or ``mixed_float16``.
        engine: the library that computes in int8.
    """
    if precision == "float32":
        return measurement.sgemm_gflops()
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(1, 1, _CHANNELS, _CHANNELS)).astype(np.float32)
    images = generator.normal(size=(_IMAGES, _SIDE, _SIDE, _CHANNELS)).astype(np.float32)
    network = _convolution()
    if precision in MIXED_PRECISIONS:
        layer = GraphLayer(network, {"kernel": kernel}, dtype=precision)
        compiled = tf.function(layer, autograph=False)
        batch = tf.constant(images)
        seconds = measurement.best_seconds(lambda: compiled(batch).numpy())
    else:
        quantized = engines.quantize(engine, GraphLayer(network, {"kernel": kernel}), images[:2])
        seconds = measurement.best_seconds(lambda: quantized(images))
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
