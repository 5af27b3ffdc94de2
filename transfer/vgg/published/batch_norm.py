"""Fold batch norm into the preceding layer: exact, since both are linear at inference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BatchNorm:
    """``gamma * (x - mean) / sqrt(variance + epsilon) + beta``; ``gamma`` and ``beta`` are ``None``
    if the layer has none."""

    mean: np.ndarray
    variance: np.ndarray
    epsilon: float
    gamma: np.ndarray | None = None
    beta: np.ndarray | None = None

    def folded(
        self, name: str, kernel: np.ndarray, biases: np.ndarray | None, axis: int = -1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Kernel and biases of a layer that is equivalent to a layer followed by this batch norm.

        Args:
            name: name of the batch norm, for errors.
            kernel: array of any shape.
            biases: ``[outputs]``; ``None`` for a layer without biases.
            axis: axis of the outputs in the kernel.

        Raises:
            ValueError: if an array of the batch norm does not fit the number of outputs.
        """
        width = kernel.shape[axis]
        parts = [self.mean, self.variance, self.gamma, self.beta, biases]
        for values in parts:
            if values is not None and values.shape != (width,):
                raise ValueError(
                    f"its batch norm {name} has an array of shape {values.shape}; the layer before "
                    f"it has {width} outputs"
                )
        with np.errstate(all="ignore"):  # non-finite results are refused later
            scale = 1 / np.sqrt(self.variance.astype(np.float64) + self.epsilon)
            if self.gamma is not None:
                scale = scale * self.gamma
            shift = -self.mean * scale
            if self.beta is not None:
                shift = shift + self.beta
            if biases is not None:
                shift = shift + biases * scale
            along = [1] * kernel.ndim
            along[axis] = width
            folded = kernel * scale.reshape(along).astype(np.float32)
        return folded.astype(np.float32), shift.astype(np.float32)
