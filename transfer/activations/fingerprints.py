"""Cache of image fingerprints on disk, so that later commands need not decode the images again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from transfer.activations.cache import Cache, default_directory
from transfer.activations.extraction import versions
from transfer.data.dataset import Source
from transfer.data.fingerprints import FINGERPRINT

FOLDER = "fingerprints"
"""Subfolder of the activation cache."""
_LIMIT_BYTES = 4 * 10**9  # enough for three million images


@contextlib.contextmanager
def remembered(source: Source, cache_dir: Path | None = None) -> Iterator[None]:
    """Within the context, fingerprints of a source's images come from the cache on disk if they are
    needed, and new ones are added to it while the images are decoded. If the disk cannot be read or
    written, the cache is not used."""
    if source.members:
        with contextlib.ExitStack() as stack:
            members = (member.source for splits in source.members.values() for member in splits)
            for member in {id(source): source for source in members}.values():
                stack.enter_context(remembered(member, cache_dir))
            yield
        return
    prints = source.fingerprints
    cache = Cache((cache_dir or default_directory()) / FOLDER, _LIMIT_BYTES)
    key = {"kind": "fingerprints", "dataset": source.name, **versions()}

    def load(ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with contextlib.suppress(OSError, KeyError):
            entry = cache.entry(key, [FINGERPRINT.itemsize], "uint8")
            cached = np.flatnonzero(~entry.missing(ids))
            stored = entry.read(ids[cached])
            for chunk in stored.chunks():
                rows, intact = stored.read(chunk)
                yield cached[chunk][intact], rows[intact].view(FINGERPRINT)[:, 0]

    def save(ids: np.ndarray, rows: np.ndarray) -> None:
        with contextlib.suppress(OSError):
            entry = cache.entry(key, [FINGERPRINT.itemsize], "uint8")
            with entry.lock():
                cache.make_room(rows.nbytes, keep=[entry])
                entry.append(ids, np.ascontiguousarray(rows)[:, None].view(np.uint8))

    before = prints.load, prints.save
    prints.load, prints.save = load, save
    try:
        yield
    finally:
        prints.load, prints.save = before
