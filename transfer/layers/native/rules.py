"""The rules of all operations, by operation."""

from __future__ import annotations

from collections.abc import Callable

from transfer.layers.native.walk import Rule

RULES: dict[str, Rule] = {}


def rule(operations: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of operations, separated by spaces."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operations.split(), function))
        return function

    return register
