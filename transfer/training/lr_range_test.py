"""Learning-rate range test: raises the learning rate in a short training until the loss diverges.

As in arXiv 1506.01186, section 3.3, with an exponential ramp.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from transfer.training.trainer import Batch, Trainer

SMOOTHING = 0.9
"""Decay of the exponential moving average of the loss; averages about ten steps."""
DIVERGED = 4.0
"""The test stops when the smoothed loss exceeds this multiple of its minimum."""


@dataclass(frozen=True)
class RangeTest:
    """Learning rates and losses; all ``[steps]``, in the order of the steps.

    ``losses`` are the batch losses, ``smoothed`` their exponential moving average. ``suggestion``
    is a tenth of the rate with the lowest smoothed loss, beyond which the loss rises.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray

    @property
    def suggestion(self) -> float:
        return float(f"{self.rates[np.argmin(self.smoothed)] / 10:.1g}")


def range_test(
    trainer: Trainer,
    batches: Iterable[Batch],
    *,
    lowest: float = 1e-7,
    highest: float = 1.0,
    steps: int = 100,
) -> RangeTest:
    """Train with rising learning rates; the weights are unusable afterwards.

    Args:
        trainer: a trainer with constant learning rates. The ratios between its parameter groups are
            kept; ``lowest``, ``highest`` and the result refer to the first group.
        batches: training batches; with fewer than ``steps``, the test ends after the last one.
        lowest: learning rate of the first step.
        highest: learning rate of the last step.
        steps: maximum number of steps.

    Raises:
        ValueError: if the range is empty, or the loss diverges in the first ten steps: then
            ``lowest`` is too high.
    """
    if not 0 < lowest < highest or steps < 2:
        raise ValueError(
            f"expected 0 < lowest < highest and at least 2 steps, got {lowest:g}, {highest:g} and "
            f"{steps} steps"
        )
    optimizers = [group.optimizer for group in trainer.groups]
    first = float(optimizers[0].learning_rate)
    scales = [float(optimizer.learning_rate) / first for optimizer in optimizers]
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    mean, has_diverged = 0.0, False
    for (inputs, labels), rate in zip(batches, np.geomspace(lowest, highest, steps), strict=False):
        for optimizer, scale in zip(optimizers, scales, strict=True):
            optimizer.learning_rate = rate * scale
        loss, *_ = trainer.train_step(inputs, labels)
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        corrected = mean / (1 - SMOOTHING ** (len(losses) + 1))  # bias correction, as in Adam
        if not math.isfinite(loss) or (smoothed and corrected > DIVERGED * min(smoothed)):
            has_diverged = True
            break
        rates.append(rate)
        losses.append(loss)
        smoothed.append(corrected)
    if has_diverged and len(rates) < min(steps, 10):
        raise ValueError(
            f"the loss diverged after {len(rates)} steps, at a learning rate of "
            f"{rates[-1] if rates else lowest:.2g}; begin lower than {lowest:g}, or check that the "
            "preprocessing is the one that the weights expect"
        )
    if not rates:
        raise ValueError("there are no batches")
    return RangeTest(np.array(rates), np.array(losses), np.array(smoothed))
