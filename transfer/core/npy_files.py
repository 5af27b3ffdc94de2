"""Arrays in files that are written and read in parts, without being in memory."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from transfer.core.files import replacing


class Rows(Protocol):
    """An array, or an array-like object that reads from disk."""

    def __getitem__(self, positions: Any) -> np.ndarray: ...


class FileRows:
    """Acts as a float32 array ``[num_rows, width]`` in a temporary file, which rows are appended to
    and slices of rows are read from; a context manager. Unlike pages of a memory-mapped file, what
    was read takes no memory later. Nothing is left behind, however the process ends.

    Args:
        width: number of columns.
    """

    def __init__(self, width: int):
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit
        self.shape = (0, width)

    def __enter__(self) -> FileRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, rows: np.ndarray) -> None:
        """Append rows, float ``[n, width]``.

        Raises:
            OSError: if the disk is full.
        """
        self._file.seek(0, os.SEEK_END)
        self._file.write(np.ascontiguousarray(rows, np.float32).data)
        self.shape = (len(self) + len(rows), self.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, last, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"expected a slice of consecutive rows, got {rows}")
        width = self.shape[1]
        self._file.seek(4 * width * first)
        values = np.fromfile(self._file, np.float32, max(0, last - first) * width)
        return values.reshape(-1, width)


def check_path(path: Path, contents: str) -> None:
    """Check the path of a file before the work whose results it will hold.

    Raises:
        FileNotFoundError: if its folder does not exist.
        ValueError: if its name does not end in ``.npy``.
    """
    if path.suffix != ".npy":
        raise ValueError(
            f"{contents} are written as a NumPy array; expected a file name that ends in .npy, got "
            f"{str(path)!r}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{str(path.parent)!r} is not a folder; create it, or write the {contents} elsewhere"
        )


@contextlib.contextmanager
def row_writer(path: Path, width: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Write a float32 ``[num_rows, width]`` array to a ``.npy`` file, atomically.

    Yields:
        A function that appends rows, float ``[n, width]``. The number of rows need not be known in
        advance; the file gets its name at the end of the block, and only if nothing was raised.
    """
    num_rows = 0
    with replacing(path) as temporary, temporary.open("r+b") as file:

        def write_header() -> int:
            # NumPy pads the header, so that it keeps its size if the first dimension grows.
            header = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, width)}
            np.lib.format.write_array_header_1_0(file, header)
            return file.tell()

        def append(rows: np.ndarray) -> None:
            nonlocal num_rows
            file.write(np.ascontiguousarray(rows, "<f4").data)
            num_rows += len(rows)

        size = write_header()
        yield append
        file.seek(0)
        if write_header() != size:
            raise RuntimeError(f"the header of {str(path)!r} has grown over the rows after it")
