"""Files of rows: each row with a record of its example's id and its checksum.

A part is a pair of files, ``rows-00000.bin`` and ``index-00000.bin``: rows of equal size, and for
each row a ``RECORD``. Each process that computes rows begins parts of its own, the next one when a
part is full, and no other process ever writes to them. So no lock is needed for correctness, which
locks on shared storage would not give. Rows are written before their records, and a row is valid
only if the checksum in its record fits the row and the id.

``rows.bin`` and ``index.bin`` are a part written by earlier versions; its checksums do not include
the id.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import mmap
import os
import re
import stat
import time
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

RECORD = np.dtype([("id", "S16"), ("crc", "<u4")])
"""Id of the example, and CRC-32 of the id and the row."""
MAX_PART_BYTES = 2**31
"""Maximum size of a file of rows, if a row is not larger."""
FILE_NAME = re.compile(r"(rows|index)(-(\d{5}|[1-9]\d{5,8}))?\.bin")
_EARLIER = -1  # number of the part of earlier versions: it comes first

# Open files are read even after they were deleted. Beyond this number, they are opened as needed.
_MAX_OPEN = 256
# Larger rows are read and verified each time: they may not fit in the page cache, and reading a
# row takes longer than the system call.
_MAX_MAPPED_ROW = 2**16  # bytes
_MAX_BUFFERS = 512  # of one system call; POSIX allows 1024
_open_parts: weakref.WeakSet[Part] = weakref.WeakSet()


class Part:
    """The rows of a part, and their records.

    Args:
        folder: where its files are.
        number: in order of creation, see ``part_numbers``.
        row_bytes: size of a row.
    """

    def __init__(self, folder: Path, number: int, row_bytes: int):
        self.number = number
        self._rows_path, index_path = _paths(folder, number)
        self._row_bytes = row_bytes
        self._descriptor: int | None = None
        self._map: np.ndarray | None = None  # rows that were verified are read from here
        self._verified = np.zeros(0, bool)
        num_rows = min(
            size(index_path) // RECORD.itemsize, size(self._rows_path) // max(1, row_bytes)
        )
        self.newest_first = number == _EARLIER
        """Which row to read if there are several of an example: earlier versions read the last."""
        self.records = _read_records(index_path, num_rows)
        """``RECORD`` ``[num_rows]``."""

    def read(self, rows: np.ndarray, out: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Read rows into an array.

        Args:
            rows: int64 ``[n]``, sorted row numbers.
            out: uint8 ``[m, row_bytes]``.
            places: int64 ``[n]``, where to put the rows in ``out``.

        Returns:
            bool ``[n]``: true for rows that were read and have the right checksum.
        """
        if self._map is None:
            return self._read_verified(rows, out, places)
        intact = self._verified[rows]
        if intact.all():
            out[places] = self._map[rows]
            return intact
        out[places[intact]] = self._map[rows[intact]]
        others = ~intact
        intact[others] = self._read_verified(rows[others], out, places[others])
        self._verified[rows[intact]] = True
        return intact

    def _read_verified(self, rows: np.ndarray, out: np.ndarray, places: np.ndarray) -> np.ndarray:
        is_read = np.ones(len(rows), bool)
        numbers, targets = rows.tolist(), buffers(out, places)
        try:
            with self._opened() as descriptor:
                for start, end in _runs(rows):
                    try:
                        self._read_run(descriptor, numbers[start], targets[start:end])
                    except OSError:  # perhaps of one bad block: read row by row
                        for place in range(start, end):
                            try:
                                self._read_run(descriptor, numbers[place], [targets[place]])
                            except OSError:
                                is_read[place] = False
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            logger.warning(f"{self._rows_path} cannot be read: {error.strerror}")
            is_read[:] = False
        records = self.records[rows]
        found = checksums(records["id"], targets, with_ids=self.number != _EARLIER)
        return is_read & (records["crc"] == found)

    def keep_open(self) -> None:
        """Open the file of rows, so that it can be read after another process deleted it, and map
        it if rows are small."""
        if self._descriptor is None and len(_open_parts) < _MAX_OPEN:
            with contextlib.suppress(OSError):
                self._descriptor = _open_for_reading(self._rows_path)
                weakref.finalize(self, os.close, self._descriptor)
                _open_parts.add(self)
                _lock(self._descriptor, exclusive=False)  # see in_use
        if self._row_bytes > _MAX_MAPPED_ROW or self._descriptor is None or self._map is not None:
            return
        length = len(self.records) * self._row_bytes
        with contextlib.suppress(OSError, ValueError):  # the file may have become shorter
            data = mmap.mmap(self._descriptor, length, prot=mmap.PROT_READ)
            self._map = np.frombuffer(data, np.uint8).reshape(len(self.records), self._row_bytes)
            self._verified = np.zeros(len(self.records), bool)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        if self._descriptor is not None:
            yield self._descriptor
            return
        descriptor = _open_for_reading(self._rows_path)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _read_run(self, descriptor: int, first: int, out: Sequence[memoryview]) -> None:
        # Not from the memory map, where a bad block, or the end of a truncated file, would end the
        # process with SIGBUS, and a page fault reads less, or more, than a row.
        count = os.preadv(descriptor, out, first * self._row_bytes)
        if count != len(out) * self._row_bytes:
            raise OSError(errno.EIO, "the file ends early")


