"""What ``vgg-transfer evaluate`` does; its flags are in ``recipes.evaluate``."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from recipes import terminal
from recipes.evaluate import EvaluateConfig
from transfer import Classifier, open_source
from transfer.activations.extraction import EXTRACTION_BATCH, Compiled, stream
from transfer.activations.fingerprints import remembered
from transfer.core import measurement
from transfer.core.csv_files import write_row
from transfer.core.files import is_regular
from transfer.data import data_checks
from transfer.data.dataset import MAX_COMPARED, Source, Split, whole_eval_split
from transfer.evaluation import metrics, report
from transfer.evaluation.prediction import confusion_matrix, predict, probabilities, summarize
from transfer.evaluation.report import Evaluated
from transfer.finetuning.options import cut_of
from transfer.runs import run_data, run_folder

CHANGES = "changes.csv"
_CHANGES_COLUMNS = ("image", "label", "prediction", "prediction of the other")


def run(folder: Path, config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate, write the results to the folder, and return the figures.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
        ValueError: if the dataset has other classes than the run.
    """
    settings = run_folder.read_config(folder)
    classifier = Classifier.load(folder / run_folder.MODEL)
    split = _split(folder, config, settings)
    if config.skip_unreadable:
        split = split.readable(
            config.skip_unreadable, lambda it: measurement.progress(it, "check", "image")
        )
    to_logit = _class_order(split.source, classifier.labels)
    batch_size = EXTRACTION_BATCH if config.batch_size is None else config.batch_size
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    logits, labels = _predict(classifier, split, settings["freeze_until"], batch_size)
    labels = to_logit[labels]
    figures: dict[str, Any] = {
        "dataset": split.source.name,
        "splits": [name for name, _ in split.parts],
    }
    if config.skip_unreadable:
        figures["unreadable"] = run_data.unreadable(split)
    figures |= metrics.measure(logits, labels, classifier.labels)
    figures |= summarize(logits, labels)
    if config.against is not None:
        _warn_of_trained_images(config.against, split)
        others = _predictions(config.against, split, classifier.labels)
        figures["against"] = {"run": str(config.against)}
        predictions = logits.argmax(-1)
        figures["against"] |= metrics.compare(predictions, others, labels)
        _write_changes(folder / CHANGES, split, classifier.labels, predictions, others, labels)
    else:
        _remove_changes(folder / CHANGES)  # of another evaluation
    run_folder.write_json(folder / run_folder.EVALUATION, figures)
    run_folder.add_to_metrics(folder, "evaluation", figures)
    _write_predictions(folder / run_folder.PREDICTIONS, split, classifier.labels, logits, labels)
    _write_confusion(folder / run_folder.CONFUSION, classifier.labels, logits, labels)
    evaluated = Evaluated(classifier, split, logits, labels, figures, _command(folder, config))
    report.write(folder, evaluated)
    return figures


def _predict(
    classifier: Classifier, split: Split, freeze_until: str, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and the dataset's labels."""
    frozen, trained = classifier.split(cut_of(freeze_until))
    batches: Iterable = split.batches(classifier.preprocess, batch_size)
    batches = measurement.progress(batches, "evaluation")
    if frozen is not None:
        # In two steps, as in training, so that not a bit is different.
        batches = stream(Compiled(frozen), batches)
    return predict(Compiled(trained), batches)


def _predictions(folder: Path, split: Split, labels: list[str]) -> np.ndarray:
    """What another run predicts for the same images: int ``[num_examples]``, in these labels.

    Raises:
        ValueError: if it has other classes.
    """
    settings = run_folder.read_config(folder)
    classifier = Classifier.load(folder / run_folder.MODEL)
    if set(classifier.labels) != set(labels):
        raise ValueError(f"the run in {str(folder)!r} has other classes; they cannot be compared")
    logits, _ = _predict(classifier, split, settings["freeze_until"], EXTRACTION_BATCH)
    return np.array([labels.index(name) for name in classifier.labels])[logits.argmax(-1)]


def _split(folder: Path, config: EvaluateConfig, settings: dict[str, Any]) -> Split:
    """The images to evaluate on; those that the run held out, if it is about the run's own data."""
    theirs = {name: settings.get(name) for name in ("dataset", "data_dir", "image_folder")}
    ours = dict(theirs)
    if config.image_folder:
        ours = {"dataset": None, "data_dir": None}
        ours["image_folder"] = str(Path(config.image_folder).expanduser().resolve())
    elif config.dataset or config.data_dir:
        ours["image_folder"] = None
        ours |= {k: v for k in ("dataset", "data_dir") if (v := getattr(config, k))}
    source = open_source(
        ours["dataset"] or "", data_dir=ours["data_dir"], image_folder=ours["image_folder"]
    )
    if config.eval_split != "auto":
        split = source.split(config.eval_split)
        _warn_of_trained_images(folder, split)
        _warn_of_copies(folder, split)
        return split
    # A dataset may have moved; a folder is another one in another place.
    same = all(ours[name] == theirs[name] for name in ("dataset", "image_folder"))
    if same or run_data.is_of_run(folder, source):
        return run_data.held_out(folder, source)  # finetune has warned of copies among them
    split = whole_eval_split(source)
    _warn_of_copies(folder, split)
    return split


def _warn_of_trained_images(folder: Path, split: Split) -> None:
    if not run_data.is_of_run(folder, split.source):
        return
    if count := run_data.num_not_held_out(folder, split):
        terminal.say(
            f"warning: the run in {str(folder)!r} did not hold out {count} of these {len(split)} "
            "images; it may have been trained on them, and its figures are then too high"
        )


def _warn_of_copies(folder: Path, split: Split) -> None:
    """Of images that the run may have been trained on, where there are few enough to compare."""
    try:
        train = run_data.trained_on(folder, run_data.open_data(folder))
    except (OSError, ValueError):
        return  # its data are gone
    ids = {*train.ids}
    others = split.where(np.array([id_ not in ids for id_ in split.ids], bool))
    if not len(others) or len(train) + len(others) > MAX_COMPARED:
        return
    found = []
    for images in (train, others):
        with remembered(images.source):
            found.append(
                images.fingerprints(lambda files: measurement.progress(files, "images", "image"))
            )
    for line in data_checks.describe_leaks(*found):
        terminal.say(f"warning: {line}")


def _command(folder: Path, config: EvaluateConfig) -> list[str]:
    """What evaluates the run like this again."""
    words = ["vgg-transfer", "evaluate", str(folder)]
    for name, value in vars(config).items():
        if value not in (None, "auto", 0) and name != "assert_accuracy_at_least":
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _class_order(source: Source, labels: list[str]) -> np.ndarray:
    """The number of the logit for each class number of the dataset."""
    missing = sorted(set(labels) - set(source.class_names))
    extra = sorted(set(source.class_names) - set(labels))
    if missing or extra:
        raise ValueError(
            f"{source.name!r} has other classes than the run: {len(extra)} are new "
            f"({', '.join(extra[:5]) or 'none'}), {len(missing)} are missing "
            f"({', '.join(missing[:5]) or 'none'})"
        )
    return np.array([labels.index(name) for name in source.class_names])


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
    """The images on which two runs differ."""
    rows = io.StringIO(newline="")
    write_row(rows, _CHANGES_COLUMNS)
    for name, label, mine, theirs in zip(split.names, labels, predictions, others, strict=True):
        if mine != theirs:
            write_row(rows, [name, classes[label], classes[mine], classes[theirs]])
    run_folder.write_text(path, rows.getvalue())


def _remove_changes(path: Path) -> None:
    """Delete what ``_write_changes`` wrote; any other file of this name stays."""
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
