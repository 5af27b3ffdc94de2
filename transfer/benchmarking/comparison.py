"""A benchmark of cuts: one process per run, so that time and memory are those of the run alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transfer.activations.cache import Cache
from transfer.benchmarking import report
from transfer.benchmarking.limits import LIMITS
from transfer.core import measurement
from transfer.finetuning.options import OFF, FineTuneOptions, parse_tap
from transfer.finetuning.tap_choice import AUTO
from transfer.graph import canonical, concatenated, cut
from transfer.graph.cuts import Cut, default_cuts, list_cuts
from transfer.images.preprocess import parse_size
from transfer.models import retention
from transfer.models.meta_graph import MetaGraph
from transfer.models.plan import cut_tensor
from transfer.runs import run_folder

SCRATCH = "scratch"
RESULTS = "results.json"
_FROZEN, _FULL = "frozen", "full"
_RATE = "sgemm_gflops"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One process.

    Args:
        label: names its row of the results table.
        work: fine-tune, fine-tune with ``keras.Model.fit``, or measure the limits of the machine.
        options: of the run.
        folder: that the process writes.
        baseline: of ``keras-baseline``: ``keras-onednn`` with oneDNN enabled, ``keras`` with
            TensorFlow's default for this machine.
    """

    label: str
    work: Literal["finetune", "keras-baseline", "benchmark-limits"]
    options: FineTuneOptions
    folder: Path
    baseline: str = ""

    @property
    def cache(self) -> Path:
        """The activation cache, shared by all runs of a row."""
        return self.folder.parent / "cache"


