"""See and clear the activations that fine-tuning runs keep on disk.

    vgg-transfer cache list
    vgg-transfer cache clear --older-than-days 30

Everything there can be computed again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import platformdirs
from cyclopts import Parameter

from recipes.startup import job


def default_directory() -> Path:
    """In the user's folder for caches: ``~/.cache`` or ``$XDG_CACHE_HOME`` on Linux."""
    return Path(platformdirs.user_cache_dir("vgg-transfer")) / "activations"


def cache(
    action: Annotated[Literal["list", "clear"], Parameter(help="What to do.")],
    digests: Annotated[
        tuple[str, ...],
        Parameter(help="clear: only these entries; the first letters will do."),
    ] = (),
    *,
    cache_dir: Annotated[
        Path | None, Parameter(help="Folder of the activations. [default: the user's]")
    ] = None,
    older_than_days: Annotated[
        float | None, Parameter(help="clear: only what was not used for so long.")
    ] = None,
    json: Annotated[bool, Parameter(help="list: as JSON.")] = False,
) -> int:
    """List or clear the activations that are kept on disk."""
    with job():
        from recipes.cache_job import clear, show

    directory = cache_dir or default_directory()
    if action == "list":
        if digests or older_than_days is not None:
            raise ValueError("cache list shows everything; entries and ages are for cache clear")
        show(directory, as_json=json)
    else:
        if json:
            raise ValueError("--json is for cache list")
        clear(directory, digests, older_than_days)
    return 0


if __name__ == "__main__":
    from recipes.cli import main

    sys.exit(main(["cache", *sys.argv[1:]]))
