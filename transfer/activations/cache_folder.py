"""The folder of the activation cache as a whole: activations, fingerprints and samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from transfer.activations import fingerprints, samples
from transfer.activations.cache import Cache, CacheEntryInfo, default_directory
from transfer.core.escapes import escaped

_SHOWN = 5  # digests in an error message
_DIGITS = 12  # of a digest, in text


@dataclass(frozen=True)
class Cleared:
    """``deleted`` entries, those ``in_use`` by another process, which stay, and the folders of
    deleted entries that stay, because they hold other files."""

    deleted: list[CacheEntryInfo]
    in_use: list[CacheEntryInfo]
    kept_folders: list[Path]


class CacheFolder:
    """All caches in a folder.

    Args:
        directory: the folder, which need not exist. Default: that in the user's cache folder.

    Raises:
        NotADirectoryError: if it is a file.

    Example:
        >>> from pathlib import Path
        >>> from transfer.activations.cache_folder import CacheFolder
        >>> CacheFolder(Path("nowhere")).entries()
        []
    """

    def __init__(self, directory: Path | None = None) -> None:
        # Opened to list and delete only.
        cache = Cache(directory or default_directory(), limit_bytes=0)
        self.directory = cache.directory
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(
                f"{str(self.directory)!r} is a file; expected the folder of a cache"
            )
        parts = [self.directory / name for name in (fingerprints.FOLDER, samples.FOLDER)]
        present = [part for part in parts if part.is_dir() and not part.is_symlink()]
        self._caches = [cache, *(Cache(part, limit_bytes=0) for part in present)]

    def entries(self) -> list[CacheEntryInfo]:
        """All entries, most recently used first."""
        entries = [entry for cache in self._caches for entry in cache.entries()]
        return sorted(entries, key=lambda entry: entry.last_used, reverse=True)

    def damaged(self) -> dict[str, str]:
        """Names of folders that are not entries, and the reasons; see ``Cache.damaged``."""
        return {name: why for cache in self._caches for name, why in cache.damaged().items()}

    def clear(self, digests: Sequence[str] = (), unused_days: float | None = None) -> Cleared:
        """Delete entries.

        Args:
            digests: only those whose digests start with one of these. Default: all.
            unused_days: only those that were not used for longer than this. Default: all.

        Raises:
            ValueError: if no entry starts with one of the digests; nothing is deleted then.
        """
        entries = [(cache, entry) for cache in self._caches for entry in cache.entries()]
        names = [entry.digest for _, entry in entries]
        for digest in digests:
            if not any(name.startswith(digest) for name in names):
                some = ", ".join([name[:_DIGITS] for name in names[:_SHOWN]] or ["none"])
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                raise ValueError(
                    f"no entry {digest!r} in {self.directory}; expected the first characters of "
                    f"one of its entries: {some}{more}"
                )
        deleted, in_use, kept = [], [], []
        latest = None if unused_days is None else time.time() - unused_days * 24 * 3600
        for cache, entry in entries:
            is_chosen = not digests or entry.digest.startswith(tuple(digests))
            if not is_chosen or (latest is not None and entry.last_used >= latest):
                continue
            if not cache.delete(entry.digest):
                in_use.append(entry)
                continue
            deleted.append(entry)
            if (folder := cache.directory / entry.digest).exists():
                kept.append(folder)
        return Cleared(deleted, in_use, kept)


def describe(entry: CacheEntryInfo) -> str:
    """An entry as a line: its digest, last use, size, number of images and contents."""
    key, splits = entry.key, entry.key.get("splits")
    if key.get("kind") in ("fingerprints", "samples"):
        contents = f"{key['kind']} of {key.get('dataset')}"
    else:
        parts = "+".join(map(str, splits)) if isinstance(splits, list) else splits
        model = Path(str(key.get("model"))).name
        contents = f"{key.get('cut')} of {model}, {key.get('dataset')} {parts}"
    if key.get("view_seed") is not None:
        contents += f", view {key['view_seed']}"
    if "precision" in key:
        contents += f", {key['precision']}"
    used = datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
    return (
        f"{entry.digest[:_DIGITS]}  {used}  {entry.num_bytes / 1e6:10,.1f} MB  "
        f"{entry.num_rows:8,} images  {escaped(contents)}"
    )
