"""Cache of image fingerprints on disk, so that later commands need not decode the images again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

from transfer.activations.cache import Cache, default_directory
from transfer.data.dataset import MAX_COMPARED, Source
from transfer.data.near_duplicates import FINGERPRINT

FOLDER = "fingerprints"
"""Subfolder of the activation cache."""
_LIMIT_BYTES = 10**9  # enough for a million images


@contextlib.contextmanager
def remembered(source: Source, cache_dir: Path | None = None) -> Iterator[None]:
    """Within the context, fingerprints of a source's images come from the cache on disk; on exit,
    new ones are added to it. If the disk cannot be read or written, the cache is not used."""
    if sum(source.sizes.values()) > 2 * MAX_COMPARED:
        yield
        return
    directory = (cache_dir or default_directory()) / FOLDER
    cache = Cache(directory, _LIMIT_BYTES)
    key = {"kind": "fingerprints", "dataset": source.name, "tensorflow": version("tensorflow")}
    with contextlib.suppress(OSError, KeyError):
        entry = cache.entry(key, [FINGERPRINT.itemsize], "uint8")
        ids = np.concatenate([source.ids(name) for name in source.sizes])
        ids = ids[~entry.missing(ids)]
        rows, intact = entry.read(ids).read(slice(None))
        prints = rows[intact].view(FINGERPRINT)[:, 0]
        source.fingerprints.update(zip(ids[intact].tolist(), prints, strict=True))
    known = {*source.fingerprints}
    yield
    if new := [id_ for id_ in source.fingerprints if id_ not in known]:
        rows = np.array([source.fingerprints[id_] for id_ in new], FINGERPRINT)
        with contextlib.suppress(OSError):
            entry = cache.entry(key, [FINGERPRINT.itemsize], "uint8")
            with entry.lock():
                cache.make_room(rows.nbytes, keep=[entry])
                entry.append(new, rows[:, None].view(np.uint8))
