"""Activation cache on disk, shared by runs: append-only files of rows, addressed by their key.

Layout of a cache directory::

    locks/<digest>.lock   held by the process that writes an entry
    <digest>/key.json     everything that the rows depend on, and their shape and dtype
    <digest>/rows.bin     rows of equal size, in the order in which they were computed
    <digest>/index.bin    records: for each row, the 16-byte id of its example and the CRC-32 of it

The digest is the hash of ``key.json``. Rows are written before their records, and a row is valid
only if it has a record with the right CRC, so that data left by a crash, a full disk or a bad block
is never taken for activations.

The directory may hold files of other programs. A folder is an entry only if the digest of its
``key.json`` is the folder's name; only files with the names above are ever deleted. Links are not
followed, except for the directory itself.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from filelock import FileLock, Timeout

from transfer.core import files

_KEY, _ROWS, _INDEX, _LOCKS = "key.json", "rows.bin", "index.bin", "locks"
_LAYOUT = 1  # version of the file layout; part of the key
_MAX_KEY_BYTES = 2**20
_DIGEST = re.compile(r"[0-9a-f]{32}")
_RECORD = np.dtype([("id", "S16"), ("crc", "<u4")])


def default_directory() -> Path:
    """The user's cache folder: ``~/.cache`` or ``$XDG_CACHE_HOME`` on Linux."""
    return Path(platformdirs.user_cache_dir("vgg-transfer")) / "activations"


@dataclass(frozen=True)
class CacheEntryInfo:
    """Description of a cache entry; ``last_used`` in seconds since 1970."""

    digest: str
    key: dict[str, Any]
    num_rows: int
    num_bytes: int
    last_used: float


