"""What ``vgg-transfer export`` does; its flags are in ``recipes.export``."""

from __future__ import annotations

import importlib.util
import os
import re
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

from recipes.export import ExportConfig
from transfer import Card, Classifier
from transfer.core import measurement
from transfer.core.files import (
    draft_folder,
    refuse_link,
    remove_drafts,
    remove_folder,
    write_names,
)
from transfer.data.dataset import Split
from transfer.exports import meta_graph, onnx, readmes, saved_model, tflite
from transfer.images.decoding import is_for_tensorflow, read_image
from transfer.images.preprocess import to_channels
from transfer.runs import run_data, run_folder

tf1 = tf.compat.v1

EXPORTS = "export"
FIGURES = "export.json"
# Largest difference of a probability.
_TOLERANCES = {"tflite float16": 0.02, "tflite int8": 0.3}
_TOLERANCE = 1e-4
# Labels must be the same where the two most probable classes are so far apart.
_CLEAR = 0.1
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
        ValueError: if a format is unknown, or an export cannot be made or gives other results than
            the model; the others are there all the same.
    """
    formats = _formats(config)
    for name in ("num_images", "num_examples"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if config.out is None:
        refuse_link(folder / EXPORTS)
    out = (config.out or folder / EXPORTS).resolve()
    classifier = Classifier.load(folder / run_folder.MODEL)
    source = run_data.open_data(folder)
    held_out = run_data.held_out(folder, source)
    others = run_data.trained_on(folder, source)
    files = list(map(_for_tensorflow, _files(run_data.some(held_out, config.num_images))))
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
    figures = _figures(out) | {"num_images": len(files), "images_per_s": rate}
    figures |= {"versions": measurement.versions()}
    for name in formats:
        _check_ours(out / name, figures)
    failures = []
    for name in formats:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            found, failed = _export(job, name, out, expected)
        except (ValueError, tf.errors.OpError) as error:
            found, failed = {}, [f"{name}: {' '.join(str(error).split())[:300]}"]
        failures += failed
        kept = {k: v for k, v in figures["exports"].items() if k.split()[0] != name}
        figures["exports"] = kept | found
        run_folder.write_json(out / FIGURES, figures)
    if failures:
        raise ValueError("; ".join(failures))
    return figures, out


def _figures(out: Path) -> dict[str, Any]:
    """Those of earlier exports to the same folder."""
    path = out / FIGURES
    return run_folder.read_json(path) if path.is_file() else {"exports": {}}


def _check_ours(folder: Path, figures: dict[str, Any]) -> None:
    """Raises:
    FileExistsError: if there is something that is not part of an earlier export."""
    if not os.path.lexists(folder):
        return
    is_listed = any(k.split()[0] == folder.name for k in figures["exports"])
    if not is_listed or folder.is_symlink() or not folder.is_dir():
        raise FileExistsError(
            f"{str(folder)!r} is there already and is no export of this command; choose another "
            "--out"
        )
    for path in folder.rglob("*"):
        is_known = _WRITTEN[folder.name].fullmatch(path.relative_to(folder).as_posix())
        if path.is_symlink() or not (path.is_dir() or is_known):
            raise FileExistsError(
                f"{str(path)!r} is not part of an export, and would be deleted with the export "
                "that is there; move it away, or choose another --out"
            )


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


def _export(
    job: Job, name: str, out: Path, expected: np.ndarray
) -> tuple[dict[str, Any], list[str]]:
    """Write a format to its folder: the files of it that give what is expected. Returns their
    figures, and what is wrong with the others."""
    folder = out / name
    out.mkdir(parents=True, exist_ok=True)
    remove_drafts(out, _WRITTEN[name])
    with draft_folder(out) as draft:
        figures, failures = {}, []
        for kind, path, predict in _FORMATS[name](job, draft):
            found, rate = _timed(predict, job.pixels)
            compared = _compare(found, expected)
            if wrong := _what_is_wrong(kind, compared):
                failures.append(wrong)
                _remove(path)
                continue
            figures[kind] = compared | {"images_per_s": rate, "megabytes": _megabytes(path)}
        if not figures:
            return {}, failures
        run_folder.write_text(
            draft / "README.md", readmes.text(name, job.prefix, job.classifier, figures)
        )
        remove_folder(folder, _WRITTEN[name])
        draft.rename(folder)
    return figures, failures


def _compare(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Of probabilities ``[num_images, num_classes]``."""
    same = found.argmax(-1) == expected.argmax(-1)
    second, first = np.sort(expected, axis=-1)[:, -2:].T
    clear = first - second > _CLEAR
    return {
        "max_difference": float(np.max(np.abs(found - expected))),
        "same_label": float(np.mean(same)),
        "same_label_where_clear": float(np.mean(same[clear])) if clear.any() else 1.0,
    }


