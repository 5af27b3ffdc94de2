"""Report of a benchmark: table, JSON, CSV, plots and an HTML page."""

from __future__ import annotations

import base64
import io
import math
import platform
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from tabulate import tabulate

from transfer.core.csv_files import write_row
from transfer.core.files import replacing
from transfer.graph.cuts import Cut
from transfer.runs import run_folder

SUMMARY = "benchmark.json"
TABLE = "benchmark.csv"
PAGE = "report.html"
PLOTS = {
    "accuracy_time.png": "Accuracy against time",
    "epoch_time.png": "Time of an epoch",
}
_COLUMNS = {
    "label": "cut",
    "accuracy": "accuracy",
    "load_s": "load s",
    "extract_s": "extract s",
    "warm_extract_s": "warm s",
    "train_s": "train s",
    "total_s": "total s",
    "epoch_s": "epoch s",
    "train_images_per_s": "images/s",
    "gflops": "GFLOP/s",
    "of_sgemm": "of sgemm",
    "peak_rss_mb": "peak MB",
    "trainable": "trainable",
    "disk_mb": "disk MB",
}
_EXPLAINED = """\
Means over the seeds. accuracy: with a 95 % interval that covers seeds and held-out images. extract:
time to compute the activations at the cut, for the first seed; warm: for the other seeds, which
read them from the cache. epoch: typical epoch without validation, excluding the first one, which
compiles. images/s: in such epochs. GFLOP/s: of the multiplications and additions that training
needs; of sgemm: relative to matrix multiplication measured just before and after the run. total:
everything except process start-up. disk: size of the activation cache."""


def write(
    out: Path, limits: dict[str, Any], records: Sequence[dict[str, Any]], cuts: Sequence[Cut]
) -> str:
    """Write all files; returns the table to print.

    Args:
        out: output folder.
        limits: content of ``limits.json``, see ``transfer.benchmarking.limits.measure``.
        records: one per run: ``metrics.json`` with ``label`` and ``seed``, or with ``error``.
        cuts: the cuts of the network, with their multiply-adds.
    """
    labels = list(dict.fromkeys(record["label"] for record in records))
    rows = [
        _row(label, [r for r in records if r["label"] == label], limits, cuts) for label in labels
    ]
    run_folder.write_json(out / SUMMARY, {"limits": limits, "rows": rows})
    _write_csv(out / TABLE, rows)
    done = [row for row in rows if "accuracy" in row]
    figures = [_accuracy_against_time(done), _epoch_times(done, limits)]
    for name, figure in zip(PLOTS, figures, strict=True):
        with replacing(out / name) as path:
            figure.savefig(path, format="png", dpi=120)
    table = tabulate(
        [_cells(row) for row in rows],
        list(_COLUMNS.values()),
        "github",
        disable_numparse=True,  # keeps the formatted digits
        colalign=["left"] + ["right"] * (len(_COLUMNS) - 1),
    )
    machine = describe_limits(limits)
    failures = [f"{r['label']}, seed {r['seed']}: {r['error']}" for r in records if "error" in r]
    run_folder.write_text(out / PAGE, _page(rows, machine, failures, out))
    lines = [table, "", *machine, *(f"failed: {failure}" for failure in failures)]
    return "\n".join(lines)


def describe(record: dict[str, Any]) -> str:
    """One-line summary of a run."""
    if "error" in record:
        return f"  failed: {record['error']}"
    time = record["time"]
    return (
        f"  accuracy {record['eval']['accuracy']:.4f} in {time['total_s']:,.1f} s (extraction "
        f"{time['extract_s']:,.1f} s, training {time['train_s']:,.1f} s)"
    )


