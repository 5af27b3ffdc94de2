"""Between the flags about a network and the network: feeds parsed, and what was found reported."""

from __future__ import annotations

import contextlib

from recipes import terminal
from recipes.finetune import FinetuneConfig
from transfer import preparation
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


def warn_if_prepared_twice(network: Network, mode: str) -> None:
    """Where the graph subtracts a mean or swaps colours, and preprocessing does so, too."""
    prepared = preparation.find(network)
    if twice := prepared.repeats(mode):
        terminal.say(
            f"warning: the graph prepares its images itself (it {prepared}); --preprocess {mode} "
            f"will {twice} again, before it"
        )