class PartWriter:
    """Appends rows to new parts of this process."""

    def __init__(self, folder: Path, row_bytes: int):
        self._folder = folder
        self._row_bytes = row_bytes
        self._files: tuple[Path, Path] | None = None
        self._num_rows = 0

    def append(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Append rows ``[n, ...]`` of examples with these ids, ``S16`` ``[n]``.

        Raises:
            OSError: if they cannot be written; those of earlier calls are kept.
        """
        capacity = max(1, MAX_PART_BYTES // max(1, self._row_bytes))
        while len(ids):
            files = self._files
            if files is None or self._num_rows >= capacity or not self._is_unchanged(files):
                files = self._begin()
            count = capacity - self._num_rows
            self._extend(files, ids[:count], rows[:count])
            ids, rows = ids[count:], rows[count:]

    def _extend(self, files: tuple[Path, Path], ids: np.ndarray, rows: np.ndarray) -> None:
        records = np.empty(len(ids), RECORD)
        records["id"], records["crc"] = (
            ids,
            checksums(ids, buffers(rows, np.arange(len(rows))), with_ids=True),
        )
        sizes = self._num_rows * self._row_bytes, self._num_rows * RECORD.itemsize
        try:
            for path, offset, values in zip(files, sizes, (rows, records), strict=True):
                _write(path, offset, np.ascontiguousarray(values))
        except OSError:
            for path, length in zip(files, sizes, strict=True):
                with contextlib.suppress(OSError):
                    os.truncate(path, length)
            raise
        self._num_rows += len(ids)

    def _is_unchanged(self, files: tuple[Path, Path]) -> bool:
        """Whether the files are as this process left them: not deleted, replaced, or linked to by
        a backup."""
        sizes = self._num_rows * self._row_bytes, self._num_rows * RECORD.itemsize
        for path, length in zip(files, sizes, strict=True):
            try:
                status = path.lstat()
            except OSError:
                return False
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                return False
            if status.st_size != length:
                return False
        return True

    def _begin(self) -> tuple[Path, Path]:
        """Create the files of the next part; several processes may do so at the same time."""
        for number in itertools.count(1 + max(part_numbers(self._folder), default=-1)):
            files = _paths(self._folder, number)
            try:
                for path in files:
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            except FileExistsError:  # of another process
                continue
            self._files, self._num_rows = files, 0
            return files
        raise AssertionError


def part_numbers(folder: Path) -> list[int]:
    """Numbers of the parts in a folder, in the order in which they were begun."""
    names = [path.name for path in part_files(folder)]
    matches = [match for match in map(FILE_NAME.fullmatch, names) if match]
    return sorted({_EARLIER if match[3] is None else int(match[3]) for match in matches})


def part_files(folder: Path) -> list[Path]:
    """Everything in a folder that has the name of a part's file, the indexes first."""
    try:
        with os.scandir(folder) as items:
            return sorted(Path(item.path) for item in items if FILE_NAME.fullmatch(item.name))
    except OSError:
        return []


def part_state(folder: Path) -> list[tuple[str, int, int]]:
    """Changes when a part is added, deleted, replaced or written to."""
    state = []
    for path in part_files(folder):
        with contextlib.suppress(OSError):
            status = path.lstat()
            state.append((path.name, status.st_ino, status.st_size))
    return state


def in_use(folder: Path) -> bool:
    """Whether another process has files of rows open for reading. False for files that this process
    has open, and where files cannot be locked."""
    mine = {part._rows_path for part in _open_parts}
    rows = (path for path in part_files(folder) if path.name.startswith("rows"))
    return any(path not in mine and _is_locked(path) for path in rows)


def _is_locked(path: Path) -> bool:
    with contextlib.suppress(OSError):
        descriptor = _open_for_reading(path)
        try:
            for _ in range(3):  # another process may be asking the same at this moment
                try:
                    _lock(descriptor, exclusive=True)
                    return False
                except BlockingIOError:
                    time.sleep(0.01)
            return True
        finally:
            os.close(descriptor)
    return False


def _lock(descriptor: int, *, exclusive: bool) -> None:
    """Lock a file until it is closed, without waiting for a lock that another process has.

    Raises:
        OSError: if that is not possible.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)


def num_records(folder: Path) -> int:
    """Number of records in the parts of a folder."""
    indexes = [path for path in part_files(folder) if path.name.startswith("index")]
    return sum(size(path) // RECORD.itemsize for path in indexes)


def size(path: Path) -> int:
    """Size of a regular file in bytes; 0 for anything else."""
    try:
        status = path.lstat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def checksums(ids: np.ndarray, rows: Sequence[memoryview], *, with_ids: bool) -> np.ndarray:
    """CRC-32 of each row, or of its id and the row: uint32 ``[len(rows)]``."""
    if not with_ids:
        return np.array([zlib.crc32(row) for row in rows], np.uint32)
    text = np.ascontiguousarray(ids).tobytes()
    starts = [zlib.crc32(text[place : place + 16]) for place in range(0, len(text), 16)]
    return np.array(list(map(zlib.crc32, rows, starts)), np.uint32)


def buffers(rows: np.ndarray, places: np.ndarray) -> list[memoryview]:
    """The memory of the rows at these places of a contiguous array ``[n, ...]``."""
    length = rows[:1].nbytes
    data = rows.data.cast("B") if length else memoryview(b"")
    return [data[start : start + length] for start in (places * length).tolist()]


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    """The files of rows and of records."""
    suffix = "" if number == _EARLIER else f"-{number:05d}"
    return folder / f"rows{suffix}.bin", folder / f"index{suffix}.bin"


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and end of consecutive row numbers, to be read by one system call each."""
    is_start = np.diff(rows, prepend=-2) != 1
    is_start[::_MAX_BUFFERS] = True
    return itertools.pairwise([*np.flatnonzero(is_start).tolist(), len(rows)])


def _open_for_reading(path: Path) -> int:
    # Neither follows a link, nor waits for the writer of a pipe.
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _read_records(path: Path, num_rows: int) -> np.ndarray:
    if not num_rows:
        return np.empty(0, RECORD)
    try:
        with open(_open_for_reading(path), "rb") as file:
            return np.fromfile(file, RECORD, num_rows)
    except OSError as error:
        logger.warning(f"{path} cannot be read: {error.strerror}")
        return np.empty(0, RECORD)


def _write(path: Path, offset: int, values: np.ndarray) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "wb") as file:
        file.seek(offset)
        file.write(values.data)
