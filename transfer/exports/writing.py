"""Exports a classifier to formats for other programs, each in its own folder, and verifies them."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from transfer.core import measurement
from transfer.core.files import (
    draft_folder,
    draft_path,
    locked_folder,
    refuse_link,
    remove_drafts,
    write_names,
)
from transfer.data.dataset import Split
from transfer.exports import (
    keras_file,
    meta_graph,
    onnx,
    readmes,
    saved_model,
    tflite,
    verification,
)
from transfer.exports.verification import Samples
from transfer.layers.classifier import Classifier
from transfer.models.card import Card
from transfer.runs import run_data, run_folder

logger = logging.getLogger(__name__)

tf1 = tf.compat.v1

EXPORTS = "export"
METRICS = "export.json"


def export(
    classifier: Classifier,
    out: str | Path,
    *,
    formats: Sequence[str] | None = None,
    images: Split | None = None,
    calibration: Split | None = None,
    num_images: int = 32,
    num_examples: int = 100,
    name: str | None = None,
) -> dict[str, Any]:
    """Export a classifier to formats that other programs can load, and verify the exports.

    Each format is written to its own folder in ``out``, with a README that has runnable code:

    * ``meta_graph``: meta graph and checkpoint with preprocessing in the graph, for TensorFlow 1;
    * ``saved_model``: takes encoded image files or pixels, for TensorFlow Serving;
    * ``tflite``: float32, float16 and, given images, int8;
    * ``onnx``: needs ``pip install 'vgg-transfer[onnx]'``;
    * ``keras``: stock layers, for ``keras.models.load_model`` on TensorFlow, JAX and PyTorch,
      without this package.

    Each export is loaded with its target runtime and compared with the classifier. A file with
    different probabilities is not kept; the others are.

    Args:
        classifier: the classifier to export, e.g. that of a ``FineTuneResult``. For ``meta_graph``,
            it must have a ``Head``, or be from ``Classifier.load`` or ``Classifier.from_model``.
        out: output folder. Earlier exports of other formats in it are kept.
        formats: names from the list above. Default: all; ``onnx`` only if it is installed.
        images: labelled images for the comparison; a split from ``open_source``. Without them the
            exports are compared on a few synthetic images, and there is no int8 model.
        calibration: calibration images for int8 quantization, preferably training images. Default:
            ``images``.
        num_images: number of ``images`` for the comparison.
        num_examples: number of ``calibration`` images.
        name: title of the READMEs. Default: the classifier's name.

    Returns:
        The content of ``export.json`` in ``out``: ``exports`` has ``max_difference`` (maximum
        absolute difference of a probability), ``same_label`` (fraction of images, 0..1),
        ``images_per_s`` and ``megabytes`` per format; the outer ``images_per_s`` is that of the
        classifier. ``max_difference_of_files`` is the maximum absolute difference of a probability
        where the code in the READMEs decodes and resizes the images, with Pillow.

    Raises:
        BlockingIOError: if another process exports to ``out``.
        FileExistsError: if a format's folder holds anything other than an earlier export.
        ImportError: if ``onnx`` is requested and not installed.
        ValueError: if a format is unknown, or an export fails or gives different results than the
            classifier; the other exports are written nevertheless.

    Example:
        >>> from transfer import Backbone, Classifier, Head, Preprocess, export
        >>> backbone, head = Backbone("pretrained/vgg_small"), Head(2)
        >>> classifier = Classifier(backbone, head, Preprocess("torch", 64), ["cat", "dog"])
        >>> num_logits = classifier.build_from_size()
        >>> metrics = export(classifier, "out", formats=["keras", "saved_model"])
        >>> metrics["exports"]["keras"]["same_label"]
        1.0
    """
    names = _formats(formats)
    _check_counts(num_images, num_examples)
    if images is None:
        samples = verification.synthetic(classifier)
    else:
        files = verification.files_of(images, num_images)
        samples = verification.samples_of(classifier, files, "labelled images")
    examples = images if calibration is None else calibration
    context = _ExportContext(classifier, samples, _examples(classifier, examples, num_examples))
    return _export_all(context, names, Path(out).resolve(), name or classifier.name)


def export_run(
    run: str | Path,
    out: str | Path | None = None,
    *,
    formats: Sequence[str] | None = None,
    num_images: int = 32,
    num_examples: int = 100,
) -> tuple[dict[str, Any], Path]:
    """Export the model of a run, with held-out images for the comparison and training images for
    the int8 calibration. If they cannot be opened, e.g. because they were moved, the exports are
    compared on synthetic images, there is no int8 model, and a warning says so.

    Args:
        run: a run folder.
        out: output folder. Default: ``export`` in the run folder.
        formats: see ``export``.
        num_images: number of held-out images for the comparison.
        num_examples: number of calibration images for int8 quantization.

    Returns:
        The result of ``export``, and the output folder.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
        BlockingIOError, FileExistsError, ImportError, ValueError: see ``export``.
    """
    names, run = _formats(formats), Path(run)
    _check_counts(num_images, num_examples)
    if out is None:
        refuse_link(run / EXPORTS)
    folder = Path(out or run / EXPORTS).resolve()
    _check_is_run(run)
    classifier = Classifier.load(run / run_folder.MODEL)
    images = _images_of(run, names)
    if images is None:
        samples, examples = verification.synthetic(classifier), None
    else:
        train, held_out = images
        files = verification.files_of(held_out, num_images)
        samples = verification.samples_of(classifier, files, "images that were not trained on")
        examples = _examples(classifier, train, num_examples)
    context = _ExportContext(classifier, samples, examples)
    return _export_all(context, names, folder, run.resolve().name), folder


def _check_is_run(run: Path) -> None:
    """Refuse a path that is not a run folder.

    Raises:
        FileNotFoundError: if it is none; names the run folder for the prefix of its model.
    """
    if run.name == run_folder.MODEL and (run.parent / run_folder.CONFIG).is_file():
        raise FileNotFoundError(
            f"{str(run)!r} is the model in the run folder {str(run.parent)!r}; name that folder"
        )
    run_folder.read_config(run)


def _images_of(run: Path, formats: Sequence[str]) -> tuple[Split, Split] | None:
    """Training and held-out images of a run, ``None`` if they cannot be opened."""
    gone: list[str] = []
    try:
        source = run_data.open_data(run)
        held_out = run_data.held_out(run, source, gone)
        train = run_data.trained_on(run, source, [])
        if not (len(train) and len(held_out)):
            raise ValueError(f"the images of the run in {str(run)!r} are gone")
    except (OSError, ValueError) as error:
        no_int8 = (
            " There is no int8 TFLite model: it is calibrated with the training images."
            if "tflite" in formats
            else ""
        )
        logger.warning(
            f"{error}. The exports are compared with the model on synthetic images instead."
            f"{no_int8}"
        )
        return None
    if gone:
        logger.warning(
            f"{len(gone)} of the images that the run held out are gone, such as {gone[0]!r}; the "
            "exports are compared with the model on others of them"
        )
    return train, held_out


@dataclass(frozen=True)
class _ExportContext:
    """What to export. ``examples`` calibrate the int8 model: pixels ``[1, height, width,
    channels]`` each; ``None`` skips it."""

    classifier: Classifier
    samples: Samples
    examples: Callable[[], Iterator[np.ndarray]] | None


def _examples(
    classifier: Classifier, split: Split | None, count: int
) -> Callable[[], Iterator[np.ndarray]] | None:
    if split is None:
        return None
    return lambda: (
        verification.resized(classifier, file)[None] for file in verification.files_of(split, count)
    )


def _formats(names: Sequence[str] | None) -> list[str]:
    if names is None:
        has_onnx = all(map(importlib.util.find_spec, ("tf2onnx", "onnxruntime")))
        return [name for name in _FORMATS if name != "onnx" or has_onnx]
    names = names.split(",") if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in _FORMATS]:
        raise ValueError(
            f"formats={','.join(map(str, names))}: {unknown[0]!r} is unknown; choose from "
            f"{', '.join(_FORMATS)}, with commas between"
        )
    if "onnx" in names:
        onnx.check_installed()
    return names


def _check_counts(num_images: int, num_examples: int) -> None:
    for name, count in (("num_images", num_images), ("num_examples", num_examples)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _export_all(context: _ExportContext, names: list[str], out: Path, title: str) -> dict[str, Any]:
    predict = partial(_in_one_batch, context.classifier.probabilities_of_resized)
    out.mkdir(parents=True, exist_ok=True)
    with locked_folder(out):
        expected, rate = verification.timed(predict, context.samples.pixels)
        metrics = _earlier(out) | {"num_images": len(context.samples.files), "images_per_s": rate}
        metrics["max_difference_of_files"] = verification.prepared_difference(
            context.classifier, context.samples, expected
        )
        metrics |= {"versions": measurement.versions()}
        for name in names:
            _check_ours(out / name, metrics)
        run_folder.write_json(out / METRICS, metrics)
        failures = []
        for name in names:
            logger.info("%s ...", name)
            try:
                failures += _export(context, name, out, expected, title, metrics)
            except (ValueError, TypeError, tf.errors.OpError) as error:
                failures.append(_failure(name, error))
    if failures:
        raise ValueError("; ".join(failures))
    return metrics


def _failure(name: str, error: Exception) -> str:
    return f"{name}: {' '.join(str(error).split())[:300]}"


def _earlier(out: Path) -> dict[str, Any]:
    """The metrics of earlier exports to the same folder."""
    path = out / METRICS
    return run_folder.read_json(path) if path.is_file() else {"exports": {}}


def _check_ours(folder: Path, metrics: dict[str, Any]) -> None:
    """Check that a folder is missing or holds an earlier export only.

    Raises:
        FileExistsError: if it holds anything else.
    """
    if not os.path.lexists(folder):
        return
    is_listed = any(k.split()[0] == folder.name for k in metrics["exports"])
    if not is_listed or folder.is_symlink() or not folder.is_dir():
        raise FileExistsError(
            f"{str(folder)!r} is there already and is not an earlier export; choose another "
            "out=FOLDER"
        )
    for path in folder.rglob("*"):
        is_known = _WRITTEN[folder.name].fullmatch(path.relative_to(folder).as_posix())
        if path.is_symlink() or not (path.is_dir() or is_known):
            raise FileExistsError(
                f"{str(path)!r} is not part of an export, and would be deleted with the export "
                "that is there; move it away, or choose another out=FOLDER"
            )


def _export(
    context: _ExportContext,
    name: str,
    out: Path,
    expected: np.ndarray,
    title: str,
    metrics: dict[str, Any],
) -> list[str]:
    """Write a format to its folder, keeping only files that pass verification, and their metrics to
    ``export.json``. Returns error messages about the other files."""
    folder = out / name
    remove_drafts(out, _WRITTEN[name])
    with draft_folder(out) as draft:
        exported: dict[str, Any] = {}
        failures = []
        for kind, path, predict in _FORMATS[name](context, draft):
            try:
                actual, rate = verification.timed(predict, context.samples.pixels)
            except Exception as error:  # each runtime has its own types
                failures.append(_failure(kind, error))
                _remove(path)
                continue
            compared = verification.compare(actual, expected)
            if reason := verification.rejection_reason(kind, compared):
                failures.append(reason)
                _remove(path)
                continue
            exported[kind] = compared | {"images_per_s": rate, "megabytes": _megabytes(path)}
        if not exported:
            return failures  # the files of an earlier export stay
        text = readmes.text(
            name,
            title,
            context.classifier,
            exported,
            context.samples.source,
            metrics["max_difference_of_files"],
        )
        run_folder.write_text(draft / "README.md", text)
        kept = {k: v for k, v in metrics["exports"].items() if k.split()[0] != name}
        metrics["exports"] = kept | exported
        # Listed first: if this process is killed here, the folder must not look like somebody's.
        run_folder.write_json(out / METRICS, metrics)
        if folder.is_dir():
            folder.rename(draft_path(out))
        draft.rename(folder)
    remove_drafts(out, _WRITTEN[name])
    return failures


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


Exported = Iterator[tuple[str, Path, Callable[[np.ndarray], np.ndarray]]]
"""Exported files: kind, path, and a function that maps resized pixels to its predictions."""


def _meta_graph(context: _ExportContext, folder: Path) -> Exported:
    card = meta_graph.save_with_preprocessing(context.classifier, folder / "model")
    batch_size = context.classifier.backbone.network.batch_size
    yield "meta_graph", folder, _session(folder / "model", card, batch_size)


def _session(
    prefix: Path, card: Card, batch_size: int | None
) -> Callable[[np.ndarray], np.ndarray]:
    """Predict as a TF1 program would; pads the last batch if the graph has a fixed batch size."""
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


def _saved_model(context: _ExportContext, folder: Path) -> Exported:
    # TensorFlow Serving expects versions in numbered folders.
    saved_model.save(context.classifier, folder / "1")
    predict = saved_model.load(folder / "1")
    yield "saved_model", folder / "1", lambda _: predict(context.samples.files)


def _tflite(context: _ExportContext, folder: Path) -> Exported:
    _write_labels(context, folder)
    for precision in tflite.PRECISIONS:
        if precision == "int8" and context.examples is None:
            logger.info("no int8 model: it is calibrated with images, and none were given")
            continue
        path = folder / f"model_{precision}.tflite"
        examples = context.examples() if context.examples is not None else ()
        yield f"tflite {precision}", path, _converted(context.classifier, precision, examples, path)


def _converted(
    classifier: Classifier,
    precision: tflite.Precision,
    examples: Iterable[np.ndarray],
    path: Path,
) -> Callable[[np.ndarray], np.ndarray]:
    """Predict as a TFLite model, which is written at the first call: a precision that cannot be
    converted fails alone."""

    @functools.cache
    def loaded() -> Callable[[np.ndarray], np.ndarray]:
        path.write_bytes(tflite.convert(classifier, precision, examples))
        return tflite.load(path)

    return lambda pixels: loaded()(pixels)


def _onnx(context: _ExportContext, folder: Path) -> Exported:
    if context.classifier.backbone.network.batch_size is not None:
        raise ValueError(
            "the network takes batches of one size only, which its ONNX model would not fill; "
            "export it as saved_model"
        )
    _write_labels(context, folder)
    path = folder / "model.onnx"
    onnx.save(context.classifier, path)
    yield "onnx", path, onnx.load(path)


def _keras(context: _ExportContext, folder: Path) -> Exported:
    _write_labels(context, folder)
    path = folder / "model.keras"
    keras_file.save(context.classifier, path)
    yield "keras", path, keras_file.load(path)


_FORMATS: dict[str, Callable[[_ExportContext, Path], Exported]] = {
    "meta_graph": _meta_graph,
    "saved_model": _saved_model,
    "tflite": _tflite,
    "onnx": _onnx,
    "keras": _keras,
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
    "keras": re.compile(rf"model\.keras|{_LABELS}|{_README}"),
}
"""Relative paths of the files of each export."""


def _write_labels(context: _ExportContext, folder: Path) -> None:
    write_names(folder / run_folder.LABELS, context.classifier.labels)


def _in_one_batch(function: Callable[[Any], Any], pixels: np.ndarray) -> np.ndarray:
    return np.asarray(function(tf.constant(pixels)))


def _megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6
