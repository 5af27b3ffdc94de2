"""Names of layers, from the names of the nodes that they replace."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transfer.layers.native.values import DROPOUT


class Names:
    """Unique names for the layers of one model."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def unique(self, name: str) -> str:
        """The name, or the name with a number if it is taken."""
        name = name.replace("/", "_") or "layer"
        free, number = name, 0
        while free in self.taken:
            number += 1
            free = f"{name}_{number}"
        self.taken.add(free)
        return free

    def of(self, nodes: Sequence[str], operation: str, is_scope: bool, part: str = "") -> str:
        """The name of a layer that replaces nodes: ``conv1_1`` for ``vgg_16/conv1/conv1_1/Conv2D``
        and ``vgg_16/conv1/conv1_1/BiasAdd``.

        Args:
            nodes: full names of the nodes.
            operation: operation type of the first node.
            is_scope: name the layer after the common scope of the nodes, not after the node.
            part: appended, if several layers replace the nodes.
        """
        scope = _common(nodes)
        while is_scope and len(nodes) == 1 and len(scope) > 1 and _is_default(scope[-1], operation):
            scope = scope[:-1]
        # tf.nn.dropout makes a scope "dropout" in that of a layer, conditionals one in between.
        while operation == DROPOUT and any("drop" in parent.lower() for parent in scope[:-1]):
            scope = scope[:-1]
        if not is_scope:
            scope = nodes[-1].split("/")
            if _is_default(scope[-1], operation) and len(scope) > 1:
                scope = [*scope[:-2], f"{scope[-2]}_{scope[-1]}"]
        scope = scope or nodes[0].split("/")
        if part:
            scope = [*scope[:-1], f"{scope[-1]}_{part}"]
        if scope[-1] not in self.taken:
            return self.unique(scope[-1])
        return self.unique("_".join(scope))


def _common(nodes: Sequence[str]) -> list[str]:
    """The components that the paths of all nodes begin with."""
    paths = [node.split("/") for node in nodes]
    common = []
    for parts in zip(*paths, strict=False):
        if len({*parts}) > 1:
            break
        common.append(parts[0])
    return common


def _is_default(name: str, operation: str) -> bool:
    """Whether a node has the name that TensorFlow gives to nodes of its operation."""
    if operation == DROPOUT:  # named after its last operation
        operation = "(Mul|SelectV2|Select|Merge|Identity|cond)"
        return re.fullmatch(rf"{operation}(_\d+)?", name, re.IGNORECASE) is not None
    return re.fullmatch(rf"{re.escape(operation)}(_\d+)?", name, re.IGNORECASE) is not None
