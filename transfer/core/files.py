"""Atomic writes, bounded reads and careful deletion, beside files and links of other people.

A file is complete before it gets its name. A link that has the name is replaced; what it points to
is left alone. Only regular files of known names are deleted, and text is read from regular files of
bounded size.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock

_MAX_NAMES_BYTES = 2**27  # the names of a few million images

# Control characters and whatever else some program takes for the end of a line, and halves of
# surrogate pairs: Python's stand-ins for bytes of a file name that are not UTF-8.
_NOT_IN_A_LINE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_DRAFT = ".saving-"
_DRAFT_NAME = re.compile(r"\.saving-([0-9a-f]{16}|[a-z0-9_]{8})")  # the second: earlier versions
CHECKPOINT_FILES = re.compile(
    r"(.+/)?(checkpoint|[^/]+\.(meta|index|data-\d{5}-of-\d{5})(\.tempstate\d+)?)"
)
"""Paths of what TensorFlow's savers and ours write, within a folder of checkpoints."""
_DRAFT_FILES = re.compile(rf"{CHECKPOINT_FILES.pattern}|[^/]+\.json")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, as UTF-8; see ``replacing``."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically; see ``replacing``."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file in the folder of ``path``; at the end it takes the place of ``path``.

    Its name, ``.NAME.RANDOM.tmp``, cannot be known before, so that no link can wait there. If the
    block raises, the new file is deleted, and ``path`` is as it was.

    Raises:
        OSError: names ``path``, and the reason.
    """
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.tmp")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def is_temporary(name: str, of: str) -> bool:
    """Whether ``replacing`` may have left a file of this name, where it was killed."""
    return re.fullmatch(rf"\.{re.escape(of[:50])}\.[0-9a-f]{{16}}\.tmp", name) is not None


def make_folder(path: Path) -> None:
    """Make a folder in one that exists, unless it is there.

    Raises:
        OSError: if it cannot be made, or is a link.
    """
    refuse_link(path)
    path.mkdir(exist_ok=True)


def refuse_link(folder: Path) -> None:
    """Raises:
    NotADirectoryError: if a folder to write to is a link."""
    if folder.is_symlink():
        raise NotADirectoryError(
            f"{str(folder)!r} is a link; expected a folder: nothing is written through links that "
            "lie in a folder of results; remove it"
        )


def unshare(path: Path) -> None:
    """Before a file is written in place: remove the name if it is a link, copy the file if it has
    other names, so that only the file of this name changes."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(status.st_mode):
        path.unlink()
    elif stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        with replacing(path) as copy:
            shutil.copyfile(path, copy)


def lock(path: Path) -> FileLock:
    """A lock on a file, which is made where it is missing. Acquiring it empties the file."""
    unshare(path)
    return FileLock(path)


@contextlib.contextmanager
def draft_folder(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent``, for files that are to get their names together. It is deleted at
    the end, with the files that are left in it."""
    folder = parent / f"{_DRAFT}{secrets.token_hex(8)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_drafts(parent: Path, names: re.Pattern[str] = _DRAFT_FILES) -> None:
    """Delete what processes that were killed left in draft folders; see ``remove_folder``."""
    for folder in parent.glob(f"{_DRAFT}*"):
        if _DRAFT_NAME.fullmatch(folder.name):
            remove_folder(folder, names)


def remove_folder(folder: Path, names: re.Pattern[str]) -> None:
    """Delete the files of a folder whose path in it matches ``names``, and folders that are empty
    then. Other files stay, and so do links, which are never followed."""
    if folder.is_symlink():
        return
    for root, _, files in os.walk(folder, topdown=False):
        for path in (Path(root, name) for name in files):
            if names.fullmatch(path.relative_to(folder).as_posix()) and is_regular(path):
                with contextlib.suppress(OSError):
                    path.unlink()
        with contextlib.suppress(OSError):
            Path(root).rmdir()


def is_regular(path: Path) -> bool:
    """Whether it is a file itself: no link, folder, pipe or device."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


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
