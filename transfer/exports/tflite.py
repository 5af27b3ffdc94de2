"""Export to TFLite (LiteRT), for phones and embedded devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from transfer.core.private_api import with_constants
from transfer.layers.classifier import Classifier

Precision = Literal["float32", "float16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")


def convert(
    classifier: Classifier, precision: Precision, examples: Iterable[np.ndarray] = ()
) -> bytes:
    """Convert a classifier to a TFLite model.

    It maps float32 ``[batch, size, size, channels]`` in 0..255 to float32 probabilities ``[batch,
    num_classes]``, for any internal precision.

    Args:
        classifier: the classifier to convert.
        precision: float16 halves the size of the weights; int8 quarters it, and computes in
            integers.
        examples: for int8, representative images, ``[1, size, size, channels]`` each: calibrate the
            quantization range of the activations. A hundred are enough.

    Raises:
        ValueError: if the precision is unknown, int8 has no examples, or TFLite has no kernel for
            an operation of the network.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision {precision!r} is not known; choose from: {', '.join(PRECISIONS)}"
        )
    preprocess = classifier.preprocess
    shape = [None, *preprocess.shape]
    function = tf.function(classifier.probabilities_of_resized, autograph=False)
    concrete = function.get_concrete_function(tf.TensorSpec(shape, tf.float32, "pixels"))
    # Otherwise the converter would treat the weights, which are function arguments, as variables.
    frozen = with_constants(concrete)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([frozen], classifier)
    if precision != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if precision == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if precision == "int8":
        examples = list(examples)
        if not examples:
            raise ValueError("int8 needs examples of images")
        converter.representative_dataset = lambda: ([image] for image in examples)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    try:
        return converter.convert()
    except Exception as error:  # TFLite has no specific exception type
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"TFLite cannot convert this network: {reason}") from error


def load(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A function that maps resized pixels, float32 ``[batch, size, size, channels]``, to
    probabilities."""
    interpreter = Interpreter(model_path=str(path))
    (input_,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(pixels: np.ndarray) -> np.ndarray:
        interpreter.resize_tensor_input(input_["index"], pixels.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(input_["index"], pixels)
        interpreter.invoke()
        return interpreter.get_tensor(output["index"])

    return run
