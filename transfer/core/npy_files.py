"""Arrays written to ``.npy`` files row by row, without being in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from transfer.core.files import replacing


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
