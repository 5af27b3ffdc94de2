"""Implementation of ``vgg-transfer cache``; its flags are in ``recipes.cache``."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from recipes import terminal
from transfer.activations import fingerprints, samples
from transfer.activations.cache import Cache, CacheEntryInfo


def show(directory: Path, *, as_json: bool) -> None:
    """Print all entries, most recently used first; warn about damaged ones."""
    caches = _caches(directory)
    entries = sorted(
        (entry for cache in caches for entry in cache.entries()),
        key=lambda entry: entry.last_used,
        reverse=True,
    )
    for name, reason in {k: v for cache in caches for k, v in cache.damaged().items()}.items():
        print(f"warning: {terminal.escaped(name)} is not an entry: {reason}", file=sys.stderr)
    if as_json:
        print(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=2))
        return
    for entry in entries:
        used = datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
        key = entry.key
        splits = key.get("splits")
        description = (
            f"{key['kind']} of {key.get('dataset')}"
            if key.get("kind") in ("fingerprints", "samples")
            else f"{key.get('cut')} of {Path(str(key.get('model'))).name}, {key.get('dataset')} "
            f"{'+'.join(map(str, splits)) if isinstance(splits, list) else splits}"
        )
        if key.get("view_seed") is not None:
            description += f", view {key['view_seed']}"
        if "precision" in key:
            description += f", {key['precision']}"
        print(
            f"{entry.digest[:12]}  {used}  {entry.num_bytes / 1e6:10,.1f} MB  "
            f"{entry.num_rows:8,} images  {terminal.escaped(description)}"
        )
    total = sum(entry.num_bytes for entry in entries)
    print(f"{len(entries)} entries, {total / 1e6:,.1f} MB in {directory}")


def clear(directory: Path, digests: Sequence[str], older_than_days: float | None) -> None:
    """Delete the entries whose digests start with ``digests`` (all if empty), optionally only those
    unused for longer than ``older_than_days``.

    Raises:
        ValueError: if no entry starts with one of the digests.
    """
    caches = _caches(directory)
    entries = [(cache, entry) for cache in caches for entry in cache.entries()]
    for digest in digests:
        if not any(entry.digest.startswith(digest) for _, entry in entries):
            raise ValueError(f"no entry {digest!r} in {directory}; `cache list` shows all entries")
    chosen = [
        (cache, entry)
        for cache, entry in entries
        if (not digests or entry.digest.startswith(tuple(digests)))
        and _is_old(entry, older_than_days)
    ]
    deleted = [entry for cache, entry in chosen if cache.delete(entry.digest)]
    freed = sum(entry.num_bytes for entry in deleted)
    print(f"{len(deleted)} entries deleted, {freed / 1e6:,.1f} MB")
    for cache, entry in chosen:
        if entry not in deleted:
            print(f"{entry.digest[:12]} is in use, and stays", file=sys.stderr)
        elif (folder := cache.directory / entry.digest).exists():
            print(f"{str(folder)!r} stays: it holds other files", file=sys.stderr)


def _is_old(entry: CacheEntryInfo, days: float | None) -> bool:
    return days is None or time.time() - entry.last_used > days * 24 * 3600


def _caches(directory: Path) -> list[Cache]:
    """Open the cache in a directory: activations; fingerprints and samples if there are any.

    Raises:
        NotADirectoryError: if it is a file.
    """
    cache = Cache(directory, limit_bytes=0)  # opened to list and delete only
    if cache.directory.exists() and not cache.directory.is_dir():
        raise NotADirectoryError(f"{str(directory)!r} is a file; expected the folder of a cache")
    parts = [cache.directory / name for name in (fingerprints.FOLDER, samples.FOLDER)]
    present = [part for part in parts if part.is_dir() and not part.is_symlink()]
    return [cache, *(Cache(part, limit_bytes=0) for part in present)]
