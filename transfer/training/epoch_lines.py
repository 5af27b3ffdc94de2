"""One log line per epoch, for output that is not a terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import keras

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0
"""Least time between two lines. An epoch of a head may take 0.05 s."""


class EpochLines(keras.callbacks.Callback):
    """Logs the metrics of the first epoch, of the last one, and between them of one epoch in five
    seconds.

    Args:
        epochs: total number of epochs, for the lines.
        interval_s: least time between two lines, in seconds.
        clock: the time in seconds.
    """

    def __init__(
        self,
        epochs: int,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__()
        self._epochs, self._interval_s, self._clock = epochs, interval_s, clock
        self._due = clock()
        self._withheld: str | None = None

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in (logs or {}).items())
        self._withheld = f"epoch {epoch + 1} of {self._epochs}: {metrics}"
        if self._clock() >= self._due:
            self._show()

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        """Also after early stopping or an interruption: the last line is never withheld."""
        self._show()

    def _show(self) -> None:
        if self._withheld is not None:
            logger.info(self._withheld)
            self._withheld = None
            self._due = self._clock() + self._interval_s
