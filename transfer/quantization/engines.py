"""The libraries that compute in int8, by name."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import numpy as np

from transfer.layers.graph_layer import GraphLayer
from transfer.quantization import litert, openvino

Engine = Literal["litert", "openvino"]
_MODULES: dict[Engine, ModuleType] = {"litert": litert, "openvino": openvino}


def engine_of(option: Literal["auto", "litert", "openvino"]) -> Engine:
    """The engine that a value of ``int8_engine`` means. ``auto`` is OpenVINO if it is installed, as
    it is faster, else LiteRT."""
    if option != "auto":
        return option
    return "openvino" if openvino.is_installed() else "litert"


def check_installed(engine: Engine) -> None:
    """Check that an engine can be used.

    Raises:
        ValueError: says how to install it.
    """
    if engine == "openvino" and not openvino.is_installed():
        raise ValueError(
            "int8_engine=openvino needs OpenVINO and NNCF, which are not installed; install them "
            "with: pip install 'vgg-transfer[openvino]', or use int8_engine=litert"
        )


def versions(engine: Engine) -> dict[str, str]:
    """Versions of the packages that the results of an engine depend on."""
    return _MODULES[engine].versions()


def quantize(
    engine: Engine, layer: GraphLayer[Any], images: np.ndarray
) -> Callable[[Any], np.ndarray]:
    """A layer in int8, as a function of preprocessed images with float32 results.

    Args:
        engine: the library to use.
        layer: the frozen part of a network.
        images: images to calibrate on, float32 ``[num_images, height, width, channels]``.

    Raises:
        ValueError: if the engine cannot convert the network.
    """
    return _MODULES[engine].quantize(layer, images)
