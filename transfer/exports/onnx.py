"""Export to ONNX, for onnxruntime and other runtimes. Needs the extra ``vgg-transfer[onnx]``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from transfer.layers.classifier import Classifier

OPSET = 18


def check_installed() -> None:
    """Check that the ONNX packages are installed.

    Raises:
        ImportError: if not; says how to install them.
    """
    try:
        import onnxruntime
        import tf2onnx
    except ImportError as error:
        raise ImportError(
            f"ONNX needs a package that is not installed ({error}); pip install "
            "'vgg-transfer[onnx]'"
        ) from error
    del onnxruntime, tf2onnx


def save(classifier: Classifier, path: Path) -> None:
    """Write a classifier as an ONNX model.

    It maps ``pixels``, float32 ``[batch, height, width, channels]`` in 0..255, to
    ``probabilities``, float32 ``[batch, num_classes]``.

    Raises:
        ImportError: see ``check_installed``.
        ValueError: if an operation of the network cannot be converted.
    """
    check_installed()
    import tf2onnx

    preprocess = classifier.preprocess
    shape = [None, *preprocess.shape]

    @tf.function(autograph=False, input_signature=[tf.TensorSpec(shape, tf.float32, "pixels")])
    def run(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"probabilities": classifier.probabilities_of_resized(pixels)}

    try:
        tf2onnx.convert.from_function(run, run.input_signature, opset=OPSET, output_path=str(path))
    except Exception as error:  # tf2onnx has no specific exception type
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"tf2onnx cannot convert this network: {reason}") from error


def load(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A function that maps resized pixels, float32 ``[batch, size, size, channels]``, to
    probabilities.

    Raises:
        ValueError: if onnxruntime cannot compute the model.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its types have no common base
        raise ValueError(f"onnxruntime cannot load this model: {error}") from error

    def run(pixels: np.ndarray) -> np.ndarray:
        return session.run(["probabilities"], {"pixels": pixels})[0]

    return run
