"""Implementation of ``vgg-transfer benchmark --precisions``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from recipes.benchmark_flags import DEFAULTS, BenchmarkConfig
from recipes.finetune_request import request
from transfer.benchmarking.precisions import compare_precisions, describe
from transfer.runs import run_folder


def run(config: BenchmarkConfig) -> tuple[str, Path, int]:
    """Compare the precisions; returns the table, its folder and 0, the number of failures.

    Raises:
        ValueError, OSError: if the flags are inconsistent, or the model cannot be opened.
    """
    conflicting = {
        "--cuts": config.cuts,
        "--grid": config.grid,
        "--baseline": config.baseline,
        "--freeze-until": config.freeze_until != DEFAULTS.freeze_until,
        "--precision": config.precision != DEFAULTS.precision,
        "--keep-models": config.keep_models,
        "--resume": config.resume,
    }
    if conflicts := [flag for flag, value in conflicting.items() if value]:
        raise ValueError(
            f"--precisions compares one network in several precisions; leave out "
            f"{', '.join(conflicts)}"
        )
    out = config.out or run_folder.default_out("precisions", config.dataset or "digits")
    names = [name.strip() for name in (config.precisions or "").split(",")]
    results = compare_precisions(request(dataclasses.replace(config, out=out)), names)
    return describe(results), out.resolve(), 0
