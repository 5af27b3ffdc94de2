"""Console output of the command line: accuracies, progress bars, log lines."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

from recipes import terminal
from recipes.finetune_flags import FinetuneConfig
from recipes.flag_values import flag_of

_FLAGS = {option.name: option.name for option in fields(FinetuneConfig)} | {
    "run_dir": "out",
    "feeds": "feed",
    "graph": "model",
    "formats": "format",
    # Arguments of export, convert, pretrain, evaluate and serve.
    **{
        name: name
        for name in (
            *("add", "num_images", "num_examples", "spatial_order", "pooling", "leave_out", "arch"),
            *("small_epochs", "small_size", "abstain_below", "coverage", "risk", "unknown"),
            *("top_k", "labels", "max_mb", "max_megapixels", "max_queue", "max_rate", "kernels"),
            "trial_minutes",
        )
    },
}
"""Library argument name to flag name."""


def download_bar(title: str, done: int, total: int) -> Any:
    """A tqdm progress bar in bytes on standard error; a context manager."""
    from tqdm import tqdm

    return tqdm(
        desc=terminal.escaped(title),
        initial=done,
        total=total,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        leave=False,
    )


def with_flags(text: str) -> str:
    """Replace argument names in a library message by the command-line flags.

    ``views=N`` becomes ``--views N``, ``resume=True`` ``--resume``, ``run_dir`` ``--out`` and
    ``feeds={'keep_prob:0': 1.0}`` ``--feed=keep_prob:0=1.0``.
    """
    names = "|".join(sorted(_FLAGS, key=len, reverse=True))
    text = re.sub(
        rf"\b({names})=\{{'([^']*)': '?([^'}}]*)'?\}}",
        lambda match: f"--{_FLAGS[match[1]]}={match[2]}={match[3]}",
        text,
    )
    return re.sub(
        rf"(?<![\w./:'\"-])({names})(=True\b|=(?=[\S])|(?![\w./:'\"=]))",
        _as_flag,
        text,
    )


def _as_flag(match: re.Match[str]) -> str:
    name, value = match.groups()
    if not value and "_" not in name:
        return name  # may be an ordinary word
    return f"{flag_of(_FLAGS[name])}{' ' if value == '=' else ''}"


def decoding(images: Iterable[Any]) -> Iterable[Any]:
    """Images that are decoded before the work begins, with a progress bar."""
    from transfer.core import measurement

    return measurement.progress(images, "images", "image")


_quiet = False


def set_quiet(quiet: bool) -> None:
    """Whether to show results, warnings and errors only."""
    global _quiet
    _quiet = quiet
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported


def say_unless_quiet(line: str) -> None:
    """Write a line to standard error that is neither a result nor a warning."""
    if not _quiet:
        terminal.say(line)


def suggest(*commands: str) -> None:
    """Show what can be done next, unless quiet."""
    for title, command in zip(("next: ", *["      "] * len(commands)), commands, strict=False):
        say_unless_quiet(f"{title}vgg-transfer {command}")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The most similar choice as a sentence, with a leading space; empty if none is similar."""
    near = difflib.get_close_matches(word, [*choices], n=1)
    return f" Did you mean {near[0]}?" if near else ""


def verbosity() -> int:
    """``verbose`` of the library: 1 (progress bars) on a terminal, 2 (log lines) otherwise, 0 if
    quiet."""
    if _quiet:
        return 0
    return 1 if sys.stderr.isatty() else 2


@contextlib.contextmanager
def resumable(verb: str) -> Iterator[None]:
    """On interruption, tell the user the command that resumes the run.

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
            f"interrupted; resume with: vgg-transfer {verb} --config "
            f"{shlex.quote(str(run_dir / run_folder.CONFIG))} --out {shlex.quote(str(run_dir))} "
            "--resume",
            error.status,
        ) from error


@contextlib.contextmanager
def skip_suggested() -> Iterator[None]:
    """Mention --skip-unreadable in errors about images that cannot be decoded."""
    from transfer.data.unreadable import UnreadableImageError

    try:
        yield
    except UnreadableImageError as error:
        raise ValueError(f"{error}, or leave them out with --skip-unreadable N") from error


class Stopped(KeyboardInterrupt):
    """A run was interrupted; ``status`` is the exit status of the process."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class LogLines(logging.Handler):
    """Logging handler that writes lines to standard error, with ``warning: `` and higher levels as
    a prefix."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):  # not at the end of a progress bar
            terminal.say(f"{prefix}{with_flags(record.getMessage())}")


@contextlib.contextmanager
def each_line_once() -> Iterator[None]:
    """Show each log message only once: those of many runs on the same images are the same."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        before = len(seen)
        seen.add(record.getMessage())
        return len(seen) > before

    handlers = logging.getLogger("transfer").handlers
    for handler in handlers:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_new)


def log_to_stderr() -> None:
    """Show the library's log messages on standard error: INFO and above, or warnings if quiet."""
    logger = logging.getLogger("transfer")
    if not any(isinstance(handler, LogLines) for handler in logger.handlers):
        logger.addHandler(LogLines())
    logger.setLevel(logging.WARNING if _quiet else logging.INFO)
    logger.propagate = False
