"""Evaluate a run, and write the results to its folder."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transfer.activations.extraction import EXTRACTION_BATCH
from transfer.activations.fingerprints import remembered
from transfer.core.csv_files import write_row
from transfer.core.files import is_regular
from transfer.data import data_checks
from transfer.data.dataset import MAX_COMPARED, Split, whole_eval_split
from transfer.data.sources import open_source
from transfer.evaluation import metrics, report, scoring
from transfer.evaluation.prediction import confusion_matrix, probabilities
from transfer.evaluation.report import Evaluated, RunSummary
from transfer.layers.classifier import Classifier
from transfer.models.card import read_card
from transfer.runs import run_data, run_folder

logger = logging.getLogger(__name__)

CHANGES = "changes.csv"
_CHANGES_COLUMNS = ("image", "label", "prediction", "prediction of the other")

Progress = Callable[[Iterable[Any], str, str], Iterable[Any]]
"""Wraps an iterable, given a description of the work and the unit of its items."""


def silent(items: Iterable[Any], title: str, unit: str) -> Iterable[Any]:
    """The same items, without a progress bar."""
    del title, unit
    return items


def evaluate_run(
    folder: Path,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    image_folder: str | None = None,
    eval_split: str = "auto",
    batch_size: int = EXTRACTION_BATCH,
    against: Path | None = None,
    skip_unreadable: int = 0,
    command: Sequence[str] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Evaluate the classifier of a run, and write the results to the run folder.

    Writes ``evaluation.json``, ``predictions.csv``, ``confusion.csv``, ``report.html`` with
    ``plots/``, and the metrics into ``metrics.json``; with ``against`` also ``changes.csv``.

    Args:
        folder: folder of a finished run.
        dataset: evaluate on this dataset instead of the run's; see ``open_source``.
        data_dir: directory of tfds datasets; see ``open_source``.
        image_folder: evaluate on this image folder instead of the run's data; see ``open_source``.
        eval_split: a split expression. ``auto`` takes the held-out images of the run; for other
            data, the validation or test split, else all images.
        batch_size: images per step; see ``evaluate``.
        against: folder of another run with the same classes to compare with on the same images.
        skip_unreadable: leave out up to this number of images that cannot be decoded.
        command: command that repeats the evaluation, shown in the report.
        progress: wraps iterables, for progress bars.

    Returns:
        The metrics of ``transfer.evaluate``. With ``skip_unreadable``, also ``unreadable``, the
        images that were left out; with ``against``, also ``against``: the other ``run`` with
        ``only_first``, ``only_second`` and ``p_value`` of ``transfer.evaluation.metrics.compare``.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
        ValueError: if the classes of the images differ from the run's, or some cannot be decoded.

    Example:
        >>> from transfer import fine_tune, load_meta_graph, open_source
        >>> from transfer.runs.evaluation import evaluate_run
        >>> graph = load_meta_graph("embedded")
        >>> train, held_out = open_source("digits").train_and_eval_splits()
        >>> result = fine_tune(graph, train, held_out, run_dir="runs/evaluate-run", epochs=20)
        >>> metrics = evaluate_run(result.run_dir)
        >>> metrics["accuracy"] > 0.9
        True
    """
    settings = run_folder.read_config(folder)
    classifier = _load(folder, settings)
    split = _split(folder, settings, dataset, data_dir, image_folder, eval_split, progress)
    if skip_unreadable:
        split = split.readable(skip_unreadable, lambda it: progress(it, "check", "image"))
    logits, labels = scoring.compute_logits(
        classifier,
        split,
        batch_size=batch_size,
        progress=lambda batches: progress(batches, "evaluation", "batch"),
    )
    results = scoring.measure(classifier, split, logits, labels)
    if skip_unreadable:
        heading = {name: results[name] for name in ("dataset", "splits")}
        results = heading | {"unreadable": run_data.unreadable(split)} | results
    predictions = logits.argmax(-1)
    if against is not None:
        _warn_of_trained_images(against, split)
        others = _predictions(against, split, classifier.labels, progress)
        results["against"] = {"run": str(against)} | metrics.compare(predictions, others, labels)
        _write_changes(folder / CHANGES, split, classifier.labels, predictions, others, labels)
    else:
        _remove_changes(folder / CHANGES)  # left by an earlier evaluation
    run_folder.write_json(folder / run_folder.EVALUATION, results)
    run_folder.add_to_metrics(folder, "evaluation", results)
    _write_predictions(folder / run_folder.PREDICTIONS, split, classifier.labels, logits, labels)
    _write_confusion(folder / run_folder.CONFUSION, classifier.labels, logits, labels)
    evaluated = Evaluated(classifier, split, logits, labels, results)
    report.write(folder, evaluated, _summary(folder, command))
    return results


def _load(folder: Path, settings: dict[str, Any]) -> Classifier:
    classifier = Classifier.load(folder / run_folder.MODEL)
    classifier.cut = settings["freeze_until"]
    return classifier


def _predictions(folder: Path, split: Split, labels: list[str], progress: Progress) -> np.ndarray:
    """Predictions of another run for the same images, int ``[num_examples]``, as indices of
    ``labels``.

    Raises:
        ValueError: if it has different classes.
    """
    classifier = _load(folder, run_folder.read_config(folder))
    if set(classifier.labels) != set(labels):
        raise ValueError(f"the run in {str(folder)!r} has other classes; they cannot be compared")
    logits, _ = scoring.compute_logits(
        classifier, split, progress=lambda batches: progress(batches, "evaluation", "batch")
    )
    return np.array([labels.index(name) for name in classifier.labels])[logits.argmax(-1)]


