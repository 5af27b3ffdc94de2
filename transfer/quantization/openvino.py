"""int8 by OpenVINO, quantized by NNCF. Needs the extra ``vgg-transfer[openvino]``."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np

from transfer.layers.graph_layer import GraphLayer
from transfer.quantization.frozen_graph import frozen

_TELEMETRY = "openvino_telemetry"


def is_installed() -> bool:
    """Whether OpenVINO and NNCF can be imported; does not import them."""
    return all(find_spec(name) is not None for name in ("openvino", "nncf"))


def versions() -> dict[str, str]:
    """The packages that the result depends on."""
    return {name: version(name) for name in ("openvino", "nncf")}


def quantize(layer: GraphLayer[Any], images: np.ndarray) -> Callable[[Any], np.ndarray]:
    """A layer in int8, as a function of preprocessed images with float32 results.

    Args:
        layer: the frozen part of a network.
        images: images to calibrate on, float32 ``[num_images, height, width, channels]``.

    Raises:
        ValueError: if OpenVINO cannot convert the network.
    """
    with without_telemetry():
        import nncf
        import openvino
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    graph_def = frozen(layer, images.shape[1:]).graph.as_graph_def()
    logging.getLogger("nncf").setLevel(logging.ERROR)
    try:
        model = openvino.convert_model(graph_def)
        # NNCF shows progress bars on standard output, which is for the results of a command.
        with contextlib.redirect_stdout(io.StringIO()):
            quantized = nncf.quantize(
                model,
                nncf.Dataset([image[None] for image in images]),
                subset_size=len(images),
                # The defaults, mean ranges and a correction of biases, double the error of features
                # (docs/performance.md); the correction also takes as long as the ranges.
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
                    disable_bias_correction=True,
                ),
            )
        return compiled(quantized)
    except Exception as error:  # OpenVINO and NNCF raise many types
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"OpenVINO cannot compute this network in int8: {reason}") from error


def compiled(model: Any) -> Callable[[Any], np.ndarray]:
    """An OpenVINO model on the processor, as a function of images with float32 results."""
    with without_telemetry():
        import openvino

    # Processors with bfloat16 would otherwise use it for the operations that are float.
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    run = openvino.Core().compile_model(model, "CPU", settings)
    # A copy, because the next call writes to the same memory.
    return lambda batch: np.array(run(np.asarray(batch, np.float32))[0])


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Import OpenVINO and NNCF without their telemetry.

    Otherwise both report each import and conversion to a server, without asking. They do without
    the package, a mandatory dependency, if it cannot be imported.
    """
    if _TELEMETRY in sys.modules:  # the program imported it, and decides
        yield
        return
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[_TELEMETRY]
