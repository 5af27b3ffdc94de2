"""Atomic writes, bounded reads and safe deletion, in folders with untrusted files and links.

A file gets its name only when it is complete. A link of that name is replaced; its target is not
touched. Only regular files of known names are deleted, and text is read only from regular files of
bounded size.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""The file in a folder that is locked while a process writes to the folder."""
_MAX_NAMES_BYTES = 2**27  # the names of a few million images

# Control characters, other characters that some programs treat as line breaks, and lone surrogates,
# which Python uses for bytes of a file name that are not UTF-8.
_NOT_IN_A_LINE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_DRAFT = ".saving-"
_DRAFT_NAME = re.compile(r"\.saving-([0-9a-f]{16}|[a-z0-9_]{8})")  # the second: earlier versions
CHECKPOINT_FILES = re.compile(
    r"(.+/)?(checkpoint|[^/]+\.(meta|index|data-\d{5}-of-\d{5})(\.tempstate\d+)?)"
)
"""Relative paths of the files in a checkpoint folder, written by TensorFlow's or our saver."""
_DRAFT_FILES = re.compile(rf"{CHECKPOINT_FILES.pattern}|(.+/)?[^/]+\.(json|labels\.txt|tmp|lock)")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, as UTF-8; see ``replacing``."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically; see ``replacing``."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Create an empty temporary file in the folder of ``path`` that replaces ``path`` at the end.

    Its name, ``.NAME.RANDOM.tmp``, is unpredictable, so that no link can be planted there. If the
    block raises, the temporary file is deleted and ``path`` is unchanged.

    Raises:
        OSError: with ``path`` and the reason.
    """
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.tmp")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, from the memory of the system to the disk, so that
    they outlast a loss of power: else a renamed file may be empty after it.

    Raises:
        OSError: if the disk fails, or is full.
    """
    if os.name == "nt":  # has no such call for folders, or for files opened to be read
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems without it
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def is_temporary(name: str, of: str) -> bool:
    """Whether a file of this name may be left over from a killed ``replacing``."""
    return re.fullmatch(rf"\.{re.escape(of[:50])}\.[0-9a-f]{{16}}\.tmp", name) is not None


def make_folder(path: Path) -> None:
    """Create a folder if it does not exist; its parent must exist.

    Raises:
        OSError: if it cannot be created, or is a link.
    """
    refuse_link(path)
    path.mkdir(exist_ok=True)


def refuse_link(folder: Path) -> None:
    """Check that a folder to write to is not a link.

    Raises:
        NotADirectoryError: if it is one.
    """
    if folder.is_symlink():
        raise NotADirectoryError(
            f"{str(folder)!r} is a link; expected a folder: nothing is written through links that "
            "lie in a folder of results; remove it"
        )


def unshare(path: Path) -> None:
    """Ensure that writing a file in place changes no other file: remove a symbolic link, replace a
    file that has other hard links by a copy."""
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
    """A lock on a file, which is created if missing. Acquiring it may truncate the file.

    An empty file stays even if it has other hard links, of a backup: a process may hold its lock.
    """
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        if status.st_size or not stat.S_ISREG(status.st_mode):
            unshare(path)
    return FileLock(path)


@contextlib.contextmanager
def locked(
    lock: FileLock, waiting: Callable[[], None] | None = None, timeout_s: float = -1
) -> Iterator[None]:
    """Hold a lock. Where files cannot be locked, it has no effect.

    ``waiting()`` is called before waiting for another process that holds it, forever or up to
    ``timeout_s``.

    Raises:
        filelock.Timeout: if the other process still holds it then.
    """
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if waiting is not None:
            waiting()
        lock.acquire(timeout=timeout_s)
    except (OSError, NotImplementedError) as error:  # the second: filelock, without flock
        reason = getattr(error, "strerror", None) or error
        logger.info(f"{lock.lock_file} cannot be locked: {reason}")
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def locked_folder(folder: Path, timeout_s: float = 0) -> Iterator[None]:
    """Keep other processes from writing to a folder, by its file ``LOCK``; see ``locked``.

    Raises:
        BlockingIOError: if another process writes to it, and still does after ``timeout_s``.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(lock(folder / LOCK), timeout_s=timeout_s))
        except Timeout:
            raise BlockingIOError(
                f"another process works in {str(folder)!r}; wait for it, or choose another folder"
            ) from None
        yield


@contextlib.contextmanager
def draft_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder in ``parent``, for files to be moved to their final names together. It is
    deleted at the end, with the files left in it; if this process is killed, by a later call."""
    remove_drafts(parent)
    folder = draft_path(parent)
    in_use = _draft_lock(folder)
    Path(in_use.lock_file).touch()  # else filelock makes its folder, which may have been deleted
    try:
        with locked(in_use):
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(in_use.lock_file)


