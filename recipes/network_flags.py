"""Between the flags about a network and the network: feeds parsed, and what was found reported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from recipes import terminal
from recipes.finetune import FinetuneConfig
from transfer import preparation, surgery
from transfer.cuts import stopped
from transfer.surgery import Network


def parse_feed(assignment: str) -> tuple[str, float | bool]:
    """``NAME=VALUE``, with a number, true or false.

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
    """``NAME=KEY`` of each: a part of the graph's names, and what the checkpoint has there.

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


def report(config: FinetuneConfig, tap: str, network: Network) -> None:
    """What was found in the graph and not said by the user."""
    found = {"tap": (config.tap, tap), "input": (config.input, network.input)}
    lines = [f"{what}: {name}" for what, (asked, name) in found.items() if asked != name]
    lines += [
        f"{mode.kind}: {mode.tensor} is {mode.inference}, and {mode.training} in what is trained "
        f"(found by {mode.why})"
        for mode in network.modes
    ]
    if network.batch_size is not None:
        lines.append(f"the graph takes batches of {network.batch_size} only; others are filled up")
    for line in lines:
        terminal.say(line)


def warn_if_stopped(network: Network, cut: str) -> None:
    """Where gradients are stopped inside of what is trained, so that layers do not learn."""
    for tensor, names in stopped(network).items():
        shown = f"{', '.join(names[:4])}{', ...' * (len(names) > 4)}"
        line = (
            f"warning: the graph stops gradients at {tensor!r}: {len(names)} of the variables "
            f"after the cut {cut!r} stay as they are ({shown})"
        )
        with contextlib.suppress(ValueError):  # a branch goes round it
            surgery.cut(network, tensor)
            line += (
                f"; --freeze-until {tensor.removesuffix(':0')} trains the same and computes less"
            )
        terminal.say(line)


def warn_if_prepared_twice(network: Network, mode: str) -> None:
    """Where the graph subtracts a mean or swaps colours, and preprocessing does so, too."""
    prepared = preparation.find(network)
    if twice := prepared.repeats(mode):
        terminal.say(
            f"warning: the graph prepares its images itself (it {prepared}); --preprocess {mode} "
            f"will {twice} again, before it"
        )
