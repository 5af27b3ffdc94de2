"""Files written at once: nobody ever sees a half. Text read from regular files of bounded size."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

_MAX_NAMES_BYTES = 2**27  # the names of a few million images

# Control characters and whatever else some program takes for the end of a line, and halves of
# surrogate pairs: Python's stand-ins for bytes of a file name that are not UTF-8.
_NOT_IN_A_LINE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def write_text(path: Path, text: str) -> None:
    """Write a file to a temporary name in its folder, ``.NAME.tmp``, then rename it.

    Raises:
        OSError: names the file, and what stands against it; what was there is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def read_text(path: Path, max_bytes: int) -> str:
    """Read a UTF-8 file without waiting for it: not a pipe, a device or a file without end.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is not a regular file, has more than ``max_bytes``, or is not UTF-8.
    """
    # Only an open file is certain to be the one that is read, and opening a pipe waits for its
    # other end. Windows has neither such pipes nor the flag.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = stat.filemode(status.st_mode)
            raise ValueError(f"{str(path)!r} is not a regular file, but {kind!r}")
        with open(descriptor, "rb", closefd=False) as file:
            # Some files of the system have more than their size says.
            data = b"" if status.st_size > max_bytes else file.read(max_bytes + 1)
    finally:
        os.close(descriptor)
    if max(status.st_size, len(data)) > max_bytes:
        raise ValueError(f"{str(path)!r} has more than the {max_bytes:,} bytes that it may have")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not a UTF-8 text file: {error}") from error


def write_names(path: Path, names: Iterable[str]) -> None:
    """Write one name per line, for ``read_names``; see ``write_text``.

    A name that does not fit in a line (with a line break, a control character or bytes that are not
    UTF-8) is written as a JSON string; all others as they are.
    """
    write_text(path, "".join(f"{_to_line(name)}\n" for name in names))


def read_names(path: Path) -> list[str]:
    """The names in a file with one per line, in order.

    Raises:
        OSError, ValueError: see ``read_text``.
    """
    text = read_text(path, _MAX_NAMES_BYTES).replace("\r\n", "\n")
    # Not splitlines: that breaks lines at characters that a name in an older file may have.
    lines = text.removesuffix("\n").split("\n") if text else []
    return [_from_line(line) if line.startswith('"') else line for line in lines]


def _to_line(name: str) -> str:
    # A name that looks like an escaped one is escaped as well, so that each line has one meaning.
    if _NOT_IN_A_LINE.search(name) or _from_line(name) != name:
        return json.dumps(name)
    return name


def _from_line(line: str) -> str:
    """The name that ``_to_line`` makes this line of; of no name, the line itself."""
    if not (line.startswith('"') and line.endswith('"')):
        return line
    try:
        name = json.loads(line)
    except ValueError:
        return line
    return name if isinstance(name, str) and _to_line(name) == line else line