def _split(
    folder: Path,
    settings: dict[str, Any],
    dataset: str | None,
    data_dir: str | None,
    image_folder: str | None,
    eval_split: str,
    progress: Progress,
) -> Split:
    """The images to evaluate on; by default, the held-out images of the run."""
    of_run = {name: settings.get(name) for name in ("dataset", "data_dir", "image_folder")}
    origin = dict(of_run)
    if image_folder:
        origin = {"dataset": None, "data_dir": None}
        origin["image_folder"] = str(Path(image_folder).expanduser().resolve())
    elif dataset or data_dir:
        origin["image_folder"] = None
        flags = {"dataset": dataset, "data_dir": data_dir}
        origin |= {name: value for name, value in flags.items() if value}
    source = open_source(
        origin["dataset"] or "", data_dir=origin["data_dir"], image_folder=origin["image_folder"]
    )
    if eval_split != "auto":
        split = source.split(eval_split)
        _warn_of_trained_images(folder, split)
        _warn_of_copies(folder, split, progress)
        return split
    # The data_dir of a dataset may change, but the path of an image folder identifies it.
    same = all(origin[name] == of_run[name] for name in ("dataset", "image_folder"))
    if same or run_data.is_of_run(folder, source):
        return run_data.held_out(folder, source)  # finetune already warned about near-duplicates
    split = whole_eval_split(source)
    _warn_of_copies(folder, split, progress)
    return split


def _warn_of_trained_images(folder: Path, split: Split) -> None:
    if not run_data.is_of_run(folder, split.source):
        return
    if count := run_data.num_not_held_out(folder, split):
        logger.warning(
            f"the run in {str(folder)!r} did not hold out {count} of these {len(split)} images; "
            "it may have been trained on them, and its metrics are then too high"
        )


def _warn_of_copies(folder: Path, split: Split, progress: Progress) -> None:
    """Warn about near-duplicates of images that the run may have been trained on, if there are few
    enough to compare."""
    try:
        train = run_data.trained_on(folder, run_data.open_data(folder))
    except (OSError, ValueError):
        return  # the data of the run no longer exist
    others = split.where(~np.isin(split.ids, train.ids))
    if not len(others) or len(train) + len(others) > MAX_COMPARED:
        return
    prints = []
    for images in (train, others):
        with remembered(images.source):
            prints.append(images.fingerprints(lambda files: progress(files, "images", "image")))
    for line in data_checks.describe_leaks(*prints):
        logger.warning(line)


def _summary(folder: Path, command: Sequence[str]) -> RunSummary:
    """Information about the run for the report."""
    config, flags = run_folder.read_config(folder), str(folder / run_folder.CONFIG)
    train = ["vgg-transfer", "finetune", "--config", flags, "--out", "runs/again"]
    versions = run_folder.read_json(folder / run_folder.METRICS).get("versions")
    return RunSummary(
        name=folder.resolve().name,
        model=Path(str(config.get("model"))).name,
        cut=config.get("freeze_until"),
        history=run_folder.read_history(folder),
        config=config,
        versions=versions if isinstance(versions, dict) else {},
        trained_on=read_card(folder / f"{run_folder.MODEL}.json").trained_on,
        commands=[train, command] if command else [train],
    )


def _write_predictions(
    path: Path, split: Split, classes: list[str], logits: np.ndarray, labels: np.ndarray
) -> None:
    rows = io.StringIO(newline="")
    write_row(rows, ["image", "label", "prediction", *(f"p({name})" for name in classes)])
    predictions = logits.argmax(-1)
    for name, label, prediction, p in zip(
        split.names, labels, predictions, probabilities(logits), strict=True
    ):
        write_row(rows, [name, classes[label], classes[prediction], *(f"{x:.6g}" for x in p)])
    run_folder.write_text(path, rows.getvalue())


def _write_changes(
    path: Path,
    split: Split,
    classes: list[str],
    predictions: np.ndarray,
    others: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Write the images for which the predictions of two runs differ."""
    rows = io.StringIO(newline="")
    write_row(rows, _CHANGES_COLUMNS)
    for name, label, mine, theirs in zip(split.names, labels, predictions, others, strict=True):
        if mine != theirs:
            write_row(rows, [name, classes[label], classes[mine], classes[theirs]])
    run_folder.write_text(path, rows.getvalue())


def _remove_changes(path: Path) -> None:
    """Delete the file of ``_write_changes``, but no other file of this name."""
    if not is_regular(path):
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        is_ours = file.readline() == f"{','.join(_CHANGES_COLUMNS)}\n"
    if is_ours:
        path.unlink()


def _write_confusion(
    path: Path, classes: list[str], logits: np.ndarray, labels: np.ndarray
) -> None:
    rows = io.StringIO(newline="")
    write_row(rows, ["label \\ prediction", *classes])
    for name, counts in zip(classes, confusion_matrix(logits, labels), strict=True):
        write_row(rows, [name, *counts])
    run_folder.write_text(path, rows.getvalue())
