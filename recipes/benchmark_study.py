"""Implementation of ``vgg-transfer benchmark --grid``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from recipes import console
from recipes.benchmark_flags import BenchmarkConfig
from recipes.finetune_request import request
from transfer.benchmarking import study_report
from transfer.benchmarking.grid import parse_grid
from transfer.benchmarking.study import study
from transfer.runs import run_folder


def run(config: BenchmarkConfig) -> tuple[str, Path, int]:
    """Do all runs of a study; returns the table, its folder and the number of failed runs.

    Raises:
        ValueError, OSError: if the flags are inconsistent, or the model cannot be opened.
    """
    unused = {"--cuts": config.cuts, "--baseline": config.baseline, "--strategy": None}
    unused["--strategy"] = None if config.strategy in ("auto", "none") else config.strategy
    if conflicts := [flag for flag, value in unused.items() if value]:
        raise ValueError(f"--grid says what to compare; leave out {', '.join(conflicts)}")
    if config.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {config.seeds}")
    axes = parse_grid(config.grid or "")
    axes.setdefault("seed", list(range(config.seed, config.seed + config.seeds)))
    out = config.out or run_folder.default_out("study", config.dataset or "digits")
    runs = dataclasses.replace(config, out=None, resume=False)
    wanted = dataclasses.replace(request(runs), verbose=0)
    with console.resumable("benchmark"), console.each_line_once():
        result = study(wanted, axes, out, keep_models=config.keep_models)
    return study_report.write(out, result), out, len(result.failures)
