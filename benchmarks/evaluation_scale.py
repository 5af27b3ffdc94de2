"""Time, memory and file sizes of an evaluation with many images and classes, after the logits.

    python benchmarks/evaluation_scale.py [--images 50000] [--classes 1000] [--out DIR]

The logits are synthetic: classes come in groups of ten, within which a classifier confuses them.
Memory is the peak of the process so far; the first row is that before the evaluation, with
TensorFlow, a classifier and the logits. ``--out`` keeps the files, to look at the report.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image
from tabulate import tabulate

from transfer import Backbone, Classifier, Head, Preprocess, load_meta_graph
from transfer.core.measurement import peak_rss_mb, versions
from transfer.data.dataset import Source, Split
from transfer.evaluation import report, scoring, tables
from transfer.evaluation.report import Evaluated, RunSummary
from transfer.runs import run_folder

GROUP = 10  # classes


def synthetic(num_images: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of a classifier that is right for about two thirds of the images."""
    generator = np.random.default_rng(0)
    group_of = generator.permutation(num_classes) // GROUP  # neighbours are not similar
    labels = generator.permutation(np.arange(num_images) % num_classes)
    logits = generator.standard_normal((num_images, num_classes), np.float32)
    for start in range(0, num_images, 1024):
        rows = slice(start, start + 1024)
        logits[rows] += 5 * (group_of == group_of[labels[rows], None])
    logits[np.arange(num_images), labels] += 2.5
    return logits, labels


def images_of(labels: np.ndarray, num_classes: int) -> Split:
    """Images that are made when they are read, one colour per class."""

    def file(position: int) -> bytes:
        generator = np.random.default_rng([int(labels[position]), 1])
        pixels = generator.integers(0, 255, (1, 1, 3)) + generator.integers(-60, 60, (4, 4, 3))
        small = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        data = io.BytesIO()
        small.resize((64, 64), Image.Resampling.BICUBIC).save(data, "PNG")
        return data.getvalue()

    def name(position: int) -> str:
        return f"photos/{position:06d}.png"

    def examples(_: str, positions: np.ndarray) -> tf.data.Dataset:
        columns = {
            "image": [file(position) for position in positions],
            "label": labels[positions],
            "name": [name(position) for position in positions],
        }
        return tf.data.Dataset.from_tensor_slices(columns)

    source = Source(
        name="synthetic",
        class_names=[f"class {number:04d}" for number in range(num_classes)],
        sizes={"test": len(labels)},
        examples=examples,
        labels=lambda _: labels,
        names=lambda _: [name(position) for position in range(len(labels))],
        ids=lambda _: np.arange(len(labels)).astype("S16"),
    )
    return source.split("test")


def classifier_of(split: Split) -> Classifier:
    """A classifier of these classes, for the heat maps of the report."""
    graph = load_meta_graph("embedded")
    preprocess = Preprocess(graph.card.preprocess, graph.card.image_size)
    class_names = split.source.class_names
    classifier = Classifier(Backbone(graph), Head(len(class_names)), preprocess, class_names)
    classifier.build_from_size()
    return classifier


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logits, labels = synthetic(options.images, options.classes)
    split = images_of(labels, options.classes)
    classifier, class_names = classifier_of(split), split.source.class_names
    rows = [["before", "", f"{peak_rss_mb():,.0f}", ""]]
    start = time.perf_counter()

    def measured(work: str, function: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.perf_counter()
        result = function(*arguments)
        seconds = time.perf_counter() - begun
        path = out / work
        size = f"{path.stat().st_size / 1e6:,.2f}" if path.is_file() else ""
        rows.append([work, f"{seconds:.1f}", f"{peak_rss_mb():,.0f}", size])
        return result

    with contextlib.ExitStack() as stack:
        out = options.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        out.mkdir(parents=True, exist_ok=True)
        results = measured("metrics", scoring.measure, classifier, split, logits, labels)
        measured("evaluation.json", run_folder.write_json, out / "evaluation.json", results)
        evaluated = Evaluated(classifier, split, logits, labels, results)
        summary = RunSummary("synthetic", "embedded", "fc7", {}, {}, versions(), None, [])
        measured(
            "predictions.csv",
            lambda path: tables.write_predictions(
                path, split.names, class_names, logits, labels, evaluated.scores
            ),
            out / "predictions.csv",
        )
        measured(
            "confusion.csv",
            lambda path: tables.write_confusion(path, class_names, evaluated.confusion),
            out / "confusion.csv",
        )
        measured("report.html", report.write, out, evaluated, summary)
        rows.append(["all", f"{time.perf_counter() - start:.1f}", f"{peak_rss_mb():,.0f}", ""])
        measured("probabilities.npy", tables.write_probabilities, out / "probabilities.npy", logits)
    headers = ["", "seconds", "peak memory, MB", "file, MB"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
