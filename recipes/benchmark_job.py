"""The three kinds of ``vgg-transfer benchmark``; its flags are in ``recipes.benchmark_flags``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from recipes import console
from recipes.benchmark_flags import DEFAULTS, BenchmarkConfig
from recipes.finetune_flags import FinetuneConfig
from recipes.finetune_request import request
from recipes.flag_values import given_of, options_of
from transfer.benchmarking import keras_baseline, precisions, study_report
from transfer.benchmarking.comparison import Comparison, Run, compare, labels_of
from transfer.benchmarking.content import check_content, content_of, keep_content
from transfer.benchmarking.grid import parse_grid
from transfer.benchmarking.study import study
from transfer.benchmarking.study_results import Study
from transfer.core import child_process, files
from transfer.finetuning.options import FineTuneOptions
from transfer.runs import interruption, run_folder


def compare_cuts(config: BenchmarkConfig) -> tuple[str, Path, int]:
    """Do all runs that have no metrics yet; returns the table, its folder and the number of failed
    runs.

    Raises:
        ValueError, OSError: if the flags are inconsistent, or the model cannot be opened.
    """
    of_rows = ("freeze_until", "freeze_from", "schedule", "random_weights", "cache_dir")
    if given := given_of(config, *of_rows, solver=("auto", "gradient"), strategy=("auto",)):
        raise ValueError(f"benchmark chooses {given} itself; --cuts says what to compare")
    _check_seeds(config)
    if config.out is not None or config.resume:
        run_folder.check(config.out, resume=config.resume)
    options = options_of(FineTuneOptions, config)
    if config.baseline:
        keras_baseline.check(options)
    runs = request(replace(config, out=None, resume=False))
    labels, cuts = labels_of(runs.graph, options, config.cuts, config.feeds)
    content = content_of(runs)
    out = _out(config, "benchmark").resolve()
    config = replace(config, cuts=",".join(labels), out=out)
    comparison = Comparison(
        options, labels, cuts, config.seeds, config.baseline, config.keep_models
    )
    flags, defaults, fixed = asdict(config), asdict(DEFAULTS), run_folder.CHANGES_RESULT
    with (
        console.resumable("benchmark"),
        run_folder.opened(out, flags, resume=config.resume, defaults=defaults, fixed=fixed),
        interruption.resumable(out),  # which ends the process of the current run
    ):
        check_content(out, content)
        keep_content(out, content)
        table, num_failed = compare(comparison, out, lambda run: _start(run, config))
    return table, out, num_failed


def run_grid(config: BenchmarkConfig) -> tuple[str, Path, int]:
    """Do all runs of a study; see ``compare_cuts``. Its tables are written also if it is
    interrupted, that of the runs after each of them."""
    if given := given_of(config, "cuts", "baseline", strategy=("auto", "none")):
        raise ValueError(f"--grid says what to compare; leave out {given}")
    _check_seeds(config)
    axes = parse_grid(config.grid or "")
    _check_axes(config, axes)
    axes.setdefault("seed", list(range(config.seed, config.seed + config.seeds)))
    if config.resume:
        run_folder.check(config.out, resume=True)
        if config.out is not None and not (config.out / run_folder.CONFIG).is_file():
            raise FileNotFoundError(f"{str(config.out)!r} holds no study to resume")
    out = _out(config, "study")
    runs = replace(request(replace(config, out=None, resume=False)), verbose=0)
    latest: list[Study] = []

    def keep(results: Study) -> None:
        latest[:] = [results]
        study_report.write_runs(out, results)

    with console.resumable("benchmark"), console.each_line_once():
        try:
            result = study(runs, axes, out, keep_models=config.keep_models, on_result=keep)
        except KeyboardInterrupt:
            for results in latest:
                study_report.write(out, results)
            raise
    return study_report.write(out, result), out, len(result.failures)


def compare_precisions(config: BenchmarkConfig) -> tuple[str, Path, int]:
    """Compare the precisions; see ``compare_cuts``."""
    of_runs = ("freeze_until", "precision", "keep_models", "resume")
    if given := given_of(config, "cuts", "grid", "baseline", *of_runs):
        raise ValueError(
            f"--precisions compares one network in several precisions; leave out {given}"
        )
    out = _out(config, "precisions")
    names = [name.strip() for name in (config.precisions or "").split(",")]
    results = precisions.compare_precisions(request(replace(config, out=out)), names)
    return precisions.describe(results), out.resolve(), 0


def _check_axes(config: BenchmarkConfig, axes: Mapping[str, Sequence[Any]]) -> None:
    """Refuse flags that the grid would override."""
    for name in axes:
        flags = (name, "seeds") if name == "seed" else (name,)
        if given := given_of(config, *flags):
            raise ValueError(f"{name} is an axis of --grid; leave out {given}")


def _check_seeds(config: BenchmarkConfig) -> None:
    if config.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {config.seeds}")


def _out(config: BenchmarkConfig, kind: str) -> Path:
    return config.out or run_folder.default_out(kind, config.dataset or "digits")


def _start(run: Run, config: BenchmarkConfig) -> str | None:
    """Run a subcommand in a child process; returns its error message, or ``None`` on success.

    Its output goes to a log file beside its folder.
    """
    flags = asdict(options_of(FinetuneConfig, config)) | asdict(run.options)
    flags |= {"out": run.folder, "resume": False, "strategy": "none"}  # like the baselines
    files.make_folder(run.folder.parent)
    path, log = run.folder.with_suffix(".yaml"), run.folder.with_suffix(".log")
    run_folder.write_text(path, run_folder.to_yaml(flags))
    environment = dict(os.environ)
    if run.baseline == "keras-onednn":
        environment["TF_ENABLE_ONEDNN_OPTS"] = "1"
    elif run.baseline == "keras":
        environment.pop("TF_ENABLE_ONEDNN_OPTS", None)
    command = child_process.command("recipes", run.work, "--config", path)
    status, last = child_process.run_logged(command, log, environment)
    if status == 0:
        return None
    return f"{last.removeprefix('error: ')} (exit status {status}, see {log})"
