"""Lookup of rows by the ids of their examples, in sorted arrays: no Python object per row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Odd factors, so that ids that differ in one half only have different hashes.
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)


class RowIndex:
    """Finds a row of each id.

    Ids are sorted by a 64-bit hash: a million take a tenth of a second, where sorting and searching
    the ids themselves, as strings, takes several.

    Args:
        ids: ``S16`` ``[num_rows]``, may contain duplicates.
        usable: int64, the rows to find; of several with the same id, the first here.
    """

    def __init__(self, ids: np.ndarray, usable: np.ndarray):
        self._halves = _halves(ids)
        hashes = _hashes(self._halves[usable])
        order = np.argsort(hashes, kind="stable")  # keeps the order of rows with the same id
        self._hashes, self._rows = hashes[order], usable[order]

    def find(self, ids: npt.ArrayLike) -> np.ndarray:
        """int64 ``[len(ids)]``: a usable row of each id, -1 if there is none."""
        halves = _halves(np.asarray(ids, "S16"))
        hashes = _hashes(halves)
        places = np.zeros(len(hashes), np.int64)
        by_hash = np.argsort(hashes)  # searched in this order, which is gentle to processor caches
        places[by_hash] = np.searchsorted(self._hashes, hashes[by_hash])
        found = np.full(len(hashes), -1)
        pending = np.arange(len(hashes))
        while True:
            pending = pending[places[pending] < len(self._hashes)]
            pending = pending[self._hashes[places[pending]] == hashes[pending]]
            if not len(pending):
                return found
            rows = self._rows[places[pending]]
            is_same = (self._halves[rows] == halves[pending]).all(axis=1)
            found[pending[is_same]] = rows[is_same]
            pending = pending[~is_same]  # other ids with the same hash
            places[pending] += 1

    def forget(self, rows: np.ndarray) -> None:
        """Make rows unusable, so that other rows with the same ids are found."""
        keep = ~np.isin(self._rows, rows)
        self._hashes, self._rows = self._hashes[keep], self._rows[keep]


def _halves(ids: np.ndarray) -> np.ndarray:
    """Ids as uint64 ``[len(ids), 2]``."""
    return np.ascontiguousarray(ids).view(np.uint64).reshape(-1, 2)


def _hashes(halves: np.ndarray) -> np.ndarray:
    """uint64 ``[len(halves)]``."""
    hashes: np.ndarray = halves[:, 0] * _FACTORS[0] + halves[:, 1] * _FACTORS[1]
    return hashes
