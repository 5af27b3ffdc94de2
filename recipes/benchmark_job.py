"""Implementation of ``vgg-transfer benchmark``; its flags are in ``recipes.benchmark_flags``."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes import terminal
from recipes.benchmark_flags import BenchmarkConfig
from recipes.finetune_flags import FinetuneConfig
from recipes.finetune_request import flags_of
from recipes.network_flags import parse_feed, parse_renames
from transfer import MetaGraph, load_meta_graph
from transfer.activations.cache import Cache
from transfer.benchmarking import report
from transfer.benchmarking.limits import LIMITS
from transfer.core import child_process, files, measurement
from transfer.finetuning.options import parse_tap
from transfer.finetuning.tap_choice import AUTO
from transfer.graph import Network, concatenated, cut, operation_of
from transfer.graph.cuts import Cut, default_cuts, list_cuts
from transfer.images.preprocess import parse_size
from transfer.models import retention
from transfer.runs import run_folder

SCRATCH = "scratch"
RESULTS = "results.json"
_FROZEN, _FULL = "frozen", "full"


@dataclass(frozen=True)
class Run:
    """One training process; ``label`` names its row of the results table."""

    label: str
    verb: str
    config: FinetuneConfig
    folder: Path
    environment: dict[str, str]

    @property
    def cache(self) -> Path:
        """The activation cache, shared by all runs of a row."""
        return self.folder.parent / "cache"


@dataclass(frozen=True)
class Benchmark:
    """The flags, with the output folder and row labels resolved."""

    config: BenchmarkConfig
    out: Path
    labels: list[str]


def run(config: BenchmarkConfig) -> tuple[str, Path, int]:
    """Do all runs that have no metrics yet; returns the table, its folder and the number of failed
    runs.

    Raises:
        ValueError, OSError: if the flags are inconsistent, or the model cannot be opened.
    """
    _check(config)
    graph, network = _open(config)
    if config.image_folder or config.csv:  # its warnings, which in the runs go to their log files
        config.open()
    size = parse_size(config.image_size) if config.image_size else graph.card.image_size
    cuts = list_cuts(network, size)
    labels = config.cuts.split(",") if config.cuts else [*default_cuts(network, size), "none"]
    if config.cuts is None:
        labels.append(SCRATCH)
    _check_cuts(labels, graph, network)
    labels = [label.strip().removesuffix(":0") for label in labels]
    out = config.out or run_folder.default_out("benchmark", config.dataset or "digits")
    out = out.resolve()
    config = dataclasses.replace(config, cuts=",".join(labels), out=out)
    with run_folder.opened(out, flags_of(config), resume=config.resume):
        table, num_failed = _run_all(Benchmark(config, out, labels), cuts)
    return table, out, num_failed


def _run_all(benchmark: Benchmark, cuts: Sequence[Cut]) -> tuple[str, int]:
    """Returns the results table and the number of failed runs."""
    out, limits, keep_models = benchmark.out, _limits(benchmark), benchmark.config.keep_models
    records = []
    runs = list(_runs(benchmark))
    for number, item in enumerate(runs, 1):
        terminal.say(f"{number} of {len(runs)}: {item.label}, seed {item.config.seed}")
        records.append(_record(item, keep_models))
        last_of_row = number == len(runs) or runs[number].label != item.label
        if last_of_row and not keep_models:
            Cache(item.cache, 0).clear()
        run_folder.write_json(out / RESULTS, {"limits": limits, "runs": records})
        terminal.say(report.describe(records[-1]))
    table = report.write(out, limits, records, cuts)
    return table, sum("error" in record for record in records)


def _check(config: BenchmarkConfig) -> None:
    unused = {
        "--freeze-until": config.freeze_until != "tap",
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


def _open(config: BenchmarkConfig) -> tuple[MetaGraph, Network]:
    """The graph and network of the runs, to list the cuts."""
    graph = load_meta_graph(config.model, rename=parse_renames(config.rename))
    feeds = dict(parse_feed(assignment) for assignment in config.feed)
    network = graph.network(parse_tap(config.tap), config.input, feeds, config.keep_dropout)
    return graph, concatenated(network, "avg_max" if config.tap == "all" else "avg")


def _check_cuts(labels: Sequence[str], graph: MetaGraph, network: Network) -> None:
    """Refuse invalid cuts before the slow runs start."""
    own = {node.name for node in network.graph_def.node}  # also that of concatenated taps
    for label in map(str.strip, labels):
        if label not in ("none", SCRATCH):
            cut(network, label if operation_of(label) in own else graph.tensor(label))


def _runs(benchmark: Benchmark) -> Iterator[Run]:
    """Row by row, so that the seeds of a row share cached activations."""
    config, labels = benchmark.config, benchmark.labels
    options = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(FinetuneConfig)
    }
    rows = [(label, "finetune", label, dict(os.environ)) for label in labels]
    for baseline in config.baseline:
        environment = dict(os.environ, TF_ENABLE_ONEDNN_OPTS="1")
        if baseline == "keras":
            environment.pop("TF_ENABLE_ONEDNN_OPTS")
        for kind, cut_name in ((_FROZEN, "tap"), (_FULL, "none")):
            if kind == _FROZEN or {"none", SCRATCH} & {*labels}:
                rows.append((f"{baseline} {kind}", "keras-baseline", cut_name, environment))
    for label, verb, cut_name, environment in rows:
        for seed in range(config.seed, config.seed + config.seeds):
            row = benchmark.out / label.replace("/", "-").replace(" ", "-")
            folder = row / f"seed-{seed}"
            changed: dict[str, Any] = {
                "freeze_until": "none" if cut_name == SCRATCH else cut_name,
                "random_weights": cut_name == SCRATCH,
                "solver": "gradient",  # epochs of all cuts are compared
                "seed": seed,
                "out": folder,
                "cache_dir": row / "cache",
                "resume": False,
                "strategy": "none",  # like the baselines
            }
            yield Run(label, verb, FinetuneConfig(**{**options, **changed}), folder, environment)


def _record(item: Run, keep_models: bool) -> dict[str, Any]:
    """The metrics of a run; the run is done first unless it has them already."""
    record: dict[str, Any] = {"label": item.label, "seed": item.config.seed}
    path = item.folder / run_folder.METRICS
    if not path.is_file():
        run_folder.remove(item.folder)  # left by an interrupted run
        before = measurement.sgemm_gflops()
        error = _start(item.verb, item.config, item.folder, item.environment)
        if error is not None:
            return record | {"error": error}
        metrics = run_folder.read_json(path)
        # The speed of a machine varies over time, so each run has its own limit.
        metrics["sgemm_gflops"] = (before + measurement.sgemm_gflops()) / 2
        cached = Cache(item.cache, 0).entries()
        metrics["disk_mb"] = round(sum(entry.num_bytes for entry in cached) / 1e6, 4)
        run_folder.write_json(path, metrics)
        if not keep_models:
            retention.delete(item.folder / run_folder.MODEL)
            run_folder.remove(item.folder, only_working=True)
    return record | run_folder.read_json(path)


def _limits(benchmark: Benchmark) -> dict[str, Any]:
    """Measure the machine's peak throughput; see ``transfer.benchmarking.limits``."""
    path = benchmark.out / LIMITS
    if not path.is_file():
        terminal.say("measuring the machine: matrix products, forward pass, input pipeline")
        (item, *_) = _runs(benchmark)
        folder = benchmark.out / "limits"
        run_folder.remove(folder)
        options = dataclasses.replace(item.config, freeze_until="tap", random_weights=False)
        error = _start(
            "benchmark-limits",
            dataclasses.replace(options, out=folder),
            folder,
            dict(os.environ),
        )
        if error is not None:
            raise ValueError(error)  # the runs would fail with the same error
        os.replace(folder / LIMITS, path)
    return run_folder.read_json(path)


def _start(
    verb: str, config: FinetuneConfig, folder: Path, environment: dict[str, str]
) -> str | None:
    """Run a subcommand in a child process; returns its error message, or ``None`` on success.

    Its output goes to a log file beside its folder.
    """
    files.make_folder(folder.parent)
    flags, log = folder.with_suffix(".yaml"), folder.with_suffix(".log")
    run_folder.write_text(flags, run_folder.to_yaml(flags_of(config)))
    files.unshare(log)
    with log.open("w", encoding="utf-8") as file:
        command = child_process.command("recipes", verb, "--config", flags)
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
