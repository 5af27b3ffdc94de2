"""What ``vgg-transfer evaluate`` does; its flags are in ``recipes.evaluate``."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from recipes import measure, run_folder
from recipes.evaluate import EvaluateConfig
from recipes.finetune import cut_of
from transfer import Classifier
from transfer.data import Source, Split, whole_eval_split
from transfer.evaluation import confusion_matrix, predict, probabilities, summarize
from transfer.features import EXTRACTION_BATCH, compiled, stream
from transfer.sources import open_source


def run(folder: Path, config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate, write the results to the folder, and return the figures.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
        ValueError: if the dataset has other classes than the run.
    """
    settings = run_folder.read_config(folder)
    classifier = Classifier.load(folder / run_folder.MODEL)
    split = _split(folder, config, settings)
    to_logit = _class_order(split.source, classifier.labels)
    batch_size = EXTRACTION_BATCH if config.batch_size is None else config.batch_size
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    frozen, trained = classifier.split(cut_of(settings["freeze_until"]))
    batches: Iterable = split.batches(classifier.preprocess, batch_size)
    batches = measure.progress(batches, "evaluation")
    if frozen is not None:
        # In two steps, as in training, so that not a bit is different.
        batches = stream(compiled(frozen), batches)
    logits, labels = predict(compiled(trained), batches)
    labels = to_logit[labels]

    figures = summarize(logits, labels)
    described = {"dataset": split.source.name, "splits": [name for name, _ in split.parts]}
    run_folder.write_json(folder / run_folder.EVALUATION, described | figures)
    _write_predictions(folder / run_folder.PREDICTIONS, split, classifier.labels, logits, labels)
    _write_confusion(folder / run_folder.CONFUSION, classifier.labels, logits, labels)
    return figures


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
        return source.split(config.eval_split)
    # A dataset may have moved; a folder is another one in another place.
    same = all(ours[name] == theirs[name] for name in ("dataset", "image_folder"))
    return _held_out(folder, source) if same else whole_eval_split(source)


def _held_out(folder: Path, source: Source) -> Split:
    """The images whose names the run wrote down, whatever has come or gone since."""
    text = (folder / run_folder.HELD_OUT).read_text(encoding="utf-8")
    names = set(text.removesuffix("\n").split("\n"))
    everything = source.split("+".join(source.split_names))
    split = everything.where(np.array([name in names for name in everything.names]))
    missing = sorted(names - set(split.names))
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(names)} images that the run held out are gone from "
            f"{source.name!r}, such as {missing[0]!r}; name a split or a dataset to evaluate on"
        )
    return split


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
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["image", "label", "prediction", *(f"p({name})" for name in classes)])
    predictions = logits.argmax(-1)
    for name, label, prediction, p in zip(
        split.names, labels, predictions, probabilities(logits), strict=True
    ):
        writer.writerow([name, classes[label], classes[prediction], *(f"{x:.6g}" for x in p)])
    run_folder.write_text(path, rows.getvalue())


def _write_confusion(
    path: Path, classes: list[str], logits: np.ndarray, labels: np.ndarray
) -> None:
    rows = io.StringIO(newline="")
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["label \\ prediction", *classes])
    for name, counts in zip(classes, confusion_matrix(logits, labels), strict=True):
        writer.writerow([name, *counts])
    run_folder.write_text(path, rows.getvalue())
