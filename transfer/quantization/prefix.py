"""The frozen part of a network in int8."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from transfer.layers.graph_layer import GraphLayer
from transfer.quantization import engines
from transfer.quantization.agreement import Agreement, compare
from transfer.quantization.calibration import CalibrationImages
from transfer.quantization.engines import Engine

logger = logging.getLogger(__name__)


class QuantizedPrefix:
    """The frozen part of a network in int8, as a function of preprocessed images.

    It is quantized, and compared with float32, at its first call: a run that finds all activations
    in the cache does without. The results do not depend on the batch that an image is in, unless
    operations stay in float32.

    Args:
        layer: the frozen part of a network.
        float32: the same as a compiled function, to compare with.
        engine: the library that computes.
        images: images to calibrate and compare on.
    """

    def __init__(
        self,
        layer: GraphLayer[Any],
        float32: Callable[[Any], Any],
        engine: Engine,
        images: CalibrationImages,
    ):
        self.digest = layer.digest()
        self._layer = layer
        self._float32 = float32
        self._engine = engine
        self._images = images
        # The next epoch may be computed while this one is validated; engines have one buffer.
        self._lock = threading.Lock()

    def __call__(self, images: Any) -> np.ndarray:
        """Activations of preprocessed images, float32.

        Raises:
            ValueError: at the first call, if the engine cannot convert the network.
            DisagreementError: at the first call, if the result is too far from that of float32.
        """
        with self._lock:
            return self._checked(images)

    def measure(self) -> Agreement:
        """Compare with float32, error and time.

        Raises:
            ValueError: if the engine cannot convert the network.
        """
        run, images = self._quantized
        return compare(self._float32, run, images, timed=True)

    def key(self) -> dict[str, Any]:
        """What the activations depend on beside the layer, for the key of a cache."""
        return {
            "precision": "int8",
            "engine": engines.versions(self._engine),
            "calibration": self._images.digest(),
        }

    @functools.cached_property
    def _checked(self) -> Callable[[Any], np.ndarray]:
        run, images = self._quantized
        agreement = compare(self._float32, run, images)
        agreement.check()
        logger.info(
            f"int8 by {self._engine}: features differ from float32 by {agreement.error:.3f} of "
            "their standard deviation"
        )
        return run

    @functools.cached_property
    def _quantized(self) -> tuple[Callable[[Any], np.ndarray], np.ndarray]:
        """The int8 function, and images to compare on."""
        calibration, compared = self._images.read()
        logger.info(f"int8 by {self._engine}: calibrating on {len(calibration)} images")
        return engines.quantize(self._engine, self._layer, calibration), compared
