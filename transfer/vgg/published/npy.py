"""Read NumPy's ``.npy`` files, also those in ``.npz`` archives, without executing their pickles."""

from __future__ import annotations

import math
from typing import IO

import numpy as np

from transfer.vgg.published.limits import MAX_DIMENSIONS
from transfer.vgg.published.unpickle import numpy_arrays


def dictionary(file: IO[bytes]) -> dict[str, np.ndarray]:
    """The arrays of a pickled dictionary, ``<layer>/<number>``.

    Raises:
        ValueError: if it is another array, or contains more than arrays.
    """
    shape, _, dtype = _header(file)
    if not dtype.hasobject:
        raise ValueError(f"it holds one array {shape}; expected a dictionary of layers")
    return numpy_arrays(file)


def array(file: IO[bytes], size: int) -> np.ndarray:
    """The array of a file of ``size`` bytes.

    Raises:
        ValueError: if it has Python objects, or was cut short.
    """
    shape, is_fortran, dtype = _header(file)
    if dtype.hasobject:
        raise ValueError("it has an array of Python objects")
    count = math.prod(shape)
    if count * dtype.itemsize > size:
        raise ValueError(f"it has an array {shape} in {size:,} bytes; it was cut short")
    data = file.read(count * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    reader = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if reader is None:
        raise ValueError(f"it has version {version} of NumPy's format; expected 1.0 or 2.0")
    try:
        header = reader(file)
    except RecursionError as error:
        raise ValueError("its header is damaged") from error
    if len(header[0]) > MAX_DIMENSIONS:
        raise ValueError(f"it has an array of {len(header[0]):,} dimensions")
    return header
