"""Accuracy of a head on several taps of a convolutional network, from one forward pass.

    python benchmarks/tap_accuracy.py --model vgg16 --dataset tf_flowers --data-dir DIR

Each cell is the accuracy on the first held-out images, mean and standard deviation over three
seeds, of the same head as that of `vgg-transfer finetune --model MODEL --dataset NAME --data-dir
DIR --shots-per-class N --seed S --tap TAP`. The features of all images that some subset contains
are computed once; a run of the command would compute them for each TAP.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from tabulate import tabulate

from transfer import Backbone, Features, extract_features, load_meta_graph, open_source
from transfer.data.dataset import few_shot
from transfer.training.ridge import fit_ridge

SEEDS = range(3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--held-out", type=int, default=400, help="number of held-out images")
    parser.add_argument("--shots", nargs="+", type=int, default=[5, 20, 80])
    parser.add_argument("--taps", nargs="+", default=["pool5", "block5", "all"])
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    graph = load_meta_graph(options.model)
    activations = [*Backbone(graph, tap="all").network.taps]
    last = graph.card.tap.removesuffix(":0")
    backbone = Backbone(graph, tap=[*dict.fromkeys([*activations, last])], pooling="avg_max")
    train, held_out = open_source(
        options.dataset, data_dir=options.data_dir
    ).train_and_eval_splits()
    positions = {name: position for position, name in enumerate(train.names)}
    subsets = {
        (shots, seed): [positions[name] for name in few_shot(train, shots, seed).names]
        for shots in options.shots
        for seed in SEEDS
    }
    used = np.zeros(len(train), bool)
    used[np.concatenate([*subsets.values()])] = True
    row_of = np.cumsum(used) - 1
    train, held_out = train.where(used), held_out.where(np.arange(len(held_out)) < options.held_out)
    print(f"{len(train)} training and {len(held_out)} held-out images", flush=True)
    start = time.perf_counter()
    known, unseen = (
        extract_features(backbone, split, cache_dir=options.cache_dir)
        for split in (train, held_out)
    )
    print(f"features in {time.perf_counter() - start:.0f} s", flush=True)

    def columns(table: Features, tap: str) -> np.ndarray:
        """The features that `--tap TAP` has; those of one tensor are averages, then maxima."""
        if tap == "all":
            return np.concatenate([table.of(name) for name in activations], axis=-1)
        chosen = tap.split(",")
        if tap == "block5":  # short for the activations of the last block and the last pooling
            chosen = [name for name in table.taps if name.startswith("conv5_") or name == last]
        return np.concatenate([np.hsplit(table.of(name), 2)[0] for name in chosen], axis=-1)

    lines = []
    for shots in options.shots:
        line = [str(shots)]
        for tap in options.taps:
            scores = []
            for seed in SEEDS:
                rows = row_of[subsets[shots, seed]]
                solution = fit_ridge(
                    columns(known, tap)[rows], known.labels[rows], len(known.class_names)
                )
                logits = columns(unseen, tap) @ solution.kernel + solution.bias
                scores.append(float((logits.argmax(-1) == unseen.labels).mean()))
            line.append(f"{statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f}")
        lines.append(line)
    print(tabulate(lines, ["per class", *options.taps], tablefmt="github"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
