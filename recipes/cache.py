"""List and clear the activation cache of fine-tuning runs on disk.

    vgg-transfer cache list
    vgg-transfer cache clear --older-than-days 30

Everything in the cache can be recomputed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from recipes.startup import job


def cache(
    action: Annotated[Literal["list", "clear"], Parameter(help="List or delete entries.")],
    digests: Annotated[
        tuple[str, ...],
        Parameter(help="clear: delete only entries whose digests start with these characters."),
    ] = (),
    *,
    cache_dir: Annotated[
        Path | None,
        Parameter(
            help="Folder of the activation cache. [default: vgg-transfer in the user's cache "
            "folder]"
        ),
    ] = None,
    older_than_days: Annotated[
        float | None, Parameter(help="clear: delete only entries unused for this many days.")
    ] = None,
    json: Annotated[bool, Parameter(help="list: print JSON.")] = False,
) -> int:
    """List or clear the activation cache on disk."""
    with job():
        from recipes.cache_job import clear, show
        from transfer.activations.cache import default_directory

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
