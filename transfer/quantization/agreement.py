"""How far int8 features are from those of float32, and how much faster they are computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from transfer.layers.head import average_over_space

MAX_ERROR = 0.2
"""Largest accepted ``feature_error``. Noise of this size costs a linear probe less than half a
point of accuracy, half as much again more than a point; see docs/performance.md."""
_PASSES = 2  # of which the faster counts: other programs may slow one down


class DisagreementError(ValueError):
    """The int8 features are too far from those of float32."""


@dataclass(frozen=True)
class Agreement:
    """Comparison of int8 with float32 on the same images.

    ``error`` is their ``feature_error``; ``time_ratio`` the time of int8 relative to float32,
    ``None`` if it was not measured.
    """

    error: float
    time_ratio: float | None = None

    def check(self) -> None:
        """Refuse features that are too far from those of float32.

        Raises:
            DisagreementError: gives the error and the limit.
        """
        if not self.error <= MAX_ERROR:  # NaN too
            raise DisagreementError(
                f"the int8 features differ from those of float32 by {self.error:.2f} of their "
                f"standard deviation; expected at most {MAX_ERROR}: use precision=float32, or "
                "another cut"
            )


def feature_error(expected: np.ndarray, actual: np.ndarray) -> float:
    """Root mean square of the difference, relative to the standard deviation over the images.

    The part of the features that all images share is no information for a classifier, so their
    mean is not counted: 0 is equality, and features that do not depend on the image have 1 or more.

    Args:
        expected: features of each image, float ``[num_images, width]`` or ``[num_images, height,
            width, channels]``, which are averaged over height and width, as a head does. At least
            two images.
        actual: the features to compare, of the same shape.

    Example:
        >>> import numpy as np
        >>> from transfer.quantization.agreement import feature_error
        >>> features = np.random.default_rng(0).normal(5, 1, [1000, 8]).astype(np.float32)
        >>> round(feature_error(features, features + 0.1), 2)
        0.1
    """
    expected, actual = (
        np.asarray(average_over_space(maps), np.float64) for maps in (expected, actual)
    )
    spread = float(np.sqrt(np.mean((expected - expected.mean(0)) ** 2)))
    difference = float(np.sqrt(np.mean((actual - expected) ** 2)))
    if spread == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / spread


def compare(
    float32: Callable[[Any], Any],
    int8: Callable[[Any], Any],
    images: np.ndarray,
    *,
    timed: bool = False,
) -> Agreement:
    """Compare two versions of a network on preprocessed images, ``[num_images, height, width,
    channels]``; with ``timed``, also their times, in alternating passes after a first one."""
    versions = {"float32": float32, "int8": int8}
    outputs = {name: np.asarray(run(images)) for name, run in versions.items()}
    error = feature_error(outputs["float32"], outputs["int8"])
    if not timed:
        return Agreement(error)
    seconds = dict.fromkeys(versions, float("inf"))
    for _ in range(_PASSES):
        for name, run in versions.items():
            start = time.perf_counter()
            np.asarray(run(images))
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return Agreement(error, seconds["int8"] / seconds["float32"])
