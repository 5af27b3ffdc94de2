"""Errors about images, with the flag that helps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transfer.data.dataset import UnreadableImageError


@contextlib.contextmanager
def skip_suggested() -> Iterator[None]:
    """Errors about images that cannot be decoded name the flag that leaves these out."""
    try:
        yield
    except UnreadableImageError as error:
        raise ValueError(f"{error}, or leave them out with --skip-unreadable N") from error
