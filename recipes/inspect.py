"""Inspect a model before using it: inputs, taps, variables, checkpoint, hazards.

    vgg-transfer inspect vgg.meta
    vgg-transfer inspect saved_model --json

Works without the weights and does not run the model.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from recipes import console
from recipes.startup import job
from transfer.core.assignments import parse_renames


def inspect(
    model: Path,
    /,
    *,
    rename: tuple[str, ...] = (),
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Show a model's inputs, taps, variables, checkpoint and hazards, and a command to try first.

    Args:
        model: meta graph (prefix, .meta, .index or .data file, V1 checkpoint, or a folder with
            one), frozen .pb, or SavedModel.
        rename: NAME=KEY maps a part of the graph's variable names to the checkpoint's keys, e.g.
            weights=kernel; an empty NAME prepends KEY. Repeatable.
        as_json: Print JSON, with all rows, and an entry per layer instead of one per stage.
    """
    with job():
        from transfer import load_meta_graph
        from transfer.models.inspection import inspect
        from transfer.models.inspection_text import describe

        inspection = inspect(load_meta_graph(model, rename=parse_renames(rename)))
        lines = [*describe(inspection)]
    if as_json:
        print(json.dumps(dataclasses.asdict(inspection), indent=2))
    else:
        print("\n".join(map(console.with_flags, lines)))
    return 0