def draft_path(parent: Path) -> Path:
    """A new name in ``parent`` for a folder that ``remove_drafts`` deletes."""
    return parent / f"{_DRAFT}{secrets.token_hex(8)}"


def _draft_lock(folder: Path) -> FileLock:
    """Held while a draft folder is in use. It is beside the folder, because all files in the folder
    are moved to their final names."""
    return lock(folder.with_name(f"{folder.name}.lock"))


def remove_drafts(parent: Path, names: re.Pattern[str] = _DRAFT_FILES) -> None:
    """Delete draft folders that killed processes left behind; see ``remove_folder``."""
    for folder in parent.glob(f"{_DRAFT}*"):
        if not _DRAFT_NAME.fullmatch(folder.name):
            continue
        unused = _draft_lock(folder)
        try:
            unused.acquire(blocking=False)
        except (OSError, NotImplementedError):  # in use, or files cannot be locked
            continue
        remove_folder(folder, names)
        unused.release()
        with contextlib.suppress(OSError):
            os.unlink(unused.lock_file)


def remove_folder(folder: Path, names: re.Pattern[str]) -> None:
    """Delete the files whose path relative to ``folder`` matches ``names``, then empty folders.

    Other files stay, and so do links, which are never followed.
    """
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
    """Whether it is a regular file: not a link, folder, pipe or device."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, without blocking: pipes and devices are rejected.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is not a regular file.
    """
    # Checked after opening, so that the file checked is the file read. Without O_NONBLOCK, opening
    # a pipe blocks; Windows has neither such pipes nor the flag.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"{str(path)!r} is not a regular file, but {stat.filemode(mode)!r}")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_text(path: Path, max_bytes: int) -> str:
    """Read a UTF-8 file without blocking: pipes, devices and endless files are rejected.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is not a regular file, has more than ``max_bytes``, or is not UTF-8.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # Some system files (/proc) are longer than their reported size.
        data = b"" if size > max_bytes else file.read(max_bytes + 1)
    if max(size, len(data)) > max_bytes:
        raise ValueError(f"{str(path)!r} has more than the {max_bytes:,} bytes that it may have")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not a UTF-8 text file: {error}") from error


def write_names(path: Path, names: Iterable[str]) -> None:
    """Write one name per line, for ``read_names``; see ``write_text``.

    A name that does not fit on a line (with a line break, a control character or bytes that are not
    UTF-8) is written as a JSON string; all others unchanged.
    """
    write_text(path, names_as_text(names))


def names_as_text(names: Iterable[str]) -> str:
    """The content of a file with names; see ``write_names``."""
    return "".join(f"{_to_line(name)}\n" for name in names)


def read_names(path: Path) -> list[str]:
    """The names in a file with one per line, in order.

    Raises:
        OSError, ValueError: see ``read_text``.
    """
    text = read_text(path, _MAX_NAMES_BYTES).replace("\r\n", "\n")
    # Not splitlines, which also splits at characters that names in older files may contain.
    lines = text.removesuffix("\n").split("\n") if text else []
    return [_from_line(line) if line.startswith('"') else line for line in lines]


def _to_line(name: str) -> str:
    # A name that looks like an escaped one is escaped as well, so that lines are unambiguous.
    if _NOT_IN_A_LINE.search(name) or _from_line(name) != name:
        return json.dumps(name)
    return name


def _from_line(line: str) -> str:
    """Inverse of ``_to_line``; a line that ``_to_line`` cannot produce is returned unchanged."""
    if not (line.startswith('"') and line.endswith('"')):
        return line
    try:
        name = json.loads(line)
    except ValueError:
        return line
    return name if isinstance(name, str) and _to_line(name) == line else line
