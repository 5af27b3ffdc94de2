"""Read the arrays of safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors

from transfer.vgg.published import torch_file
from transfer.vgg.published.limits import check_total

_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}


def arrays(path: Path, data: memoryview) -> dict[str, np.ndarray]:
    """Arrays as views of ``data``, the mapped file, so that declared but missing data are not read.

    Raises:
        ValueError: if it is damaged, or larger than a VGG.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > 2**24:
            raise ValueError(f"its header has {size:,} bytes")
        check_total(path.stat().st_size - size)
        header = file.read(size)
    try:
        with safetensors.safe_open(path, "numpy"):  # checks the header, and that sizes add up
            entries = json.loads(header)
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"it is damaged: {error}") from error
    data = data[8 + size :]
    values: dict[str, np.ndarray] = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if entry["dtype"] == "BF16":
            values[name] = torch_file.from_bfloat16(data[begin:end]).reshape(entry["shape"])
            continue
        if entry["dtype"] not in _TYPES:
            continue
        flat = np.frombuffer(data[begin:end], _TYPES[entry["dtype"]])
        values[name] = flat.reshape(entry["shape"])
    return values
