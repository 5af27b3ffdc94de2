"""Limits of weight files, checked before memory is allocated."""

from __future__ import annotations

MAX_BYTES = 5 * 2**28
"""Limit for all arrays of a file, without those of optimizers. VGG19 with its three fully connected
layers has 0.6 GB in float32, and twice that in float64."""
MAX_DIMENSIONS, MAX_ENTRIES = 8, 20_000


def check_total(num_bytes: int) -> None:
    """Check the size of all arrays of a file together.

    Raises:
        ValueError: if it is over ``MAX_BYTES``.
    """
    if num_bytes > MAX_BYTES:
        raise ValueError(
            f"its arrays would take over {MAX_BYTES:,} bytes; a VGG takes less than half of that"
        )
