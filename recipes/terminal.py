"""Terminal output with control characters escaped; see ``transfer.core.escapes``."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from transfer.core.escapes import escaped as escaped

_BAR = re.compile("(?:\n|\x1b\\[A)+|\r")  # cursor movements of tqdm, each in one write


def say(line: str) -> None:
    """Write a line to standard error."""
    print(escaped(line), file=sys.stderr, flush=True)


class EscapingStream:
    """Writes to another stream with control characters escaped, except newlines and tabs."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = self.rich_proxied_file = raw  # rich writes its colours to the second attribute

    def write(self, text: str) -> int:
        bar = _BAR.match(text)
        moves = bar[0] if bar else ""
        kept = re.split("([\n\t])", text.removeprefix(moves))
        kept[::2] = map(escaped, kept[::2])
        self.raw.write(moves + "".join(kept))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def raw(stream: Any) -> TextIO:
    """The unescaped stream, for output to programs and for progress bars that move the cursor."""
    return stream.raw if isinstance(stream, EscapingStream) else stream


@contextlib.contextmanager
def escaping() -> Iterator[None]:
    """Escape control characters on standard output and standard error."""
    with (
        contextlib.redirect_stdout(EscapingStream(raw(sys.stdout))),
        contextlib.redirect_stderr(EscapingStream(raw(sys.stderr))),
    ):
        yield


def is_closed(stream: Any) -> bool:
    """Whether the reader of a stream has closed it, as in ``predict | head -1``. Its remaining
    output is then discarded, so that Python does not report an error at exit."""
    try:
        stream.flush()
        # With PYTHONUNBUFFERED, what could not be written is not kept, and flush succeeds.
        if not _has_no_reader(stream):
            return False
    except BrokenPipeError:
        pass
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
    return True


def _has_no_reader(stream: Any) -> bool:
    """Whether a stream is a pipe or socket of which the system knows that nobody reads it."""
    try:
        poll = select.poll()  # Windows has none
        poll.register(stream.fileno(), select.POLLOUT)
    except (AttributeError, OSError):  # a stream without a file, such as a test's
        return False
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
