"""Rows for tests of the activation cache."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np

SHAPE = (3, 2)
KEY = {"cut": "pool4", "sha256": "00"}


def again(cache):
    """The entry of ``KEY``, opened anew."""
    return cache.entry(KEY, SHAPE, "float32")


def ids(*names):
    return [hashlib.md5(str(name).encode()).digest() for name in names]


def rows(*numbers):
    return np.stack([np.full(SHAPE, number, np.float32) for number in numbers])


def files_of(entry, kind):
    return sorted(entry.folder.glob(f"{kind}*.bin"))


def write_earlier_layout(directory: Path, names, values) -> Path:
    """The entry of ``KEY`` as written before there were several files per entry."""
    text = json.dumps(
        {"cut": "pool4", "dtype": "float32", "layout": 1, "row_shape": [3, 2], "sha256": "00"},
        indent=1,
    )
    folder = directory / hashlib.sha256(text.encode()).hexdigest()[:32]
    folder.mkdir(parents=True)
    (folder / "key.json").write_text(text)
    (folder / "rows.bin").write_bytes(values.tobytes())
    records = [
        name + np.uint32(zlib.crc32(row)).tobytes()
        for name, row in zip(ids(*names), values, strict=True)
    ]
    (folder / "index.bin").write_bytes(b"".join(records))
    return folder
