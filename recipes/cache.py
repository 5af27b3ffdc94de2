"""List and clear the activation cache of fine-tuning runs on disk.

    vgg-transfer cache list
    vgg-transfer cache clear --older-than-days 30

Everything in the cache can be recomputed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from recipes import terminal
from recipes.startup import job


def cache(
    action: Literal["list", "clear"],
    digests: tuple[str, ...] = (),
    *,
    cache_dir: Path | None = None,
    older_than_days: float | None = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> int:
    """List or clear the activation cache on disk.

    Args:
        action: List or delete entries.
        digests: clear: delete only entries whose digests start with these characters.
        cache_dir: Folder of the activation cache. [default: vgg-transfer/activations in the user's
            cache folder]
        older_than_days: clear: delete only entries unused for this many days.
        as_json: list: print JSON.
    """
    with job():
        from transfer.activations.cache_folder import CacheFolder, describe

    folder = CacheFolder(cache_dir)
    if action == "list":
        if digests or older_than_days is not None:
            raise ValueError("cache list shows everything; entries and ages are for cache clear")
        for name, reason in folder.damaged().items():
            terminal.say(f"warning: {name} is not an entry: {reason}")
        entries = folder.entries()
        if as_json:
            print(json.dumps([asdict(entry) for entry in entries], indent=2))
            return 0
        lines = [*map(describe, entries), f"{len(entries)} entries, {_size(entries)}"]
        print("\n".join(lines), f"in {folder.directory}")
    else:
        if as_json:
            raise ValueError("--json is for cache list")
        cleared = folder.clear(digests, older_than_days)
        print(f"{len(cleared.deleted)} entries deleted, {_size(cleared.deleted)}")
        for entry in cleared.in_use:
            terminal.say(f"{entry.digest[:12]} is in use, and stays")
        for kept in cleared.kept_folders:
            terminal.say(f"{str(kept)!r} stays: it holds other files")
    return 0


def _size(entries: Iterable[Any]) -> str:
    return f"{sum(entry.num_bytes for entry in entries) / 1e6:,.1f} MB"
