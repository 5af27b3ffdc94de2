"""See and clear the activations that fine-tuning runs keep on disk.

    vgg-transfer cache list
    vgg-transfer cache clear --older-than-days 30

Everything there can be computed again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from recipes.startup import job


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
