"""Ctrl-C and SIGTERM in a run that can be resumed.

The current step is finished, a checkpoint is written, and the run ends with ``Interrupted``. A
second signal ends the run at once; it then continues from the previous checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was interrupted and can be resumed.

    ``run_dir`` is its folder, ``status`` the conventional exit status, 128 plus the signal number.
    """

    def __init__(self, run_dir: Path, number: int = signal.SIGINT):
        super().__init__(f"interrupted; call again with run_dir={str(run_dir)!r}, resume=True")
        self.run_dir = run_dir
        self.status = 128 + number


class Signals:
    """Raises ``KeyboardInterrupt`` on signals; within ``held`` it is delayed."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._is_held = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        is_first = self.received is None
        self.received = number
        if not (is_first and self._is_held):
            raise KeyboardInterrupt
        logger.info("finishing the step; press Ctrl-C again to stop at once")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Delay the interrupt during code that must complete."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self.received is not None:
            raise KeyboardInterrupt


@contextlib.contextmanager
def resumable(run_dir: Path) -> Iterator[Signals]:
    """Handle signals during a run; restores the previous handlers afterwards.

    Raises:
        Interrupted: instead of ``KeyboardInterrupt``.
    """
    signals = Signals()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
        before = {number: signal.signal(number, signals.handle) for number in SIGNALS}
    try:
        yield signals
    except KeyboardInterrupt as error:
        raise Interrupted(run_dir, signals.received or signal.SIGINT) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
