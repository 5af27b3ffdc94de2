"""Inspect a model before using it: inputs, taps, variables, checkpoint, hazards.

    vgg-transfer inspect vgg.meta
    vgg-transfer inspect saved_model --json

Works without the weights and does not run the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from recipes.startup import job


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Flags of ``vgg-transfer inspect``, with their defaults."""

    rename: tuple[str, ...] = ()
    """NAME=KEY maps a part of the graph's variable names to the checkpoint's keys, e.g.
    weights=kernel; an empty NAME prepends KEY. Repeatable."""
    json: Annotated[bool, Parameter(negative=())] = False
    """Print JSON."""


def inspect(model: Path, /, config: InspectConfig = InspectConfig()) -> int:
    """Show a model's inputs, taps, variables, checkpoint and hazards, and a command to try first.

    Args:
        model: meta graph (prefix, .meta, .index or .data file, V1 checkpoint, or a folder with
            one), frozen .pb, or SavedModel.
    """
    with job():
        from recipes.inspect_job import run

        text = run(model, rename=config.rename, as_json=config.json)
    print(text)
    return 0
