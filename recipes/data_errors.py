"""Adds the flag that helps to errors about unreadable images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transfer.data.unreadable import UnreadableImageError


@contextlib.contextmanager
def skip_suggested() -> Iterator[None]:
    """Mention --skip-unreadable in errors about images that cannot be decoded."""
    try:
        yield
    except UnreadableImageError as error:
        raise ValueError(f"{error}, or leave them out with --skip-unreadable N") from error
