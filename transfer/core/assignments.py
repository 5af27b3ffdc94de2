"""Assignments as text, ``NAME=VALUE``, as on the command line and in ``config.yaml``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable


def parse_feeds(assignments: Iterable[str]) -> dict[str, float | bool]:
    """Values of placeholders, from ``NAME=VALUE``; a value is a number, true or false.

    Raises:
        ValueError: for anything else.

    Example:
        >>> from transfer.core.assignments import parse_feeds
        >>> parse_feeds(["keep_prob:0=1.0", "is_training=false"])
        {'keep_prob:0': 1.0, 'is_training': False}
    """
    return dict(map(_parse_feed, assignments))


def _parse_feed(assignment: str) -> tuple[str, float | bool]:
    name, _, value = assignment.rpartition("=")
    with contextlib.suppress(ValueError):
        if name:
            switches = {"true": True, "false": False}
            return name, switches[value.lower()] if value.lower() in switches else float(value)
    raise ValueError(f"feed={assignment!r}: expected NAME=VALUE with a number, true or false")


def parse_renames(assignments: Iterable[str]) -> dict[str, str]:
    """Parts of a graph's names and what the checkpoint has in their place, from ``NAME=KEY``; see
    ``rename`` of ``load_meta_graph``.

    Raises:
        ValueError: for anything else.

    Example:
        >>> from transfer.core.assignments import parse_renames
        >>> parse_renames(["weights=kernel", "=vgg_16/"])
        {'weights': 'kernel', '': 'vgg_16/'}
    """
    renames = {}
    for assignment in assignments:
        name, separator, key = assignment.partition("=")
        if not separator or name == key:
            raise ValueError(
                f"rename={assignment!r}: expected NAME=KEY, a part of the graph's names and what "
                "the checkpoint has in its place, e.g. weights=kernel"
            )
        renames[name] = key
    return renames
