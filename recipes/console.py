"""What the command line prints: accuracies, progress bars, log lines."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from recipes import terminal
from recipes.finetune_flags import FinetuneConfig

_FLAGS = {option.name: option.name for option in fields(FinetuneConfig)} | {
    "run_dir": "out",
    "feeds": "feed",
    "formats": "format",
    # Of export, convert and pretrain.
    **{
        name: name
        for name in ("num_images", "num_examples", "spatial_order", "pooling", "leave_out", "arch")
    },
    **{name: name for name in ("small_epochs", "small_size")},
}
"""Arguments of the library to flags."""


def describe_accuracy(figures: dict[str, Any], what: str) -> str:
    """The accuracy with its interval, for a person."""
    low, high = figures["accuracy_ci95"]
    return (
        f"accuracy {figures['accuracy']:.4f} on {figures['num_examples']} {what} "
        f"(95 % interval {low:.4f} to {high:.4f})"
    )


def download_bar(what: str, done: int, total: int) -> Any:
    """A progress bar of bytes on standard error, for ``with`` and ``update``."""
    from tqdm import tqdm

    return tqdm(
        desc=terminal.escaped(what),
        initial=done,
        total=total,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        leave=False,
    )


def with_flags(text: str) -> str:
    """A message of the library with its arguments as flags.

    ``views=N`` becomes ``--views N``, ``resume=True`` ``--resume``, ``run_dir`` ``--out`` and
    ``feeds={'keep_prob:0': 1.0}`` ``--feed=keep_prob:0=1.0``.
    """
    either = "|".join(sorted(_FLAGS, key=len, reverse=True))
    text = re.sub(
        rf"\b({either})=\{{'([^']*)': '?([^'}}]*)'?\}}",
        lambda found: f"--{_FLAGS[found[1]]}={found[2]}={found[3]}",
        text,
    )
    return re.sub(
        rf"(?<![\w./:'\"-])({either})(=True\b|=(?=[\S])|(?![\w./:'\"=]))",
        _as_flag,
        text,
    )


def _as_flag(found: re.Match[str]) -> str:
    name, value = found.groups()
    if not value and "_" not in name:
        return name  # may be an ordinary word
    return f"--{_FLAGS[name].replace('_', '-')}{' ' if value == '=' else ''}"


def verbosity() -> int:
    """For Keras: a bar for a person, a line an epoch for a log file."""
    return 1 if sys.stderr.isatty() else 2


@contextlib.contextmanager
def resumable(verb: str) -> Iterator[None]:
    """Say how an interrupted run is continued from the command line.

    Raises:
        Stopped: in place of ``Interrupted``.
    """
    from transfer.runs import run_folder
    from transfer.runs.interruption import Interrupted

    try:
        yield
    except Interrupted as error:
        run_dir = error.run_dir
        raise Stopped(
            f"interrupted; go on with: vgg-transfer {verb} --config {run_dir / run_folder.CONFIG} "
            f"--out {run_dir} --resume",
            error.status,
        ) from error


class Stopped(KeyboardInterrupt):
    """A run was asked to end; ``status`` is the exit status of the process."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class LogLines(logging.Handler):
    """Log records of the library as lines on standard error: ``warning: ...``, or as they are."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        terminal.say(f"{prefix}{with_flags(record.getMessage())}")


def log_to_stderr() -> None:
    """Show what the library logs."""
    logger = logging.getLogger("transfer")
    if not any(isinstance(handler, LogLines) for handler in logger.handlers):
        logger.addHandler(LogLines())
    logger.setLevel(logging.INFO)
    logger.propagate = False