Start = Callable[[Run], str | None]
"""Starts the process of a run and waits for it; returns its error message, ``None`` on success."""


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        options: of all runs; the rows set ``freeze_until``, ``random_weights``, ``solver``,
            ``seed`` and ``cache_dir``.
        labels: cuts, ``tap``, ``none`` for full fine-tuning, ``scratch`` for training from random
            weights; with the tensor of each, see ``labels_of``.
        cuts: all cuts of the network, with their multiply-adds.
        seeds: number of runs per row, with consecutive seeds from ``options.seed``.
        baselines: ``keras`` and ``keras-onednn`` add rows with ``keras.Model.fit``.
        keep_models: otherwise only the metrics of each run are kept.
    """

    options: FineTuneOptions
    labels: Mapping[str, str]
    cuts: Sequence[Cut]
    seeds: int = 3
    baselines: Sequence[str] = ()
    keep_models: bool = False

    def runs(self, out: Path) -> Iterator[Run]:
        """Row by row, so that the seeds of a row share cached activations."""
        for label in self.labels:
            is_scratch = label == SCRATCH
            yield from self._row(out, label, "none" if is_scratch else label, scratch=is_scratch)
        for baseline in self.baselines:
            for kind, cut_name in ((_FROZEN, "tap"), (_FULL, "none")):
                if kind == _FROZEN or {"none", SCRATCH} & {*self.labels}:
                    yield from self._row(out, f"{baseline} {kind}", cut_name, baseline=baseline)

    def _row(
        self, out: Path, label: str, cut_name: str, *, scratch: bool = False, baseline: str = ""
    ) -> Iterator[Run]:
        row = out / label.replace("/", "-").replace(" ", "-")
        # The options of what is trained below the tap, such as l2_sp, are for the other rows.
        is_head = cut_name == "tap" or self.labels.get(label) == self.cuts[-1].tensor
        chosen = self.options.head_only() if is_head else self.options
        if self.baselines:  # which have none
            chosen = replace(chosen, **OFF)
        for seed in range(self.options.seed, self.options.seed + self.seeds):
            options = replace(
                replace(chosen, l2_sp=0.0) if scratch else chosen,
                freeze_until=cut_name,
                random_weights=scratch,
                head_start="random" if scratch or baseline else self.options.head_start,
                solver="gradient",  # epochs of all cuts are compared
                seed=seed,
                cache_dir=row / "cache",
            )
            yield Run(
                label,
                "keras-baseline" if baseline else "finetune",
                options,
                row / f"seed-{seed}",
                baseline,
            )


def labels_of(
    graph: MetaGraph,
    options: FineTuneOptions,
    cuts: str | None,
    feeds: Mapping[str, float | bool] | None = None,
) -> tuple[dict[str, str], list[Cut]]:
    """The rows to compare with the tensor up to which each is frozen, ``none`` or ``scratch``, and
    all cuts of the network.

    Args:
        graph: the model.
        options: of the runs; ``tap`` is not ``auto``.
        cuts: names separated by commas, short ones and ``tap`` included. Default: the tap, the
            middle poolings, ``none`` and ``scratch``.
        feeds: values of placeholders, see ``Backbone``.

    Raises:
        ValueError: for a cut that the network does not have.
    """
    if options.tap == AUTO:
        raise ValueError(
            "benchmark compares the cuts of one tap; name it instead of tap=auto, or compare runs "
            "in a study, in which each chooses its tap"
        )
    network = graph.network(
        parse_tap(options.tap), options.input, dict(feeds or {}), options.keep_dropout
    )
    network = concatenated(network, "avg_max" if options.tap == "all" else "avg")
    size = parse_size(options.image_size) if options.image_size else graph.card.image_size
    labels = cuts.split(",") if cuts else [*default_cuts(network, size), "none", SCRATCH]
    labels = [label.strip().removesuffix(":0") for label in labels]
    tensors = {"none": "none", SCRATCH: SCRATCH, "tap": canonical(network.output)}
    for label in labels:
        if label not in tensors:
            tensors[label] = cut_tensor(graph, network, label)
            cut(network, tensors[label])
    return {label: tensors[label] for label in labels}, list_cuts(network, size)


def compare(comparison: Comparison, out: Path, start: Start) -> tuple[str, int]:
    """Do all runs that have no metrics yet, and write the report.

    Args:
        comparison: what is compared.
        out: folder of the benchmark; what an interrupted one left is completed.
        start: starts the process of a run.

    Returns:
        The results table and the number of failed runs.

    Raises:
        ValueError: if the limits of the machine cannot be measured, as then no run would work.
    """
    runs = list(comparison.runs(out))
    limits, keep_models = _limits(runs[0], out, start), comparison.keep_models
    records = []
    for number, run in enumerate(runs, 1):
        logger.info(f"{number} of {len(runs)}: {run.label}, seed {run.options.seed}")
        records.append(_record(run, start, keep_models))
        last_of_row = number == len(runs) or runs[number].label != run.label
        if last_of_row and not keep_models:
            Cache(run.cache, 0).clear()
        run_folder.write_json(out / RESULTS, {"limits": limits, "runs": records})
        logger.info(report.describe(records[-1]))
    table = report.write(out, limits, records, comparison.cuts)
    return table, sum("error" in record for record in records)


def _record(run: Run, start: Start, keep_models: bool) -> dict[str, Any]:
    """The metrics of a run; the run is done first unless it has them already."""
    record: dict[str, Any] = {"label": run.label, "seed": run.options.seed}
    path = run.folder / run_folder.METRICS
    rates = []
    if not path.is_file():
        run_folder.remove(run.folder)  # left by an interrupted run
        rates.append(measurement.sgemm_gflops())
        error = start(run)
        if error is not None:
            return record | {"error": error}
    metrics = run_folder.read_json(path)
    if _RATE not in metrics:  # also if the benchmark was killed after the end of the run
        # The speed of a machine varies over time, so each run has its own limit.
        rates.append(measurement.sgemm_gflops())
        metrics[_RATE] = sum(rates) / len(rates)
        cached = Cache(run.cache, 0).entries()
        metrics["disk_mb"] = round(sum(entry.num_bytes for entry in cached) / 1e6, 4)
        if not keep_models:
            run_folder.remove(run.folder, only_working=True)
            retention.delete(run.folder / run_folder.MODEL)
        run_folder.write_json(path, metrics)
    return record | metrics


def _limits(run: Run, out: Path, start: Start) -> dict[str, Any]:
    """Measure the machine's peak throughput; see ``transfer.benchmarking.limits``."""
    path = out / LIMITS
    if not path.is_file():
        logger.info("measuring the machine: matrix products, forward pass, input pipeline")
        folder = out / "limits"
        run_folder.remove(folder)
        options = replace(run.options.head_only(), random_weights=False)
        error = start(replace(run, work="benchmark-limits", options=options, folder=folder))
        if error is not None:
            raise ValueError(error)  # the runs would fail with the same error
        os.replace(folder / LIMITS, path)
    return run_folder.read_json(path)
