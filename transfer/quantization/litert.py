"""int8 by LiteRT: its converter quantizes, its XNNPACK kernels compute on all processor cores."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from transfer.core import measurement
from transfer.layers.graph_layer import GraphLayer
from transfer.quantization.frozen_graph import frozen


def versions() -> dict[str, str]:
    """The packages that the result depends on; the converter is part of TensorFlow."""
    return {"ai-edge-litert": version("ai-edge-litert")}


def quantize(layer: GraphLayer[Any], images: np.ndarray) -> Callable[[Any], np.ndarray]:
    """A layer in int8, as a function of preprocessed images with float32 results.

    Operations without an integer kernel stay in float32.

    Args:
        layer: the frozen part of a network.
        images: images to calibrate on, float32 ``[num_images, height, width, channels]``.

    Raises:
        ValueError: if LiteRT cannot convert the network.
    """
    function = frozen(layer, images.shape[1:])
    # The module, which holds nothing, selects the conversion that is not deprecated.
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], tf.Module())
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[None]] for image in images)
    converter.target_spec.supported_ops = [
        tf.lite.OpsSet.TFLITE_BUILTINS_INT8,
        tf.lite.OpsSet.TFLITE_BUILTINS,
    ]
    try:
        interpreter = Interpreter(
            model_content=converter.convert(), num_threads=measurement.num_cpus()
        )
        interpreter.allocate_tensors()  # where XNNPACK refuses scales that it cannot represent
    except Exception as error:  # LiteRT has no specific exception type
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"LiteRT cannot compute this network in int8: {reason}") from error
    (input_,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()
    shape: tuple[int, ...] = ()

    def run(batch: Any) -> np.ndarray:
        nonlocal shape
        batch = np.asarray(batch, np.float32)
        if batch.shape != shape:
            interpreter.resize_tensor_input(input_["index"], batch.shape)
            interpreter.allocate_tensors()
            shape = batch.shape
        interpreter.set_tensor(input_["index"], batch)
        interpreter.invoke()
        return interpreter.get_tensor(output["index"])

    return run