def _what_is_wrong(kind: str, compared: dict[str, float]) -> str | None:
    difference, same = compared["max_difference"], compared["same_label_where_clear"]
    tolerance = _TOLERANCES.get(kind, _TOLERANCE)
    if difference <= tolerance and same >= _SAME_LABELS:
        return None
    return (
        f"{kind} gives other results than the model: probabilities differ by up to "
        f"{difference:.2g} (expected at most {tolerance:g}), {same:.1%} of the clear labels are "
        f"the same (expected {_SAME_LABELS:.0%}); it was not kept"
    )


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


Exported = Iterator[tuple[str, Path, Callable[[np.ndarray], np.ndarray]]]
"""What was written: kind, file or folder, and what predicts with it, from resized pixels."""


def _meta_graph(job: Job, folder: Path) -> Exported:
    card = meta_graph.save_with_preprocessing(job.prefix, folder / "model")
    batch_size = job.classifier.backbone.network.batch_size
    yield "meta_graph", folder, _session(folder / "model", card, batch_size)


def _session(
    prefix: Path, card: Card, batch_size: int | None
) -> Callable[[np.ndarray], np.ndarray]:
    """What a TF1 program does; where the graph has a batch of one size, it fills the last one."""
    with tf.Graph().as_default():
        session = tf1.Session()
        tf1.train.import_meta_graph(f"{prefix}.meta").restore(session, str(prefix))

    def predict(pixels: np.ndarray) -> np.ndarray:
        size = batch_size or len(pixels)
        filled = np.resize(pixels, (-(-len(pixels) // size) * size, *pixels.shape[1:]))
        batches = np.split(filled, len(filled) // size)
        outputs = [session.run(card.outputs["probabilities"], {card.input: b}) for b in batches]
        return np.concatenate(outputs)[: len(pixels)]

    return predict


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
    if job.classifier.backbone.network.batch_size is not None:
        raise ValueError(
            "the network takes batches of one size only, which its ONNX model would not fill; "
            "export it as saved_model"
        )
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


_README = r"README\.md"
_LABELS = r"labels\.txt"
_DATA = r"data-\d{5}-of-\d{5}"
_WRITTEN = {
    "meta_graph": re.compile(rf"checkpoint|model\.(meta|json|index|{_DATA})|{_LABELS}|{_README}"),
    "saved_model": re.compile(
        rf"1/((saved_model|fingerprint)\.pb|variables/variables\.(index|{_DATA}))|{_README}"
    ),
    "tflite": re.compile(rf"model_[a-z0-9]+\.tflite|{_LABELS}|{_README}"),
    "onnx": re.compile(rf"model\.onnx(\.data)?|{_LABELS}|{_README}"),
}
"""Paths of what an export writes, in its folder."""


def _write_labels(job: Job, folder: Path) -> None:
    write_names(folder / run_folder.LABELS, job.classifier.labels)


def _files(split: Split) -> list[bytes]:
    return [example["image"].numpy() for example in split.encoded()]


def _resized(classifier: Classifier, file: bytes) -> np.ndarray:
    preprocess = classifier.preprocess
    return preprocess.resize(to_channels(read_image(file), preprocess.channels)).numpy()


def _for_tensorflow(file: bytes) -> bytes:
    """The same picture as a file that a SavedModel decodes."""
    if is_for_tensorflow(file):
        return file
    return tf.io.encode_png(read_image(file)).numpy()


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
