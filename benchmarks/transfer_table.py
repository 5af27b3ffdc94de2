"""Transfer accuracy of the embedded model by dataset, images per class and cut.

    python benchmarks/transfer_table.py --data-dir DIR --out runs/transfer

DIR contains the prepared tfds datasets ``tf_flowers`` and ``cmaterdb/telugu``; ``digits`` is
embedded. Each cell is the mean and standard deviation over three seeds, which determine the
few-shot subset, the initial head and the order of the images. Finished runs are not repeated.
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
ROWS = {
    "frozen": ["--freeze-until", "fc7"],
    "frozen, lbfgs": ["--freeze-until", "fc7", "--solver", "lbfgs"],
    "from pool5": ["--freeze-until", "pool5"],
    "full": ["--freeze-until", "none"],
    "scratch": ["--freeze-until", "none", "--random-weights"],
}
SEEDS = range(3)


def accuracy(out: Path, flags: list[str]) -> float:
    """Accuracy of one run, which is executed unless it is already finished."""
    path = out / "metrics.json"
    if not path.is_file():
        status = vgg_transfer(["finetune", *flags, "--out", str(out), "--resume"])
        if status:
            raise SystemExit(status)
    return json.loads(path.read_text())["eval"]["accuracy"]


def cell(options: argparse.Namespace, dataset: str, shots: str, row: str) -> str:
    accuracies = []
    for seed in SEEDS:
        flags = ["--model", options.model, "--dataset", dataset, "--seed", str(seed), *ROWS[row]]
        if dataset != "digits":
            flags += ["--data-dir", str(options.data_dir)]
        if shots != "all":
            flags += ["--shots-per-class", shots]
        words = (dataset.replace("/", "-"), shots, row.replace(", ", "-"), str(seed))
        accuracies.append(accuracy(options.out / "-".join(words).replace(" ", "-"), flags))
    return f"{statistics.mean(accuracies):.3f} ± {statistics.stdev(accuracies):.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--datasets", nargs="+", default=DATASETS, choices=DATASETS)
    parser.add_argument("--shots", nargs="+", default=SHOTS, choices=SHOTS)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    lines = []
    for dataset in options.datasets:
        for shots in options.shots:
            cells = [cell(options, dataset, shots, row) for row in options.rows]
            lines.append([dataset, shots, *cells])
    print(tabulate(lines, ["dataset", "per class", *options.rows], tablefmt="github"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
