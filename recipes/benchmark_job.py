"""What ``vgg-transfer benchmark`` does; its flags are in ``recipes.benchmark``."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes import terminal
from recipes.benchmark import BenchmarkConfig
from recipes.finetune_flags import FinetuneConfig
from recipes.finetune_request import flags_of
from recipes.network_flags import parse_feed, parse_renames
from transfer import MetaGraph, load_meta_graph, open_source
from transfer.activations.cache import Cache
from transfer.core import child_process, files, measurement
from transfer.graph import Network, cut
from transfer.graph.cuts import Cut, default_cuts, list_cuts
from transfer.images.preprocess import parse_size
from transfer.models import retention
from transfer.runs import benchmark_report, run_folder

SCRATCH = "scratch"
LIMITS = "limits.json"
RESULTS = "results.json"
_FROZEN, _FULL = "frozen", "full"


@dataclass(frozen=True)
class Run:
    """One process: ``label`` is the row of the table that it belongs to."""

    label: str
    verb: str
    config: FinetuneConfig
    folder: Path
    environment: dict[str, str]

    @property
    def cache(self) -> Path:
        """Where the activations of its row are."""
        return self.folder.parent / "cache"


@dataclass(frozen=True)
class Benchmark:
    """The flags, with the folder and the rows decided."""

    config: BenchmarkConfig
    out: Path
    labels: list[str]


def run(config: BenchmarkConfig) -> tuple[str, Path, int]:
    """Do all runs that have no figures yet; returns the table, its folder, how many runs failed.

    Raises:
        ValueError, OSError: if the flags do not fit, or the model cannot be opened.
    """
    _check(config)
    graph, network = _open(config)
    if config.image_folder:  # what the runs say is in their logs
        open_source(image_folder=config.image_folder)
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
    """The table, and how many runs failed."""
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
        terminal.say(benchmark_report.describe(records[-1]))
    table = benchmark_report.write(out, limits, records, cuts)
    return table, sum("error" in record for record in records)


def _check(config: BenchmarkConfig) -> None:
    unused = {
        "--freeze-until": config.freeze_until != "tap",
        "--schedule": config.schedule,
        "--random-weights": config.random_weights,
        "--cache-dir": config.cache_dir,
        "--solver": config.solver != "gradient",
        "--strategy": config.strategy != "auto",
    }
    given = [flag for flag, value in unused.items() if value]
    if given:
        raise ValueError(
            f"benchmark chooses {', '.join(given)} itself; --cuts says what to compare"
        )
    if config.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {config.seeds}")
    if config.out is not None or config.resume:
        run_folder.check(config.out, resume=config.resume)


def _open(config: BenchmarkConfig) -> tuple[MetaGraph, Network]:
    """What the runs will take, to know its cuts."""
    graph = load_meta_graph(config.model, rename=parse_renames(config.rename))
    feeds = dict(parse_feed(assignment) for assignment in config.feed)
    tap = graph.tensor(config.tap or graph.card.tap or "fc7")
    return graph, graph.network(tap, config.input, feeds, config.keep_dropout)


def _check_cuts(labels: Sequence[str], graph: MetaGraph, network: Network) -> None:
    """Before anything is run for hours."""
    for label in labels:
        if label.strip() not in ("none", SCRATCH):
            cut(network, graph.tensor(label.strip()))


def _runs(benchmark: Benchmark) -> Iterator[Run]:
    """Row by row, so that the seeds of a row find each other's activations."""
    config, labels = benchmark.config, benchmark.labels
    options = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(FinetuneConfig)
    }
    rows = [(label, "finetune", label, dict(os.environ)) for label in labels]
    for baseline in config.baseline:
        environment = dict(os.environ, TF_ENABLE_ONEDNN_OPTS="1")
        if baseline == "keras":
            environment.pop("TF_ENABLE_ONEDNN_OPTS")
        for what, at in ((_FROZEN, "tap"), (_FULL, "none")):
            if what == _FROZEN or {"none", SCRATCH} & {*labels}:
                rows.append((f"{baseline} {what}", "keras-baseline", at, environment))
    for label, verb, at, environment in rows:
        for seed in range(config.seed, config.seed + config.seeds):
            row = benchmark.out / label.replace("/", "-").replace(" ", "-")
            folder = row / f"seed-{seed}"
            changed: dict[str, Any] = {
                "freeze_until": "none" if at == SCRATCH else at,
                "random_weights": at == SCRATCH,
                "seed": seed,
                "out": folder,
                "cache_dir": row / "cache",
                "resume": False,
                "strategy": "none",  # as the baselines
            }
            yield Run(label, verb, FinetuneConfig(**{**options, **changed}), folder, environment)


def _record(item: Run, keep_models: bool) -> dict[str, Any]:
    """The figures of a run, which is done if it has none yet."""
    record: dict[str, Any] = {"label": item.label, "seed": item.config.seed}
    path = item.folder / run_folder.METRICS
    if not path.is_file():
        run_folder.remove(item.folder)  # of a run that was cut off
        before = measurement.sgemm_gflops()
        error = _start(item.verb, item.config, item.folder, item.environment)
        if error is not None:
            return record | {"error": error}
        metrics = run_folder.read_json(path)
        # Machines are faster at one time than at another, so each run has its own limit.
        metrics["sgemm_gflops"] = (before + measurement.sgemm_gflops()) / 2
        used = Cache(item.cache, 0).entries()
        metrics["disk_mb"] = round(sum(entry.num_bytes for entry in used) / 1e6, 4)
        run_folder.write_json(path, metrics)
        if not keep_models:
            retention.delete(item.folder / run_folder.MODEL)
            run_folder.remove(item.folder, only_working=True)
    return record | run_folder.read_json(path)


def _limits(benchmark: Benchmark) -> dict[str, float]:
    """What the machine can do; see ``recipes.benchmark_limits``."""
    path = benchmark.out / LIMITS
    if not path.is_file():
        terminal.say("the machine: matrix products, a forward pass, the input pipeline")
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
            raise ValueError(error)  # what the runs would fail with, too
        os.replace(folder / LIMITS, path)
    return run_folder.read_json(path)


def _start(
    verb: str, config: FinetuneConfig, folder: Path, environment: dict[str, str]
) -> str | None:
    """Run a verb with a config in a process of its own; what it failed with, if it did.

    Its output goes to a log beside its folder.
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
