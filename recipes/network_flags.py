"""Flags with values of the form ``NAME=VALUE``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable


def parse_feed(assignment: str) -> tuple[str, float | bool]:
    """Parse ``NAME=VALUE``; the value is a number, true or false.

    Raises:
        ValueError: for anything else.
    """
    name, _, value = assignment.rpartition("=")
    with contextlib.suppress(ValueError):
        if name:
            switches = {"true": True, "false": False}
            return name, switches[value.lower()] if value.lower() in switches else float(value)
    raise ValueError(f"--feed {assignment!r}: expected NAME=VALUE with a number, true or false")


def parse_renames(assignments: Iterable[str]) -> dict[str, str]:
    """Parse ``NAME=KEY``: a part of the graph's names, and its replacement in the checkpoint.

    Raises:
        ValueError: for anything else.
    """
    renames = {}
    for assignment in assignments:
        name, separator, key = assignment.partition("=")
        if not separator or name == key:
            raise ValueError(
                f"--rename {assignment!r}: expected NAME=KEY, a part of the graph's names and what "
                "the checkpoint has in its place, e.g. weights=kernel"
            )
        renames[name] = key
    return renames
