"""Precision and recall of the labels that ``check-data`` lists, on planted label errors.

    python benchmarks/label_noise.py --data-dir DIR

DIR contains the prepared tfds datasets ``tf_flowers`` and ``cmaterdb/telugu``; ``digits`` is
embedded. For each seed, 1,360 images are drawn with equal numbers per class, and 20 of their labels
are replaced by random other classes. The datasets have label errors of their own, which count as
false positives.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from tabulate import tabulate

from transfer import Backbone, extract_features, load_meta_graph, open_source
from transfer.data.label_errors import find_label_errors

DATASETS = ("digits", "tf_flowers", "cmaterdb/telugu")


def planted(
    labels: np.ndarray, num_images: int, num_flips: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of the images drawn, their labels with errors, and the positions of the errors
    among the images drawn."""
    generator = np.random.default_rng(seed)
    num_classes = int(labels.max()) + 1
    chosen = np.concatenate(
        [
            generator.permutation(np.flatnonzero(labels == label))[: num_images // num_classes]
            for label in range(num_classes)
        ]
    )
    given = labels[chosen].copy()
    flips = generator.choice(len(given), num_flips, replace=False)
    given[flips] = (given[flips] + generator.integers(1, num_classes, num_flips)) % num_classes
    return chosen, given, flips


def measure(
    features: np.ndarray, labels: np.ndarray, options: argparse.Namespace, num_flips: int
) -> list[float]:
    """Means over the seeds: number listed, expected errors, precision, recall, hits among the
    first 20 and correct suggestions."""
    rows = []
    for seed in range(options.seeds):
        chosen, given, flips = planted(labels, options.images, num_flips, seed)
        errors = find_label_errors(features[chosen], given)
        is_hit = np.isin(errors.positions, flips)
        is_true = errors.suggestions == labels[chosen][errors.positions]
        rows.append(
            [
                len(is_hit),
                errors.num_expected,
                is_hit.mean() if len(is_hit) else np.nan,
                is_hit.sum() / num_flips if num_flips else np.nan,
                is_hit[:20].sum(),
                is_true[is_hit].mean() if is_hit.any() else np.nan,
            ]
        )
    return np.mean(rows, axis=0).tolist()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--datasets", nargs="+", default=DATASETS)
    parser.add_argument("--images", type=int, default=1360)
    parser.add_argument("--flips", type=int, nargs="+", default=[0, 20])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    backbone = Backbone(load_meta_graph(options.model))
    lines = []
    for name in options.datasets:
        data_dir = None if name == "digits" else options.data_dir
        features = extract_features(backbone, open_source(name, data_dir=data_dir).split("train"))
        for num_flips in options.flips:
            row = measure(features.values, features.labels, options, num_flips)
            lines.append([name, num_flips, *row])
    header = ["dataset", "planted", "listed", "expected", "precision", "recall", "in first 20"]
    formats = ("", "", ".1f", ".1f", ".2f", ".2f", ".1f", ".2f")
    print(tabulate(lines, [*header, "suggestion right"], tablefmt="github", floatfmt=formats))
    return 0


if __name__ == "__main__":
    sys.exit(main())
