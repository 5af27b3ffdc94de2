"""Index of the records of tfds datasets, on disk: labels and sizes, about 16 bytes per image.

The second opening of a dataset reads it instead of the dataset. It lies beside the activation
cache, one file per split, and is used only if the shards have the sizes and times that they had
when it was made. Whatever is wrong with the file, it is made again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import platformdirs

from transfer.core.files import replacing
from transfer.data.labelled_files import digest, state_of

logger = logging.getLogger(__name__)

Index: TypeAlias = dict[str, np.ndarray]

_LAYOUT = 1  # version of the file layout; part of the name
_STATES = "states"


def default_directory() -> Path:
    """The folder of the indexes, in the user's cache folder."""
    return Path(platformdirs.user_cache_dir("vgg-transfer")) / "record-indexes"


def remembered(
    name: str,
    shards: Sequence[str],
    make: Callable[[], Index],
    fits: Callable[[Index], bool],
    directory: Path | None = None,
) -> Index:
    """The index of some shards: from disk, or else made and written to disk.

    A cache folder that cannot be written to is reported in a log record only.

    Args:
        name: identifies what the index says about the shards.
        shards: paths of the files.
        make: reads the shards.
        fits: whether an index from disk can be one of these shards.
        directory: of the indexes. Default: ``default_directory()``.
    """
    paths = [os.path.abspath(shard) for shard in shards]
    folder = default_directory() if directory is None else directory
    path = folder / f"{digest(_LAYOUT, name, paths).hex()}.npz"
    states = np.array([state_of(shard) for shard in paths], np.int64).reshape(len(paths), -1)
    found = _read(path)
    if (
        found is not None
        and np.array_equal(found.pop(_STATES, np.zeros(0)), states)
        and fits(found)
    ):
        return found
    index = make()
    after = np.array([state_of(shard) for shard in paths], np.int64).reshape(states.shape)
    if not np.array_equal(states, after):
        return index  # the dataset is being written
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            arrays: dict[str, Any] = {**index, _STATES: states}
            np.savez(file, **arrays)
    except OSError as error:
        logger.warning(
            f"the index of {name!r} cannot be written to {str(folder)!r} "
            f"({error.strerror or error}); the next command reads the whole dataset again"
        )
    return index


def _read(path: Path) -> Index | None:
    """The arrays of an index; ``None`` if it does not exist or is damaged."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            index = {key: arrays[key] for key in arrays.files}
    except Exception:  # NumPy and zipfile raise many kinds of them for damaged files
        return None
    is_valid = all(array.dtype == np.int64 and array.ndim for array in index.values())
    return index if is_valid else None
