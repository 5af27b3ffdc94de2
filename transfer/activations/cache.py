"""Activation cache on disk, shared by runs: rows in append-only files, addressed by their key.

Layout of a cache directory::

    locks/<digest>.lock          held by the process that writes an entry
    <digest>/key.json            everything that the rows depend on, and their shape and dtype
    <digest>/rows-00000.bin      rows of equal size, in the order in which they were computed
    <digest>/index-00000.bin     for each row, the 16-byte id of its example and a CRC-32
    <digest>/rows-00001.bin ...  further rows, of the same or of other processes

The digest is the hash of ``key.json``. See ``parts`` for the files of rows: data left by a crash, a
full disk or a bad block are never taken for activations, and workers of a run, or runs on machines
that share a disk, add to an entry at the same time. Any of these pairs of files may be deleted, or
copied to the same entry of another cache.

The directory may hold files of other programs. A folder is an entry only if the digest of its
``key.json`` is the folder's name; only files with the names above are ever deleted. Links are not
followed, except for the directory itself.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from filelock import FileLock, Timeout

from transfer.activations import parts
from transfer.activations.entry import Entry
from transfer.core import files

_KEY, _LOCKS = "key.json", "locks"
_LAYOUT = 1  # version of the meaning of a row; part of the key
_MAX_KEY_BYTES = 2**20
_DIGEST = re.compile(r"[0-9a-f]{32}")
_LOCK = re.compile(rf"({_DIGEST.pattern})(-\d+-of-\d+)?\.lock")


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
        worker: index and number of the processes of a run, which write the same entries together.
    """

    def __init__(self, directory: Path, limit_bytes: int, worker: tuple[int, int] = (0, 1)):
        self.directory = Path(directory).expanduser()
        self.limit_bytes = limit_bytes
        self._worker = worker

    def entry(
        self, key: dict[str, Any], row_shape: Sequence[int], dtype: str, *, begin: bool = True
    ) -> Entry:
        """The entry of a key, which must contain everything that a row depends on except its
        example.

        Args:
            key: a JSON object.
            row_shape: shape of the activations of one example.
            dtype: float32 or float16.
            begin: begin the entry, or mark it as used. ``False`` changes nothing on disk.

        Raises:
            OSError: if there is no such entry yet, and the directory cannot be written to.
        """
        described = {"layout": _LAYOUT, **key, "row_shape": list(row_shape), "dtype": dtype}
        text = json.dumps(described, indent=1, sort_keys=True)
        folder = self.directory / _digest(text.encode())
        if begin:
            self._touch_key(folder, text)
            files.make_folder(self.directory / _LOCKS)
        ensure = functools.partial(self._ensure_key, folder, text)
        lock = self._lock(folder.name, self._worker)
        return Entry(folder, lock, tuple(row_shape), np.dtype(dtype), ensure)

    def make_room(self, num_bytes: int, keep: Iterable[Entry] = ()) -> None:
        """Evict the least recently used entries until ``num_bytes`` can be added.

        Entries in ``keep``, and those that another process reads or writes, are not evicted: the
        space of files that are open is not free before they are closed.

        Raises:
            OSError: if there is not enough space, within the limit or on the disk; says how much
                there is. If evicting all candidates would not suffice, no entry is deleted.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._excess(num_bytes) <= 0:
            return
        kept = {entry.folder.name for entry in keep}
        entries = sorted(self.entries(), key=lambda entry: entry.last_used)
        others = [entry for entry in entries if entry.digest not in kept]
        in_use = [entry for entry in others if parts.in_use(self.directory / entry.digest)]
        evictable = [entry for entry in others if entry not in in_use]
        if self._excess(num_bytes) > sum(entry.num_bytes for entry in evictable):
            used = sum(entry.num_bytes for entry in entries)
            free = shutil.disk_usage(self.directory).free
            read = sum(entry.num_bytes for entry in in_use) / 1e6
            busy = f", {read:,.0f} MB of it in use by other processes" if in_use else ""
            raise OSError(
                f"{num_bytes / 1e6:,.0f} MB of activations do not fit into {self.directory}: it "
                f"holds {used / 1e6:,.0f} MB of at most {self.limit_bytes / 1e6:,.0f} MB{busy}, "
                f"and the disk has {free / 1e6:,.0f} MB free; raise the limit, choose another "
                "directory, or keep them as float16"
            )
        for entry in evictable:
            # Measured again, because other workers may delete the same entries.
            if self._excess(num_bytes) <= 0:
                return
            self.delete(entry.digest)
        if self._excess(num_bytes) > 0:
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
                    parts.num_records(folder),
                    sum(map(parts.size, [folder / _KEY, *parts.part_files(folder)])),
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
        with contextlib.ExitStack() as locks:
            try:
                for lock in self._all_locks(digest):
                    lock.acquire(blocking=False)
                    locks.callback(lock.release)
            except Timeout:
                return False
            except OSError:
                pass  # files cannot be locked here
            try:
                _read_key(folder)
                # The indexes first: rows are invalid without their records.
                for path in filter(files.is_regular, parts.part_files(folder)):
                    path.unlink()
                for path in folder.iterdir():  # temporary files of killed processes
                    if files.is_temporary(path.name, _KEY) and files.is_regular(path):
                        path.unlink()
                (folder / _KEY).unlink()  # last: without it, the folder is no longer an entry
            except (OSError, ValueError):
                return False
        with contextlib.suppress(OSError):
            folder.rmdir()
        return True

    def clear(self) -> None:
        """Delete all entries, and the directory unless it holds other files."""
        is_deleted = [self.delete(entry.digest) for entry in self.entries()]
        if all(is_deleted):  # else another process holds a lock
            files.remove_folder(self.directory / _LOCKS, _LOCK)
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def _folders(self) -> list[Path]:
        """Subfolders of the directory, without links to folders."""
        if not self.directory.exists():
            return []
        with os.scandir(self.directory) as items:
            return sorted(Path(f.path) for f in items if f.is_dir(follow_symlinks=False))

    def _excess(self, num_bytes: int) -> int:
        """The number of bytes to delete before ``num_bytes`` fit within the limit and on the
        disk."""
        used = sum(entry.num_bytes for entry in self.entries())
        free = shutil.disk_usage(self.directory).free
        return max(used + num_bytes - self.limit_bytes, num_bytes - free)

    def _write_key(self, folder: Path, text: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        files.make_folder(folder)
        files.write_text(folder / _KEY, text)

    def _touch_key(self, folder: Path, text: str) -> None:
        """Mark an entry as used now, by the modification time of its key, or begin it. Rows that
        are there can be read where the key can neither be marked nor written."""
        try:
            _read_key(folder)
        except (OSError, ValueError):
            self._write_key(folder, text)
            return
        try:
            os.utime(folder / _KEY)
        except OSError:  # perhaps the file of another user, which can be replaced
            with contextlib.suppress(OSError):
                self._write_key(folder, text)

    def _ensure_key(self, folder: Path, text: str) -> None:
        """Make a folder an entry again if another process deleted it."""
        if not files.is_regular(folder / _KEY):
            self._write_key(folder, text)

    def _lock(self, digest: str, worker: tuple[int, int] = (0, 1)) -> FileLock:
        # Outside the folder, so that a folder can be deleted while its lock is held. The workers of
        # a run write at the same time, so each has its own lock.
        index, count = worker
        suffix = f"-{index}-of-{count}" if count > 1 else ""
        return files.lock(self.directory / _LOCKS / f"{digest}{suffix}.lock")

    def _all_locks(self, digest: str) -> Iterable[FileLock]:
        """The lock of an entry, and those of all workers that have written it."""
        files.make_folder(self.directory / _LOCKS)
        yield self._lock(digest)
        with os.scandir(self.directory / _LOCKS) as items:
            names = [match for item in items if (match := _LOCK.fullmatch(item.name))]
        for match in names:
            if match[1] == digest and match[2] is not None:
                yield files.lock(self.directory / _LOCKS / match[0])


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
