"""Find the image files of a folder, record which files are skipped and why, and read them."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transfer.images.decoding import MAX_BYTES, num_pixels, suffixes, why_not

_LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")  # created by operating systems
LINK_TO_FOLDER = "a link to a folder"
"""Reason for which a link is skipped."""
_FOLDER_OF_MACOS = "__MACOSX"
_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder"),
)


@dataclass
class PassedOver:
    """The files of a folder that were skipped.

    ``files`` are pairs of a name and the reason, ``num_images`` counts the files that were used,
    and ``empty_classes`` are the class folders without readable images.
    """

    files: list[tuple[str, str]] = field(default_factory=list)
    num_images: int = 0
    empty_classes: list[str] = field(default_factory=list)

    def describe(self) -> list[str]:
        """One line for skipped files, grouped by suffix and reason, and one for empty classes, as
        far as there are any."""
        lines = []
        if self.files:
            groups = Counter((_suffix(name) or "other", reason) for name, reason in self.files)
            rows = sorted(groups.items(), key=lambda item: (-item[1], item[0]))
            shown = ", ".join(f"{count} {suffix} ({why})" for (suffix, why), count in rows[:8])
            more = f", and {len(rows) - 8} more kinds" if len(rows) > 8 else ""
            total = self.num_images + len(self.files)
            lines.append(f"{len(self.files)} of {total} files ignored: {shown}{more}")
        if self.empty_classes:
            names = ", ".join(self.empty_classes[:5])
            more = ", ..." if len(self.empty_classes) > 5 else ""
            verb = "class has" if len(self.empty_classes) == 1 else "classes have"
            lines.append(f"{len(self.empty_classes)} {verb} no readable images: {names}{more}")
        return lines


def class_folders(folder: Path) -> list[Path]:
    """The subfolders, except hidden ones and ``__MACOSX``."""
    return sorted(child for child in folder.iterdir() if child.is_dir() and _is_shown(child.name))


def find(folder: Path, passed_over: PassedOver, *, in_order: bool = False) -> Iterator[Path]:
    """``find_names`` as paths."""
    return map(Path, find_names(folder, passed_over, in_order=in_order))


def find_names(
    folder: Path,
    passed_over: PassedOver,
    *,
    in_order: bool = False,
    listed: Callable[[str], object] = len,
) -> Iterator[str]:
    """Find images recursively by suffix; record the other files in ``passed_over``.

    Hidden files, and files that operating systems create, are in neither. Links to folders are not
    followed, since they may form cycles. A file with an image suffix is yielded even if it cannot
    be read (a pipe, a broken link), and so is a folder that cannot be listed.

    Args:
        folder: root of the search; the names begin with it.
        passed_over: updated in place.
        in_order: sort by name; otherwise the order is that of the file system.
        listed: called with each folder before it is searched.
    """
    known = suffixes()
    unlisted: list[str] = []
    listed(os.fspath(folder))
    for root, folders, files in os.walk(folder, onerror=lambda e: unlisted.append(e.filename)):
        folders[:] = [name for name in folders if _is_shown(name)]
        if in_order:
            folders.sort()
            files.sort()
        for name in folders:
            if os.path.islink(path := os.path.join(root, name)):
                passed_over.files.append((path, LINK_TO_FOLDER))
            else:
                listed(path)
        for name in filter(_is_shown, files):
            path = os.path.join(root, name)
            if _suffix(name) in known:
                passed_over.num_images += 1
                yield path
            else:
                passed_over.files.append((path, why_not(_suffix(name))))
    yield from unlisted


def outside_classes(folder: Path, passed_over: PassedOver) -> None:
    """Record the images that are beside the class folders and thus belong to no class."""
    known = suffixes()
    for path in sorted(folder.iterdir()):
        if path.is_file() and _is_shown(path.name) and path.suffix.lower() in known:
            passed_over.files.append((str(path), "outside the class folders"))


def check(path: str | Path) -> os.stat_result:
    """The ``stat`` result of a file that can be read as an image.

    Raises:
        OSError: if it does not exist.
        ValueError: if it is not a regular file (reading a pipe or a device may never end), or is
            too large.
    """
    return checked(os.stat(path))


def read(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        OSError, ValueError: see ``check``.
    """
    # Without O_NONBLOCK, opening a pipe blocks; Windows has neither such pipes nor the flag.
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    with open(descriptor, "rb") as file:
        checked(os.fstat(descriptor))
        return file.read(MAX_BYTES)


def checked(status: os.stat_result) -> os.stat_result:
    """The same ``stat`` result, if it is that of a file that can be read as an image.

    Raises:
        ValueError: see ``check``.
    """
    if not stat.S_ISREG(status.st_mode):
        kind = next((word for is_it, word in _KINDS if is_it(status.st_mode)), "something else")
        raise ValueError(f"it is {kind}; expected a regular file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"it has {status.st_size:,} bytes; expected at most {MAX_BYTES:,}")
    return status


class PixelBudget:
    """Limits the total number of pixels that several threads decode at a time, to bound memory.

    Large images wait for one another, small ones do not.

    Args:
        limit: number of pixels; an image that exceeds it is decoded alone.
    """

    def __init__(self, limit: int = 2**26):
        self._limit = self._free = limit
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, path: Path) -> Iterator[None]:
        """Reserve the pixels of an image while it is read and processed."""
        size = check(path).st_size
        with path.open("rb") as file:
            # A pixel takes three bytes; the encoded file is in memory as well.
            pixels = min(max(num_pixels(file), size // 3), self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name != _FOLDER_OF_MACOS and name.lower() not in _LITTER


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