def describe_limits(limits: dict[str, Any]) -> list[str]:
    """Lines with the machine's peak throughput, from ``limits.json``."""
    forward, pipeline = limits["forward_images_per_s"], limits["pipeline_images_per_s"]
    images = limits["images_training"] + limits["images_held_out"]
    int8 = []
    if "int8_gops" in limits:  # not in benchmarks of earlier versions
        int8.append(
            f"products of int8 by {limits['int8_engine']}: {limits['int8_gops']:g} GOP/s, "
            f"{limits['int8_gops'] / limits['sgemm_gflops']:.1f} times that"
        )
    return [
        f"{limits['images_training']} images to train on, {limits['images_held_out']} held out; "
        f"{platform.processor() or platform.machine()}",
        f"sgemm (products of float32 matrices, 3072 x 3072): {limits['sgemm_gflops']:g} GFLOP/s",
        *int8,
        f"forward pass alone: {forward:g} images/s; over all images {images / forward:.1f} s",
        f"input pipeline alone: {pipeline:g} images/s, {pipeline / forward:.1f} times that",
    ]


def _row(
    label: str, records: Sequence[dict[str, Any]], limits: dict[str, Any], cuts: Sequence[Cut]
) -> dict[str, Any]:
    """The metrics of one row; only counts and the label if all of its runs failed."""
    done = [record for record in records if "error" not in record]
    row: dict[str, Any] = {"label": label, "seeds": len(done), "failed": len(records) - len(done)}
    if not done:
        return row
    accuracies = [record["eval"]["accuracy"] for record in done]
    evaluation = done[0]["eval"]  # images in groups count for less
    num_examples = evaluation.get("effective_examples", evaluation["num_examples"])
    low, high = accuracy_interval(accuracies, max(1, num_examples))  # 0 in earlier versions
    row |= {"accuracy": float(np.mean(accuracies)), "accuracy_ci95": [low, high]}
    # The first run computes the activations, the others read them from the cache.
    computed = [r["time"]["extract_s"] for r in done if r["activations"]["computed"]]
    cached = [r["time"]["extract_s"] for r in done if not r["activations"]["computed"]]
    has_cache = any(r["activations"]["computed"] or r["activations"]["found"] for r in done)
    row["extract_s"] = _mean(computed) if has_cache else 0.0
    row["warm_extract_s"] = _mean(cached) if has_cache else None
    for name in ("load_s", "train_s"):
        row[name] = _mean([record["time"][name] for record in done])
    cold = [r for r in done if r["activations"]["computed"]] or done
    row["total_s"] = _mean([record["time"]["total_s"] for record in cold])
    row["epoch_s"] = epoch_s = _mean([r["train"]["epoch_s"] for r in done])
    row["epochs"] = done[0]["train"]["epochs"]
    num_images = limits["images_training"]
    row["train_images_per_s"] = num_images / epoch_s if epoch_s else None
    row["gflops"] = _gflops(done[0]["cut"], cuts, row["train_images_per_s"])
    sgemm = _mean([record["sgemm_gflops"] for record in done])
    row["of_sgemm"] = row["gflops"] and sgemm and row["gflops"] / sgemm
    row["peak_rss_mb"] = max(record["memory"]["peak_rss_mb"] for record in done)
    row["trainable"] = done[0]["params"]["trainable"]
    row["disk_mb"] = max(record.get("disk_mb", 0.0) for record in done)
    return row


def accuracy_interval(accuracies: Sequence[float], num_examples: int) -> tuple[float, float]:
    """95 % confidence interval of an accuracy measured with several seeds on the same images.

    The distances to the ends of two intervals are added in quadrature, on either side: that of the
    mean over seeds (Student's t), and the Wilson score interval for the images, which has a width
    at 0 and 1, too. With one seed, the result is the Wilson interval.

    Args:
        accuracies: 0 to 1, one per seed.
        num_examples: number of held-out images, or of as informative independent ones.
    """
    mean, count = float(np.mean(accuracies)), len(accuracies)
    correct = round(mean * num_examples)
    wilson = stats.binomtest(correct, num_examples).proportion_ci(0.95, method="wilson")
    if count == 1:
        return float(wilson.low), float(wilson.high)
    of_seeds = stats.t.ppf(0.975, count - 1) * np.std(accuracies, ddof=1) / math.sqrt(count)
    below, above = correct / num_examples - wilson.low, wilson.high - correct / num_examples
    low, high = mean - math.hypot(of_seeds, below), mean + math.hypot(of_seeds, above)
    return max(0.0, low), min(1.0, high)


