"""Implementation of ``vgg-transfer benchmark``; its flags are in ``recipes.benchmark_flags``."""

from __future__ import annotations

import os
import subprocess
from dataclasses import fields, replace
from pathlib import Path

from recipes.benchmark_flags import DEFAULTS, BenchmarkConfig
from recipes.finetune_flags import FinetuneConfig
from recipes.finetune_request import flags_of, options_of
from recipes.network_flags import parse_feed, parse_renames
from transfer import load_meta_graph
from transfer.benchmarking.comparison import Comparison, Run, compare, labels_of
from transfer.core import child_process, files
from transfer.finetuning.options import parse_tap
from transfer.finetuning.tap_choice import AUTO
from transfer.graph import concatenated
from transfer.images.preprocess import parse_size
from transfer.runs import run_folder


def run(config: BenchmarkConfig) -> tuple[str, Path, int]:
    """Do all runs that have no metrics yet; returns the table, its folder and the number of failed
    runs.

    Raises:
        ValueError, OSError: if the flags are inconsistent, or the model cannot be opened.
    """
    _check(config)
    graph = load_meta_graph(config.model, rename=parse_renames(config.rename))
    feeds = dict(parse_feed(assignment) for assignment in config.feed)
    network = graph.network(parse_tap(config.tap), config.input, feeds, config.keep_dropout)
    network = concatenated(network, "avg_max" if config.tap == "all" else "avg")
    if config.image_folder or config.csv:  # its warnings, which in the runs go to their log files
        config.open()
    size = parse_size(config.image_size) if config.image_size else graph.card.image_size
    labels, cuts = labels_of(graph, network, size, config.cuts)
    out = (config.out or run_folder.default_out("benchmark", config.dataset or "digits")).resolve()
    config = replace(config, cuts=",".join(labels), out=out)
    comparison = Comparison(
        options_of(config), labels, cuts, config.seeds, config.baseline, config.keep_models
    )
    defaults = {option.name: getattr(DEFAULTS, option.name) for option in fields(BenchmarkConfig)}
    with run_folder.opened(out, flags_of(config), resume=config.resume, defaults=defaults):
        table, num_failed = compare(comparison, out, lambda run: _start(run, config))
    return table, out, num_failed


def _check(config: BenchmarkConfig) -> None:
    unused = {
        "--freeze-until": config.freeze_until != "tap",
        "--freeze-from": config.freeze_from,
        "--schedule": config.schedule,
        "--random-weights": config.random_weights,
        "--cache-dir": config.cache_dir,
        "--solver": config.solver not in ("auto", "gradient"),
        "--strategy": config.strategy != "auto",
    }
    conflicting = [flag for flag, value in unused.items() if value]
    if conflicting:
        raise ValueError(
            f"benchmark chooses {', '.join(conflicting)} itself; --cuts says what to compare"
        )
    if config.tap == AUTO:
        raise ValueError(
            "benchmark compares the cuts of one tap; name it instead of tap=auto, or use --grid, "
            "with which each run chooses its tap"
        )
    if config.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {config.seeds}")
    if config.out is not None or config.resume:
        run_folder.check(config.out, resume=config.resume)


def _start(run: Run, config: BenchmarkConfig) -> str | None:
    """Run a subcommand in a child process; returns its error message, or ``None`` on success.

    Its output goes to a log file beside its folder.
    """
    flags = {option.name: getattr(config, option.name) for option in fields(FinetuneConfig)}
    flags |= vars(run.options)
    flags |= {"out": run.folder, "resume": False, "strategy": "none"}  # like the baselines
    files.make_folder(run.folder.parent)
    path, log = run.folder.with_suffix(".yaml"), run.folder.with_suffix(".log")
    run_folder.write_text(path, run_folder.to_yaml(flags))
    files.unshare(log)
    environment = dict(os.environ)
    if run.baseline == "keras-onednn":
        environment["TF_ENABLE_ONEDNN_OPTS"] = "1"
    elif run.baseline == "keras":
        environment.pop("TF_ENABLE_ONEDNN_OPTS", None)
    with log.open("w", encoding="utf-8") as file:
        command = child_process.command("recipes", run.work, "--config", path)
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if status == 0:
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    return f"{lines[-1].removeprefix('error: ')} (exit status {status}, see {log})"