class Cache:
    """A directory of cache entries.

    Args:
        directory: created when needed.
        limit_bytes: maximum size of the directory, enforced by ``make_room``.
    """

    def __init__(self, directory: Path, limit_bytes: int):
        self.directory = Path(directory).expanduser()
        self.limit_bytes = limit_bytes

    def entry(self, key: dict[str, Any], row_shape: Sequence[int], dtype: str) -> Entry:
        """The entry of a key, which must contain everything that a row depends on except its
        example.

        Args:
            key: a JSON object.
            row_shape: shape of the activations of one example.
            dtype: float32 or float16.

        Raises:
            OSError: if the directory cannot be written to.
        """
        described = {"layout": _LAYOUT, **key, "row_shape": list(row_shape), "dtype": dtype}
        text = json.dumps(described, indent=1, sort_keys=True)
        folder = self.directory / _digest(text.encode())
        self.directory.mkdir(parents=True, exist_ok=True)
        files.make_folder(folder)
        # Rewritten on each use: its modification time tells when the entry was last used.
        files.write_text(folder / _KEY, text)
        return Entry(folder, self._lock(folder.name), tuple(row_shape), np.dtype(dtype))

    def make_room(self, num_bytes: int, keep: Iterable[Entry] = ()) -> None:
        """Evict the least recently used entries until ``num_bytes`` can be added.

        Entries in ``keep``, and those that another process is writing, are not evicted.

        Raises:
            OSError: if there is not enough space, within the limit or on the disk; says how much
                there is. If evicting all candidates would not suffice, no entry is deleted.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        kept = {entry.folder.name for entry in keep}
        entries = sorted(self.entries(), key=lambda entry: entry.last_used)
        evictable = [entry for entry in entries if entry.digest not in kept]
        used = sum(entry.num_bytes for entry in entries)
        free = shutil.disk_usage(self.directory).free
        # Must fit both within the limit and on the disk.
        excess = max(used + num_bytes - self.limit_bytes, num_bytes - free)
        if excess > sum(entry.num_bytes for entry in evictable):
            raise OSError(
                f"{num_bytes / 1e6:,.0f} MB of activations do not fit into {self.directory}: it "
                f"holds {used / 1e6:,.0f} MB of at most {self.limit_bytes / 1e6:,.0f} MB, and the "
                f"disk has {free / 1e6:,.0f} MB free; raise the limit, choose another directory, "
                "or keep them as float16"
            )
        for entry in evictable:
            if excess <= 0:
                return
            if self.delete(entry.digest):
                excess -= entry.num_bytes
        if excess > 0:
            raise OSError(
                f"{num_bytes / 1e6:,.0f} MB of activations do not fit into {self.directory} while "
                "other processes use it"
            )

    def entries(self) -> list[CacheEntryInfo]:
        """All entries. Other folders are ignored."""
        entries = []
        for folder in self._folders():
            try:
                key, last_used = _read_key(folder)
            except (OSError, ValueError):
                continue
            entries.append(
                CacheEntryInfo(
                    folder.name,
                    key,
                    _size(folder / _INDEX) // _RECORD.itemsize,
                    sum(_size(folder / name) for name in (_KEY, _ROWS, _INDEX)),
                    last_used,
                )
            )
        return entries

    def damaged(self) -> dict[str, str]:
        """Maps the names of folders with an invalid ``key.json`` to the reasons; they are never
        deleted."""
        reasons = {}
        for folder in self._folders():
            try:
                _read_key(folder)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                reasons[folder.name] = getattr(error, "strerror", None) or str(error)
        return reasons

    def delete(self, digest: str) -> bool:
        """Delete the files of an entry, and its folder unless it holds other files; returns false
        if another process is writing it, or it is not an entry."""
        folder = self.directory / digest
        if not _DIGEST.fullmatch(digest) or not files.is_regular(folder / _KEY):
            return False
        lock = self._lock(digest)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        try:
            _read_key(folder)
            for name in (_INDEX, _ROWS):  # rows are invalid without their records
                if files.is_regular(folder / name):
                    (folder / name).unlink()
            for path in folder.iterdir():  # temporary files of killed processes
                if files.is_temporary(path.name, _KEY) and files.is_regular(path):
                    path.unlink()
            (folder / _KEY).unlink()  # last: without it, the folder is no longer an entry
        except (OSError, ValueError):
            return False
        finally:
            lock.release()
        with contextlib.suppress(OSError):
            folder.rmdir()
        return True

    def clear(self) -> None:
        """Delete all entries, and the directory unless it holds other files."""
        for entry in self.entries():
            self.delete(entry.digest)
        locks = re.compile(rf"{_DIGEST.pattern}\.lock")
        files.remove_folder(self.directory / _LOCKS, locks)
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def _folders(self) -> list[Path]:
        """Subfolders of the directory, without links to folders."""
        if not self.directory.exists():
            return []
        with os.scandir(self.directory) as items:
            return sorted(Path(f.path) for f in items if f.is_dir(follow_symlinks=False))

    def _lock(self, digest: str) -> FileLock:
        # Outside the folder, so that a folder can be deleted while its lock is held.
        files.make_folder(self.directory / _LOCKS)
        return files.lock(self.directory / _LOCKS / f"{digest}.lock")


class Entry:
    """The rows of one key; created by ``Cache.entry``."""

    def __init__(self, folder: Path, lock: FileLock, row_shape: tuple[int, ...], dtype: np.dtype):
        self.folder = folder
        self._lock = lock
        self._row_shape = row_shape
        self._dtype = dtype
        self.row_bytes = int(np.prod(row_shape)) * dtype.itemsize
        self._intact = np.zeros(0, bool)  # per record: whether the CRC of its row was verified

    @contextlib.contextmanager
    def lock(self, waiting: Any = None) -> Iterator[None]:
        """Hold the exclusive lock of the entry; required for ``append``.

        ``waiting()`` is called before waiting for another process that holds it.
        """
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            if waiting is not None:
                waiting()
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def missing(self, ids: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """Boolean ``[len(ids)]``: true for examples without a row, or with a damaged one."""
        return self._positions(ids) < 0

    def append(self, ids: Sequence[bytes] | np.ndarray, rows: np.ndarray) -> None:
        """Append rows ``[len(ids), *row_shape]``; a row replaces an earlier one with the same id.

        Raises:
            OSError: if they cannot be written, e.g. on a full disk; earlier rows are kept.
        """
        rows = np.ascontiguousarray(rows, self._dtype)
        if rows.shape != (len(ids), *self._row_shape):
            raise ValueError(
                f"expected {len(ids)} rows of shape {self._row_shape}, got {rows.shape}"
            )
        records = np.empty(len(ids), _RECORD)
        records["id"] = ids
        records["crc"] = [zlib.crc32(row) for row in rows]
        num_rows = self._num_rows()  # bytes beyond are from an incomplete write
        try:
            _append(self.folder / _ROWS, num_rows * self.row_bytes, rows)
            _append(self.folder / _INDEX, num_rows * _RECORD.itemsize, records)
        except OSError as error:
            full = " (the disk is full)" if error.errno == errno.ENOSPC else ""
            raise OSError(
                error.errno,
                f"cannot write activations to {self.folder}: {error.strerror}{full}; complete "
                "rows are kept, and the next run continues from there",
            ) from error

    def read(self, ids: Sequence[bytes] | np.ndarray) -> StoredRows:
        """The rows of examples, in the order of ``ids``.

        Raises:
            KeyError: if a row is missing.
        """
        positions = self._positions(ids)
        if (positions < 0).any():
            raise KeyError(f"{(positions < 0).sum()} of {len(ids)} rows are not in {self.folder}")
        return StoredRows(self._rows(), positions)

    def _num_rows(self) -> int:
        """Number of complete rows that have a record."""
        return min(
            _size(self.folder / _INDEX) // _RECORD.itemsize,
            _size(self.folder / _ROWS) // max(1, self.row_bytes),
        )

    def _records(self) -> np.ndarray:
        num_rows = self._num_rows()
        if not num_rows:
            return np.empty(0, _RECORD)
        return np.fromfile(self.folder / _INDEX, _RECORD, num_rows)

    def _rows(self) -> np.ndarray:
        num_rows = self._num_rows()
        if not num_rows:
            return np.empty((0, *self._row_shape), self._dtype)
        shape = (num_rows, *self._row_shape)
        return np.memmap(self.folder / _ROWS, self._dtype, "r", shape=shape)

    def _positions(self, ids: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """int64 ``[len(ids)]``: row number of each example, the newest if there are several; -1 if
        it has no row, or its CRC is wrong."""
        records = self._records()
        if not len(records) or not len(ids):
            return np.full(len(ids), -1)
        order = np.argsort(records["id"], kind="stable")
        requested = np.array(ids, "S16")
        ranks = np.searchsorted(records["id"], requested, side="right", sorter=order) - 1
        positions = order[np.maximum(ranks, 0)]
        positions[(ranks < 0) | (records["id"][positions] != requested)] = -1
        intact = self._check(records, positions)
        return np.where(intact[positions] & (positions >= 0), positions, -1)

    def _check(self, records: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Boolean ``[len(records)]``: rows with a verified CRC; verifies the rows at ``positions``
        that were not verified before."""
        intact = np.zeros(len(records), bool)
        known = min(len(records), len(self._intact))
        intact[:known] = self._intact[:known]
        rows = self._rows()
        for position in np.unique(positions[positions >= 0]):
            if not intact[position]:
                intact[position] = zlib.crc32(rows[position]) == records["crc"][position]
        self._intact = intact
        return intact