def training_multiply_adds(cut: str, cuts: Sequence[Cut]) -> int | None:
    """Multiply-adds per image to train the part after a cut: forward pass, gradients of the
    kernels, and gradients of the inputs of all layers except the first."""
    total = cuts[-1].multiply_adds if cuts else None
    if total is None:
        return None
    done = [0, *(c.multiply_adds or 0 for c in cuts)]
    names = ["none", *(c.tensor.removesuffix(":0") for c in cuts)]
    if cut not in names[:-1]:
        return None
    position = names.index(cut)
    return 3 * (total - done[position]) - (done[position + 1] - done[position])


def _gflops(cut: str, cuts: Sequence[Cut], images_per_s: float | None) -> float | None:
    work = training_multiply_adds(cut, cuts)
    return None if not work or not images_per_s else 2e-9 * work * images_per_s


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _cells(row: dict[str, Any]) -> list[str]:
    if "accuracy" not in row:
        return [row["label"], "failed", *([""] * (len(_COLUMNS) - 2))]
    low, high = row["accuracy_ci95"]
    digits = {"of_sgemm": 0, "peak_rss_mb": 0, "trainable": 0, "gflops": 1, "epoch_s": 3}
    cells = [row["label"], f"{row['accuracy']:.3f} ({low:.3f} to {high:.3f})"]
    for name in list(_COLUMNS)[2:]:
        value = row[name]
        kind = "%" if name == "of_sgemm" else "f"
        cells.append("" if value is None else f"{value:,.{digits.get(name, 1)}{kind}}")
    return cells


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    columns = ["label", "seeds", "failed", "epochs", "accuracy", "accuracy_low", "accuracy_high"]
    columns += [name for name in _COLUMNS if name not in columns]
    text = io.StringIO()
    write_row(text, columns)
    for row in rows:
        low, high = row.get("accuracy_ci95", (None, None))
        cells = row | {"accuracy_low": low, "accuracy_high": high}
        write_row(text, (cells.get(name, "") for name in columns))
    run_folder.write_text(path, text.getvalue())


def _accuracy_against_time(rows: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        low, high = row["accuracy_ci95"]
        error = [[row["accuracy"] - low], [high - row["accuracy"]]]
        marker = "s" if row["label"].startswith("keras") else "o"
        axes.errorbar(row["total_s"], row["accuracy"], error, fmt=marker, capsize=3)
        axes.annotate(
            row["label"], (row["total_s"], row["accuracy"]), (6, 6), textcoords="offset points"
        )
    axes.set_xscale("log")
    axes.set_xlabel("total seconds, from the model's files to the evaluated classifier")
    axes.set_ylabel("accuracy on held-out images")
    axes.grid(alpha=0.3)
    return figure


def _epoch_times(rows: Sequence[dict[str, Any]], limits: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7, 0.5 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([r["label"] for r in rows], [r["epoch_s"] or 0 for r in rows], color="#0072B2")
    axes.bar_label(bars, fmt="%.3g s", padding=3)
    forward = limits["images_training"] / limits["forward_images_per_s"]
    axes.axvline(forward, color="#D55E00", linestyle="--", label="a forward pass of the network")
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel("seconds per epoch, from the second one on")
    axes.legend(loc="lower right")
    axes.grid(axis="x", alpha=0.3)
    return figure


def _page(
    rows: Sequence[dict[str, Any]], machine: Sequence[str], failures: Sequence[str], out: Path
) -> str:
    template = jinja2.Template(
        (files("transfer.benchmarking") / "report.html").read_text(encoding="utf-8"),
        autoescape=True,
    )
    plots = [
        (title, base64.b64encode((out / name).read_bytes()).decode())
        for name, title in PLOTS.items()
    ]
    return template.render(
        columns=list(_COLUMNS.values()),
        rows=[_cells(row) for row in rows],
        explained=_EXPLAINED,
        machine=machine,
        failures=failures,
        plots=plots,
    )
