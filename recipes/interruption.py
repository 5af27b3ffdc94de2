"""What Ctrl-C and a scheduler's SIGTERM do to a run that can be resumed.

The step that is being done is finished, a checkpoint is written, and the last line says how to go
on. A second signal ends the run at once; it then goes on from the checkpoint before.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was asked to end; ``status`` is what a shell expects of the process then."""

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.status = 128 + number


class Signals:
    """Turns signals into ``KeyboardInterrupt``, but not within ``held``: there it waits."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._is_held = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        is_first = self.received is None
        self.received = number
        if not (is_first and self._is_held):
            raise KeyboardInterrupt
        print("finishing the step; once more to stop at once", file=sys.stderr)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While something is done that must not be left half done."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self.received is not None:
            raise KeyboardInterrupt


@contextlib.contextmanager
def resumable(verb: str, run: Path, config_name: str) -> Iterator[Signals]:
    """While a run goes on in its folder.

    Raises:
        Interrupted: instead of a ``KeyboardInterrupt``; says how to go on.
    """
    signals = Signals()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # others may not set handlers
        before = {number: signal.signal(number, signals.handle) for number in SIGNALS}
    try:
        yield signals
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"interrupted; go on with: vgg-transfer {verb} --config {run / config_name} "
            f"--out {run} --resume",
            signals.received or signal.SIGINT,
        ) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