class StoredRows:
    """Acts as an array ``[num_examples, *row_shape]`` that is read from disk when indexed."""

    def __init__(self, rows: np.ndarray, positions: np.ndarray):
        self._rows = rows
        self._positions = positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, examples: Any) -> np.ndarray:
        return self._rows[self._positions[examples]]


def _digest(key: bytes) -> str:
    """The name of an entry's folder."""
    return hashlib.sha256(key).hexdigest()[:32]


def _read_key(folder: Path) -> tuple[dict[str, Any], float]:
    """The key of an entry, and the time of its last use.

    Raises:
        FileNotFoundError: if the folder has no ``key.json``.
        OSError, ValueError: if the folder is not an entry, with the reason.
    """
    path = folder / _KEY
    status = path.lstat()
    if folder.is_symlink() or not stat.S_ISREG(status.st_mode):
        raise ValueError(f"its {_KEY} is not a regular file")
    if status.st_size > _MAX_KEY_BYTES:
        raise ValueError(f"its {_KEY} has over {_MAX_KEY_BYTES:,} bytes")
    text = path.read_bytes()
    try:
        key = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {_KEY} is not JSON ({error})") from error
    if not isinstance(key, dict) or not {"layout", "row_shape", "dtype"} <= key.keys():
        raise ValueError(f"its {_KEY} does not describe activations")
    if _digest(text) != folder.name:
        raise ValueError(f"the digest of its {_KEY} is not the name of the folder")
    return key, status.st_mtime


def _append(path: Path, offset: int, values: np.ndarray) -> None:
    files.unshare(path)
    with path.open("r+b" if path.exists() else "xb") as file:
        file.truncate(offset)
        file.seek(offset)
        file.write(values.data)


def _size(path: Path) -> int:
    """Size of a regular file in bytes; 0 for anything else."""
    try:
        status = path.lstat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0
