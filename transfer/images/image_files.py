"""Files of images: which of a folder's are images, which are passed over and why; their bytes."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transfer.images.decoding import MAX_BYTES, num_pixels, suffixes, why_not

_LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")  # of operating systems
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
    """The files that were not used among those of a folder.

    ``files`` are pairs of a name and the reason, ``num_images`` counts the files that were used,
    and ``empty_classes`` are the folders of classes without an image that can be read.
    """

    files: list[tuple[str, str]] = field(default_factory=list)
    num_images: int = 0
    empty_classes: list[str] = field(default_factory=list)

    def describe(self) -> list[str]:
        """A line for the files, grouped by suffix and reason, and one for the classes; none for
        what is not the case."""
        lines = []
        if self.files:
            groups = Counter((_suffix(name) or "other", reason) for name, reason in self.files)
            rows = sorted(groups.items(), key=lambda item: (-item[1], item[0]))
            shown = ", ".join(f"{count} {suffix} ({why})" for (suffix, why), count in rows[:8])
            more = f", and {len(rows) - 8} more kinds" if len(rows) > 8 else ""
            total = self.num_images + len(self.files)
            lines.append(f"{len(self.files)} of {total} files passed over: {shown}{more}")
        if self.empty_classes:
            names = ", ".join(self.empty_classes[:5])
            more = ", ..." if len(self.empty_classes) > 5 else ""
            verb = "class has" if len(self.empty_classes) == 1 else "classes have"
            lines.append(f"{len(self.empty_classes)} {verb} no readable images: {names}{more}")
        return lines


def class_folders(folder: Path) -> list[Path]:
    """The folders in a folder, but for hidden ones and the litter of macOS."""
    return sorted(child for child in folder.iterdir() if child.is_dir() and _is_shown(child.name))


def find(folder: Path, passed_over: PassedOver, *, in_order: bool = False) -> Iterator[Path]:
    """The images in a folder and below, by their suffixes; the other files go to ``passed_over``.

    Hidden files, and those that operating systems leave behind, are in neither. Links to folders
    are not followed, which may go round in circles. A file with an image's suffix that cannot be
    read (a pipe, a link to nothing) is given all the same, and so is a folder that cannot be
    listed.

    Args:
        folder: where to begin.
        passed_over: is added to.
        in_order: of the names; otherwise that of the file system.
    """
    known = suffixes()
    unlisted: list[str] = []
    for root, folders, files in os.walk(folder, onerror=lambda e: unlisted.append(e.filename)):
        folders[:] = [name for name in folders if _is_shown(name)]
        if in_order:
            folders.sort()
            files.sort()
        for name in folders:
            if os.path.islink(path := os.path.join(root, name)):
                passed_over.files.append((path, "a link to a folder"))
        for name in filter(_is_shown, files):
            path = os.path.join(root, name)
            if _suffix(name) in known:
                passed_over.num_images += 1
                yield Path(path)
            else:
                passed_over.files.append((path, why_not(_suffix(name))))
    yield from map(Path, unlisted)


def outside_classes(folder: Path, passed_over: PassedOver) -> None:
    """Add the images that lie in no class but beside the classes' folders."""
    known = suffixes()
    for path in sorted(folder.iterdir()):
        if path.is_file() and _is_shown(path.name) and path.suffix.lower() in known:
            passed_over.files.append((str(path), "outside the class folders"))


def check(path: Path) -> os.stat_result:
    """The state of a file that can be read as an image.

    Raises:
        OSError: if it is not there.
        ValueError: if it is not a regular file (reading a pipe or a device may never end), or is
            too large.
    """
    return _checked(path.stat())


def read(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        OSError, ValueError: see ``check``.
    """
    # Opening a pipe waits for its other end; Windows has neither such pipes nor the flag.
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    with open(descriptor, "rb") as file:
        _checked(os.fstat(descriptor))
        return file.read(MAX_BYTES)


def _checked(found: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(found.st_mode):
        kind = next((word for is_it, word in _KINDS if is_it(found.st_mode)), "something else")
        raise ValueError(f"it is {kind}; expected a regular file")
    if found.st_size > MAX_BYTES:
        raise ValueError(f"it has {found.st_size:,} bytes; expected at most {MAX_BYTES:,}")
    return found


class PixelBudget:
    """Bounds the pixels of the images that several threads decode at a time: large images wait for
    one another, small ones do not.

    Args:
        limit: pixels; an image that has more by itself is decoded alone.
    """

    def __init__(self, limit: int = 2**26):
        self._limit = self._free = limit
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, path: Path) -> Iterator[None]:
        """While an image is read and worked on."""
        size = check(path).st_size
        with path.open("rb") as file:
            # A pixel takes three bytes; the file is in memory, too.
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
