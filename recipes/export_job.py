"""What ``vgg-transfer export`` does; its flags are in ``recipes.export``."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from recipes import export_readmes, measure, run_data, run_folder
from recipes.export import ExportConfig
from transfer import Card, Classifier
from transfer.data import Split
from transfer.exports import meta_graph, onnx, saved_model, tflite
from transfer.images import decode
from transfer.preprocess import to_channels

tf1 = tf.compat.v1

EXPORTS = "export"
FIGURES = "export.json"
# Largest difference of a probability. Of int8 the labels count.
_TOLERANCES = {"tflite float16": 0.02, "tflite int8": 1.0}
_TOLERANCE = 1e-4
_SAME_LABELS = 0.9


@dataclass(frozen=True)
class Job:
    """A run's model, and images to compare on: files, and pixels ``[size, size, channels]``
    float32."""

    prefix: Path
    classifier: Classifier
    files: list[bytes]
    pixels: np.ndarray
    examples: Callable[[], Iterator[np.ndarray]]


def run(folder: Path, config: ExportConfig) -> tuple[dict[str, Any], Path]:
    """Export, compare, and return the figures and the folder of the exports.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
        ImportError: if a format needs what is not installed.
        ValueError: if a format is unknown, or an export gives other results than the model.
    """
    formats = _formats(config)
    for name in ("num_images", "num_examples"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    out = (config.out or folder / EXPORTS).resolve()
    classifier = Classifier.load(folder / run_folder.MODEL)
    source = run_data.open_data(folder)
    held_out = run_data.held_out(folder, source)
    others = source.split("+".join(source.split_names)).without(held_out)
    files = _files(run_data.some(held_out, config.num_images))
    job = Job(
        folder / run_folder.MODEL,
        classifier,
        files,
        np.stack([_resized(classifier, file) for file in files]),
        lambda: (
            _resized(classifier, file)[None]
            for file in _files(run_data.some(others, config.num_examples))
        ),
    )
    live = partial(_in_one_batch, classifier.probabilities_of_resized)
    expected, rate = _timed(live, job.pixels)
    figures: dict[str, Any] = {"num_images": len(files), "images_per_s": rate, "exports": {}}
    figures["versions"] = measure.versions()
    for name in formats:
        print(f"{name} ...", file=sys.stderr, flush=True)
        figures["exports"] |= _export(job, name, out, expected)
        run_folder.write_json(out / FIGURES, figures)
    return figures, out


def _formats(config: ExportConfig) -> list[str]:
    if config.format is None:
        has_onnx = all(map(importlib.util.find_spec, ("tf2onnx", "onnxruntime")))
        return [name for name in _FORMATS if name != "onnx" or has_onnx]
    names = config.format.split(",")
    if unknown := [name for name in names if name not in _FORMATS]:
        raise ValueError(
            f"--format {config.format}: {unknown[0]!r} is unknown; choose from "
            f"{', '.join(_FORMATS)}, with commas between"
        )
    if "onnx" in names:
        onnx.check_installed()
    return names


def _export(job: Job, name: str, out: Path, expected: np.ndarray) -> dict[str, Any]:
    """Write a format to its folder, if it gives what is expected; returns the figures."""
    draft, folder = out / f".{name}.tmp", out / name
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        figures = {}
        for kind, path, predict in _FORMATS[name](job, draft):
            found, rate = _timed(predict, job.pixels)
            figures[kind] = _compare(kind, found, expected) | {
                "images_per_s": rate,
                "megabytes": _megabytes(path),
            }
        run_folder.write_text(
            draft / "README.md", export_readmes.text(name, job.prefix, job.classifier, figures)
        )
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return figures


def _compare(kind: str, found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Raises:
    ValueError: if the two differ by more than they may."""
    difference = float(np.max(np.abs(found - expected)))
    same = float(np.mean(found.argmax(-1) == expected.argmax(-1)))
    tolerance = _TOLERANCES.get(kind, _TOLERANCE)
    # Where two classes are equally probable, either is right.
    if not difference <= tolerance or (tolerance == 1 and same < _SAME_LABELS):
        raise ValueError(
            f"{kind} gives other results than the model: probabilities differ by up to "
            f"{difference:.2g} (expected at most {tolerance:g}), {same:.1%} of the labels are the "
            "same; it was not kept"
        )
    return {"max_difference": difference, "same_label": same}


Exported = Iterator[tuple[str, Path, Callable[[np.ndarray], np.ndarray]]]
"""What was written: kind, file or folder, and what predicts with it, from resized pixels."""


def _meta_graph(job: Job, folder: Path) -> Exported:
    card = meta_graph.save_with_preprocessing(job.prefix, folder / "model")
    yield "meta_graph", folder, _session(folder / "model", card)


def _session(prefix: Path, card: Card) -> Callable[[np.ndarray], np.ndarray]:
    """What a TF1 program does."""
    with tf.Graph().as_default():
        session = tf1.Session()
        tf1.train.import_meta_graph(f"{prefix}.meta").restore(session, str(prefix))
    return lambda pixels: session.run(card.outputs["probabilities"], {card.input: pixels})


def _saved_model(job: Job, folder: Path) -> Exported:
    # TensorFlow Serving looks for versions in folders with numbers.
    saved_model.save(job.classifier, folder / "1")
    predict = saved_model.load(folder / "1")
    yield "saved_model", folder / "1", lambda _: predict(job.files)


def _tflite(job: Job, folder: Path) -> Exported:
    _write_labels(job, folder)
    for precision in tflite.PRECISIONS:
        path = folder / f"model_{precision}.tflite"
        path.write_bytes(tflite.convert(job.classifier, precision, job.examples()))
        yield f"tflite {precision}", path, tflite.load(path)


def _onnx(job: Job, folder: Path) -> Exported:
    _write_labels(job, folder)
    path = folder / "model.onnx"
    onnx.save(job.classifier, path)
    yield "onnx", path, onnx.load(path)


_FORMATS: dict[str, Callable[[Job, Path], Exported]] = {
    "meta_graph": _meta_graph,
    "saved_model": _saved_model,
    "tflite": _tflite,
    "onnx": _onnx,
}


def _write_labels(job: Job, folder: Path) -> None:
    lines = "".join(f"{name}\n" for name in job.classifier.labels)
    run_folder.write_text(folder / run_folder.LABELS, lines)


def _files(split: Split) -> list[bytes]:
    return [example["image"].numpy() for example in split.encoded()]


def _resized(classifier: Classifier, file: bytes) -> np.ndarray:
    preprocess = classifier.preprocess
    return preprocess.resize(to_channels(decode(tf.constant(file)), preprocess.channels)).numpy()


def _in_one_batch(function: Callable[[Any], Any], pixels: np.ndarray) -> np.ndarray:
    return np.asarray(function(tf.constant(pixels)))


def _timed(
    predict: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray
) -> tuple[np.ndarray, float]:
    """Probabilities, and images per second; the first run prepares things and does not count."""
    predict(pixels)
    start = time.perf_counter()
    found = predict(pixels)
    return found, len(pixels) / (time.perf_counter() - start)


def _megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6
