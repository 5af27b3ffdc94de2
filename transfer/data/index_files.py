"""Indexes of datasets on disk, so that only the first opening reads or lists the whole dataset.

They lie beside the activation cache, one file per folder or split, and may be deleted at any time:
whatever is wrong with a file, it is made again. Processes that open the same dataset at the same
time, such as the workers of a run, wait for the first one, if they share the folder of the indexes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import platformdirs

from transfer.core import files

logger = logging.getLogger(__name__)

Index: TypeAlias = dict[str, np.ndarray]
"""Arrays of int64 or uint8 with at least one axis, by name."""

_T = TypeVar("_T")
_DTYPES = (np.int64, np.uint8)


def default_directory(kind: str) -> Path:
    """The folder of the ``record`` or ``folder`` indexes, in the user's cache folder."""
    return Path(platformdirs.user_cache_dir("vgg-transfer")) / f"{kind}-indexes"


def remembered(
    path: Path,
    load: Callable[[Index], _T | None],
    make: Callable[[], tuple[_T, Index | None]],
    dataset: str,
) -> _T:
    """What an index on disk says about a dataset; or else what ``make`` returns, whose index is
    then written.

    A folder that cannot be written to is reported in a log record only.

    Args:
        path: of the index.
        load: interprets an index from disk; ``None`` if it is not one of the dataset as it is now.
        make: reads the dataset; returns the same as ``load``, and the index to write, or ``None``
            if the dataset must be read again next time.
        dataset: for messages.
    """
    found = _loaded(path, load)
    if found is not None:
        return found
    with _locked(path, dataset):
        found = _loaded(path, load)  # another process may have made it meanwhile
        if found is not None:
            return found
        result, index = make()
        if index is not None:
            _write(path, index, dataset)
        return result


def _loaded(path: Path, load: Callable[[Index], _T | None]) -> _T | None:
    index = _read(path)
    return None if index is None else load(index)


def _read(path: Path) -> Index | None:
    """The arrays of an index; ``None`` if it does not exist or is damaged."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            index = {key: arrays[key] for key in arrays.files}
    except Exception:  # NumPy and zipfile raise many kinds of them for damaged files
        return None
    is_valid = all(array.dtype in _DTYPES and array.ndim for array in index.values())
    return index if is_valid else None


def _write(path: Path, index: Index, dataset: str) -> None:
    arrays: dict[str, Any] = index
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        logger.warning(
            f"the index of {dataset!r} cannot be written to {str(path.parent)!r} "
            f"({error.strerror or error}); the next command reads the whole dataset again"
        )


@contextlib.contextmanager
def _locked(path: Path, dataset: str) -> Iterator[None]:
    """Hold the lock of an index. Where it cannot be locked, several processes may make it."""

    def waiting() -> None:
        logger.info(f"waiting for another process that makes the index of {dataset!r}")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = files.lock(path.with_suffix(".lock"))
    except OSError:
        yield
        return
    with files.locked(lock, waiting):
        yield
