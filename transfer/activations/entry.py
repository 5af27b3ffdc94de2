"""The rows of one key of the activation cache: lookup, reading with verification, appending."""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from transfer.activations.parts import Part, PartWriter, part_numbers, part_state
from transfer.activations.row_index import RowIndex
from transfer.core import files

_VERIFIED_AT_START = 2**26  # bytes of rows that take less than a tenth of a second to read
_BYTES_AT_ONCE = 2**24

Restore = Callable[[np.ndarray], np.ndarray]
"""Computes rows again: positions of examples, int64 ``[n]``, sorted, to ``[n, *row_shape]``."""


class Entry:
    """The rows of one key; created by ``Cache.entry``.

    If an example has several valid rows, the first is read, whatever is appended later.

    Args:
        folder: where its files are.
        lock: see ``Entry.lock``.
        row_shape: shape of the activations of one example.
        dtype: of the activations.
        ensure_key: creates the folder and its ``key.json`` if another process deleted them.
    """

    def __init__(
        self,
        folder: Path,
        lock: FileLock,
        row_shape: tuple[int, ...],
        dtype: np.dtype,
        ensure_key: Callable[[], None],
    ):
        self.folder = folder
        self._lock = lock
        self._row_shape = row_shape
        self._dtype = dtype
        self._ensure_key = ensure_key
        self.row_bytes = int(np.prod(row_shape)) * dtype.itemsize
        self._writer = PartWriter(folder, self.row_bytes)
        self._latest: tuple[Any, _Snapshot] | None = None
        self._damaged: dict[int, np.ndarray] = {}  # number of a part to its damaged rows

    def lock(
        self, waiting: Callable[[], None] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Hold the exclusive lock of the entry, so that no other process computes the same rows, or
        deletes the entry. Where files cannot be locked, it has no effect: rows may then be computed
        twice, and are right all the same.

        ``waiting()`` is called before waiting for another process that holds it.
        """
        return files.locked(self._lock, waiting)

    def missing(self, ids: npt.ArrayLike) -> np.ndarray:
        """Boolean ``[len(ids)]``: true for examples without a row.

        Args:
            ids: ``S16`` ``[n]``.

        Damaged rows count as missing if they are known to be damaged: the rows are verified when
        they are read, and here only if they are small.
        """
        stored = StoredRows(self, np.asarray(ids, "S16"))
        if np.count_nonzero(stored.is_stored) * self.row_bytes <= _VERIFIED_AT_START:
            for chunk in stored.chunks():
                stored.read(chunk)
        return ~stored.is_stored

    def append(self, ids: npt.ArrayLike, rows: np.ndarray) -> None:
        """Append rows ``[len(ids), *row_shape]`` of examples with these ids, ``S16``.

        Raises:
            OSError: if they cannot be written, e.g. on a full disk; earlier rows are kept.
        """
        ids = np.asarray(ids, "S16")
        rows = np.ascontiguousarray(rows, self._dtype)
        if rows.shape != (len(ids), *self._row_shape):
            raise ValueError(
                f"expected {len(ids)} rows of shape {self._row_shape}, got {rows.shape}"
            )
        try:
            self._ensure_key()
            self._writer.append(ids, rows)
        except OSError as error:
            full = " (the disk is full)" if error.errno == errno.ENOSPC else ""
            raise OSError(
                error.errno,
                f"cannot write activations to {self.folder}: {error.strerror}{full}; complete "
                "rows are kept, and the next run continues from there",
            ) from error

    def read(self, ids: npt.ArrayLike, restore: Restore | None = None) -> StoredRows:
        """The rows of examples, in the order of ``ids``, ``S16`` ``[n]``.

        Args:
            ids: ids of the examples.
            restore: computes rows that turn out to be damaged.

        Raises:
            KeyError: if a row is missing, and there is no ``restore``.
        """
        stored = StoredRows(self, np.asarray(ids, "S16"), restore)
        num_missing = np.count_nonzero(~stored.is_stored)
        if num_missing and restore is None:
            raise KeyError(f"{num_missing} of {len(stored)} rows are not in {self.folder}")
        stored.keep_open()
        return stored

    def _snapshot(self) -> _Snapshot:
        state = part_state(self.folder)
        if self._latest is None or self._latest[0] != state:
            parts = [Part(self.folder, n, self.row_bytes) for n in part_numbers(self.folder)]
            snapshot = _Snapshot(parts, self._row_shape, self._dtype, self._damaged)
            self._latest = state, snapshot
        return self._latest[1]

    def _remember_damage(self, part: int, rows: np.ndarray) -> None:
        self._damaged[part] = np.union1d(self._damaged.get(part, rows), rows)


class _Snapshot:
    """The rows of an entry at one time; they are numbered in the order of the parts."""

    def __init__(
        self,
        parts: list[Part],
        row_shape: tuple[int, ...],
        dtype: np.dtype,
        damaged: dict[int, np.ndarray],
    ):
        self.parts = [part for part in parts if len(part.records)]
        self._row_shape = row_shape
        self._dtype = dtype
        self._starts = np.cumsum([0, *(len(part.records) for part in self.parts)])
        ids = [part.records["id"] for part in self.parts]
        usable = [np.zeros(0, np.int64)]
        for part, start in zip(self.parts, self._starts, strict=False):
            rows = np.arange(len(part.records))[:: -1 if part.newest_first else 1]
            if part.number in damaged:
                rows = rows[~np.isin(rows, damaged[part.number])]
            usable.append(start + rows)
        self.index = RowIndex(
            np.concatenate(ids) if ids else np.zeros(0, "S16"), np.concatenate(usable)
        )

    def by_part(self, numbers: np.ndarray) -> Iterator[tuple[Part, np.ndarray, np.ndarray]]:
        """For each part with some of these rows: the part, the indices into ``numbers``, and the
        sorted row numbers in the part. Negative numbers are ignored."""
        order = np.argsort(numbers, kind="stable")
        order = order[np.searchsorted(numbers[order], 0) :]
        ends = np.searchsorted(numbers[order], self._starts)
        for part, start, first, end in zip(self.parts, self._starts, ends, ends[1:], strict=False):
            if first < end:
                chosen = order[first:end]
                yield part, chosen, numbers[chosen] - start

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows ``[n, *row_shape]`` with these numbers, int64 ``[n]``, and which of them are
        intact, bool ``[n]``."""
        rows = np.zeros((len(numbers), *self._row_shape), self._dtype)
        intact = np.zeros(len(numbers), bool)
        memory = rows.reshape(len(rows), math.prod(self._row_shape)).view(np.uint8)
        for part, chosen, rows_of_part in self.by_part(numbers):
            intact[chosen] = part.read(rows_of_part, memory, chosen)
        return rows, intact


class StoredRows:
    """Acts as an array ``[num_examples, *row_shape]`` that is read from disk when indexed.

    A row is verified when it is first read, a large one whenever it is read.

    A damaged row is replaced by another row of its example if there is one. Otherwise it is
    computed again by ``restore``.
    """

    def __init__(self, entry: Entry, ids: np.ndarray, restore: Restore | None = None):
        self._entry = entry
        self._ids = ids
        self._restore = restore
        self._look_up()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, examples: Any) -> np.ndarray:
        """The rows of examples, selected as from an array.

        Raises:
            OSError: if a row is damaged and cannot be computed again.
        """
        rows, found = self.read(examples)
        if found.all():
            return rows
        positions = np.arange(len(self))[examples]
        lost = np.unique(positions[~found])
        if self._restore is None:
            raise OSError(
                f"{len(lost)} of the activations in {self._entry.folder} are damaged; delete them "
                "(vgg-transfer cache clear), and compute them again"
            )
        restored = self._restore(lost)
        rows[~found] = restored[np.searchsorted(lost, positions[~found])]
        self._look_up()
        self.keep_open()
        return rows

    def read(self, examples: Any) -> tuple[np.ndarray, np.ndarray]:
        """The rows of examples, and a mask: false for those without an intact row, which are
        undefined."""
        while True:
            numbers = self._numbers[examples]
            rows, intact = self._snapshot.read(numbers.reshape(-1))
            damaged = np.unique(numbers.reshape(-1)[~intact])
            damaged = damaged[damaged >= 0]
            if not len(damaged):
                return rows.reshape(*numbers.shape, *rows.shape[1:]), intact.reshape(numbers.shape)
            for part, _, rows_of_part in self._snapshot.by_part(damaged):
                self._entry._remember_damage(part.number, rows_of_part)
            self._snapshot.index.forget(damaged)
            affected = np.isin(self._numbers, damaged)
            self._numbers[affected] = self._snapshot.index.find(self._ids[affected])

    def chunks(self) -> Iterator[slice]:
        """Slices of examples with a limited number of bytes."""
        count = max(1, _BYTES_AT_ONCE // max(1, self._entry.row_bytes))
        for start in range(0, len(self), count):
            yield slice(start, start + count)

    @property
    def is_stored(self) -> np.ndarray:
        """Boolean ``[len(self)]``: whether an example has a row that is not known as damaged."""
        return self._numbers >= 0

    def keep_open(self) -> None:
        """Open the files, so that they can be read after another process deleted them."""
        for part in self._snapshot.parts:
            part.keep_open()

    def _look_up(self) -> None:
        self._snapshot = self._entry._snapshot()
        self._numbers = self._snapshot.index.find(self._ids)
