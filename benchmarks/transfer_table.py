"""Transfer accuracy of the embedded model by dataset, images per class and what is trained.

    python benchmarks/transfer_table.py --data-dir DIR --out runs/transfer

DIR contains the prepared tfds datasets ``tf_flowers`` and ``cmaterdb/telugu``; ``digits`` is
embedded. Each cell is the mean and standard deviation over three seeds, which determine the
few-shot subset, the initial head and the order of the images. Finished runs are not repeated.
``--metrics accuracy loss calibration_error`` prints a table for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from tabulate import tabulate

from recipes.cli import main as vgg_transfer

DATASETS = ("digits", "tf_flowers", "cmaterdb/telugu")
SHOTS = ("5", "20", "all")
METRICS = ("accuracy", "loss", "calibration_error")
ROWS = {
    "frozen": ["--freeze-until", "fc7", "--solver", "gradient"],
    "frozen, ridge": ["--freeze-until", "fc7", "--solver", "ridge"],
    "all layers": ["--tap", "all", "--solver", "ridge"],
    "frozen, lbfgs": ["--freeze-until", "fc7", "--solver", "lbfgs"],
    "from pool5": ["--freeze-until", "pool5"],
    "full": ["--freeze-until", "none"],
    "LP-FT": ["--freeze-until", "none", "--head-start", "ridge"],
    "scratch": ["--freeze-until", "none", "--random-weights"],
}
SEEDS = range(3)


def value(metric: str, out: Path, flags: list[str]) -> float:
    """A metric of one run, which is executed unless it is already finished."""
    if not (out / "metrics.json").is_file():
        _run(["finetune", *flags, "--out", str(out), "--resume"])
    found = json.loads((out / "metrics.json").read_text())["eval"]
    if metric not in found:  # only evaluate computes it
        if not (out / "evaluation.json").is_file():
            _run(["evaluate", str(out)])
        found = json.loads((out / "evaluation.json").read_text())
    return found[metric]


def _run(words: list[str]) -> None:
    if status := vgg_transfer(words):
        raise SystemExit(status)


def cell(options: argparse.Namespace, metric: str, dataset: str, shots: str, row: str) -> str:
    values = []
    for seed in SEEDS:
        flags = ["--model", options.model, "--dataset", dataset, "--seed", str(seed), *ROWS[row]]
        if dataset != "digits":
            flags += ["--data-dir", str(options.data_dir)]
        if shots != "all":
            flags += ["--shots-per-class", shots]
        words = (dataset.replace("/", "-"), shots, row.replace(", ", "-"), str(seed))
        values.append(value(metric, options.out / "-".join(words).replace(" ", "-"), flags))
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--datasets", nargs="+", default=DATASETS, choices=DATASETS)
    parser.add_argument("--shots", nargs="+", default=SHOTS, choices=SHOTS)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--metrics", nargs="+", default=METRICS[:1], choices=METRICS)
    options = parser.parse_args()
    for metric in options.metrics:
        lines = []
        for dataset in options.datasets:
            for shots in options.shots:
                cells = [cell(options, metric, dataset, shots, row) for row in options.rows]
                lines.append([dataset, shots, *cells])
        print(f"{metric}\n")
        print(tabulate(lines, ["dataset", "per class", *options.rows], tablefmt="github"), "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
