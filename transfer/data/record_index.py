"""Index of the records of tfds datasets, on disk: labels and sizes, about 16 bytes per image.

The second opening of a dataset reads it instead of the dataset. It is used only if the shards have
the sizes and times that they had when it was made; see ``index_files``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from transfer.data import index_files
from transfer.data.index_files import Index
from transfer.data.labelled_files import digest, state_of

_LAYOUT = 1  # version of the file layout; part of the name
_STATES = "states"


def remembered(
    name: str,
    shards: Sequence[str],
    make: Callable[[], Index],
    fits: Callable[[Index], bool],
    directory: Path | None = None,
) -> Index:
    """The index of some shards: from disk, or else made and written to disk.

    Args:
        name: identifies what the index says about the shards.
        shards: paths of the files.
        make: reads the shards.
        fits: whether an index from disk can be one of these shards.
        directory: of the indexes. Default: ``index_files.default_directory("record")``.
    """
    paths = [os.path.abspath(shard) for shard in shards]
    folder = directory or index_files.default_directory("record")

    def states() -> np.ndarray:
        rows = [state_of(shard) for shard in paths]
        return np.array(rows, np.int64).reshape(len(paths), -1)

    def load(index: Index) -> Index | None:
        is_of_these = np.array_equal(index.pop(_STATES, np.zeros(0)), states())
        return index if is_of_these and fits(index) else None

    def made() -> tuple[Index, Index | None]:
        before = states()
        index = make()
        is_being_written = not np.array_equal(before, states())
        return index, None if is_being_written else {**index, _STATES: before}

    path = folder / f"{digest(_LAYOUT, name, paths).hex()}.npz"
    return index_files.remembered(path, load, made, name)
