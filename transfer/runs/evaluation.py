"""Evaluate a run, and write the results to its folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transfer.activations.extraction import EXTRACTION_BATCH
from transfer.activations.fingerprints import remembered
from transfer.core.files import locked_folder
from transfer.core.npy_files import check_path
from transfer.data import data_checks
from transfer.data.dataset import MAX_COMPARED, Source, Split, whole_eval_split
from transfer.data.groups import describe_shared
from transfer.data.sources import manifest_location, open_source
from transfer.evaluation import metrics, report, scoring, tables
from transfer.evaluation.out_of_distribution import class_means
from transfer.evaluation.report import Evaluated, RunSummary
from transfer.layers.classifier import Classifier
from transfer.models.card import read_card
from transfer.runs import run_data, run_folder

logger = logging.getLogger(__name__)

CHANGES = "changes.csv"
_PATHS = ("image_folder", "csv")
MAX_CLASSES_IN_METRICS = 100
"""With more classes, ``metrics.json`` has no metrics per class; ``evaluation.json`` has them."""

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
    csv: str | None = None,
    group_by: str | None = None,
    eval_split: str = "auto",
    batch_size: int = EXTRACTION_BATCH,
    against: Path | None = None,
    coverage: float | None = None,
    risk: float | None = None,
    unknown: Path | None = None,
    skip_unreadable: int = 0,
    probabilities: Path | None = None,
    command: Sequence[str] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Evaluate the classifier of a run, and write the results to the run folder.

    Writes ``evaluation.json``, ``predictions.csv``, ``confusion.csv``, ``report.html`` with
    ``plots/``, and the metrics into ``metrics.json``, without those per class if there are more
    than ``MAX_CLASSES_IN_METRICS``; with ``against`` also ``changes.csv``, and with ``unknown``
    ``class_means.npy``, for ``predict``.

    Args:
        folder: folder of a finished run.
        dataset: evaluate on this dataset instead of the run's; see ``open_source``.
        data_dir: directory of tfds datasets; see ``open_source``.
        image_folder: evaluate on this image folder instead of the run's data; see ``open_source``.
        csv: evaluate on this manifest instead of the run's data; see ``open_source``.
        group_by: what groups the images; see ``open_source``. Default: as in the run, for its data.
        eval_split: a split expression. ``auto`` takes the held-out images of the run; for other
            data, the validation or test split, else the training images.
        batch_size: images per step; see ``evaluate``.
        against: folder of another run with the same classes to compare with on the same images.
        coverage: also measure prediction sets with this coverage; see ``evaluate``.
        risk: also find the confidence that keeps this error rate; see ``evaluate``.
        unknown: folder of images of none of the classes; see ``evaluate``.
        skip_unreadable: leave out up to this number of images that cannot be decoded.
        probabilities: write the probabilities of all classes to this file, ``.npy``, float32
            ``[num_examples, num_classes]``, with a row per row of ``predictions.csv`` and a column
            per line of ``labels.txt``.
        command: command that repeats the evaluation, shown in the report.
        progress: wraps iterables, for progress bars.

    Returns:
        The metrics of ``transfer.evaluate``. With ``skip_unreadable``, also ``unreadable``, the
        images that were left out; with ``against``, also ``against``: the other ``run`` with
        ``only_first``, ``only_second`` and ``p_value`` of ``transfer.evaluation.metrics.compare``.

    Raises:
        BlockingIOError: if the run goes on in another process.
        FileNotFoundError: if the folder holds no finished run.
        ValueError: if no images are named and those of the run came from a Python program, the
            classes of the images differ from the run's, some cannot be decoded, ``coverage`` or
            ``risk`` is not between 0 and 1, ``coverage`` does not fit the images, or
            ``probabilities`` does not end in ``.npy``.

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
    if probabilities is not None:
        check_path(probabilities, "probabilities")
    wanted = scoring.Uncertainty(coverage, risk, None if unknown is None else str(unknown))
    settings = run_folder.read_config(folder)
    with locked_folder(folder):  # refused here, and not after the slow part, in `write`
        classifier = _load(folder, settings)
    origin = _origin(
        settings,
        dataset=dataset,
        data_dir=data_dir,
        image_folder=image_folder,
        csv=csv,
        group_by=group_by,
    )
    is_joined = run_data.is_grown(folder) and not (dataset or data_dir or image_folder or csv)
    if is_joined and group_by:
        raise ValueError(
            f"group_by={group_by}: the images of the run come from several places, with the groups "
            "that they had when it was trained; leave out group_by"
        )
    if is_joined:
        source = run_data.open_data(folder)
    else:
        run_data.check_origin(folder, origin)
        if dataset or data_dir or image_folder or csv:
            source = run_data.open_place(origin, min_classes=1)
        else:
            hint = ", or say where they are now: image_folder=DIR or csv=FILE"
            source = run_data.open_own(folder, origin, min_classes=1, hint=hint)
    split = _split(folder, settings, source, origin, eval_split, progress)
    if skip_unreadable:
        split = split.readable(skip_unreadable, lambda it: progress(it, "check", "image"))
    in_batches: dict[str, Any] = {
        "batch_size": batch_size,
        "progress": lambda batches: progress(batches, "evaluation", "batch"),
    }
    outputs, labels = scoring.compute(
        classifier, split, with_features=unknown is not None, **in_batches
    )
    logits, means = outputs.logits, None
    results = scoring.measure(classifier, split, outputs, labels, wanted, **in_batches)
    if outputs.features is not None:
        means = class_means(outputs.features, labels, len(classifier.labels))
    if skip_unreadable:
        heading = {name: results[name] for name in ("dataset", "splits")}
        results = heading | {"unreadable": run_data.unreadable(split)} | results
    if against is not None:
        _warn_of_trained_images(against, split)
        predictions = logits.argmax(-1)
        others = _predictions(against, split, classifier.labels, progress)
        results["against"] = {"run": str(against)} | metrics.compare(
            predictions, others, labels, split.groups
        )
        changes = (split.names, classifier.labels, predictions, others, labels)
        tables.write_changes(folder / CHANGES, *changes)
    else:
        tables.remove_changes(folder / CHANGES)  # left by an earlier evaluation
    if probabilities is not None:
        tables.write_probabilities(probabilities, logits)
    write(folder, Evaluated(classifier, split, logits, labels, results, means), command)
    return results


def evaluate_model(
    model: Path,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    image_folder: str | None = None,
    csv: str | None = None,
    group_by: str | None = None,
    eval_split: str = "auto",
    batch_size: int = EXTRACTION_BATCH,
    coverage: float | None = None,
    risk: float | None = None,
    unknown: Path | None = None,
    skip_unreadable: int = 0,
    probabilities: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Evaluate a classifier without a run, such as one from ``convert``; writes no files but
    ``probabilities``.

    Args:
        model: its checkpoint prefix; see ``Classifier.load``.
        dataset: the images; see ``open_source``.
        data_dir: directory of tfds datasets; see ``open_source``.
        image_folder: the images; see ``open_source``.
        csv: the images; see ``open_source``.
        group_by: what groups the images; see ``open_source``.
        eval_split: a split expression. ``auto`` takes the validation or test split, else the
            training images.
        batch_size: images per step; see ``evaluate``.
        coverage: also measure prediction sets with this coverage; see ``evaluate``.
        risk: also find the confidence that keeps this error rate; see ``evaluate``.
        unknown: folder of images of none of the classes; see ``evaluate``.
        skip_unreadable: leave out up to this number of images that cannot be decoded.
        probabilities: file for the probabilities of all classes; see ``evaluate_run``.
        progress: wraps iterables, for progress bars.

    Returns:
        The metrics of ``transfer.evaluate``; with ``skip_unreadable``, also ``unreadable``.

    Raises:
        ValueError: if no images are given, or they have other classes than the model.
    """
    if not (dataset or data_dir or image_folder or csv):
        raise ValueError(
            f"{str(model)!r} is a model without a run, so there are no held-out images; give the "
            "images with image_folder=DIR, csv=FILE or dataset=NAME"
        )
    scoring.Uncertainty(coverage, risk, None if unknown is None else str(unknown))  # checked first
    classifier = Classifier.load(model)
    source = open_source(
        dataset or "",
        data_dir=data_dir,
        image_folder=image_folder,
        csv=csv,
        group_by=group_by,
        min_classes=1,
    )
    split = whole_eval_split(source) if eval_split == "auto" else source.split(eval_split)
    if skip_unreadable:
        split = split.readable(skip_unreadable, lambda it: progress(it, "check", "image"))
    results = scoring.evaluate(
        classifier,
        split,
        batch_size=batch_size,
        coverage=coverage,
        risk=risk,
        unknown=unknown,
        probabilities=probabilities,
        progress=lambda batches: progress(batches, "evaluation", "batch"),
    )
    return results | ({"unreadable": run_data.unreadable(split)} if skip_unreadable else {})


def write(folder: Path, evaluated: Evaluated, command: Sequence[str] = ()) -> None:
    """Write the files of ``evaluate_run``, except for ``changes.csv``, to the folder of a run.

    Raises:
        BlockingIOError: if another process works in the folder for longer than a minute.
    """
    results, class_names = evaluated.metrics, evaluated.classifier.labels
    with locked_folder(folder, timeout_s=60):  # another evaluation writes its files in less
        run_folder.write_json(folder / run_folder.EVALUATION, results)
        if len(class_names) > MAX_CLASSES_IN_METRICS:
            results = {name: value for name, value in results.items() if name != "classes"}
        run_folder.add_to_metrics(folder, "evaluation", results)
        tables.write_predictions(
            folder / run_folder.PREDICTIONS,
            evaluated.split.names,
            class_names,
            evaluated.logits,
            evaluated.labels,
            evaluated.scores,
        )
        tables.write_class_means(folder / run_folder.CLASS_MEANS, evaluated.class_means)
        tables.write_confusion(folder / run_folder.CONFUSION, class_names, evaluated.confusion)
        report.write(folder, evaluated, _summary(folder, command))


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


def _origin(settings: Mapping[str, Any], **given: str | None) -> dict[str, str | None]:
    """The arguments of ``open_source``: those given, or else those of the run."""
    origin = {name: settings.get(name) for name in given}
    if given["image_folder"] or given["csv"]:
        folder, csv = given["image_folder"], given["csv"]
        other: dict[str, str | None] = dict.fromkeys(given)
        other["image_folder"] = folder and str(Path(folder).expanduser().resolve())
        other["csv"] = csv and manifest_location(csv)
        if any(other[name] != origin[name] for name in _PATHS):
            origin = other
    elif given["dataset"] or given["data_dir"]:
        origin |= dict.fromkeys((*_PATHS, "group_by"))
        origin |= {name: given[name] for name in ("dataset", "data_dir") if given[name]}
    return origin | ({"group_by": given["group_by"]} if given["group_by"] else {})


def _split(
    folder: Path,
    settings: Mapping[str, Any],
    source: Source,
    origin: Mapping[str, str | None],
    eval_split: str,
    progress: Progress,
) -> Split:
    """The images to evaluate on; by default, the held-out images of the run."""
    if eval_split != "auto":
        split = source.split(eval_split)
        _warn_of_trained_images(folder, split)
        _warn_of_copies(folder, split, progress)
        return split
    # The data_dir of a dataset may change, but the path of a folder or manifest identifies it.
    same = all(origin[name] == settings.get(name) for name in ("dataset", *_PATHS))
    same = same and any(settings.get(name) for name in run_data.PLACES)
    same = same and not run_data.is_grown(folder)
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
    if train.source.origin == split.source.origin:
        for line in describe_shared(train.groups, split.groups, split.names):
            logger.warning(line)
    is_trained = np.isin(split.ids, train.ids)
    if is_trained.any() and not run_data.is_of_run(folder, split.source):
        logger.warning(
            f"the run in {str(folder)!r} was trained on {is_trained.sum()} of these {len(split)} "
            "images, so that the metrics are too high"
        )
    others = split.where(~is_trained)
    if not len(others) or len(train) + len(others) > MAX_COMPARED:
        return
    prints = []
    for images in (train, others):
        with remembered(images.source):
            prints.append(images.fingerprints(lambda files: progress(files, "images", "image")))
    for line in data_checks.find_leaks(*prints).describe():
        logger.warning(line)


def _summary(folder: Path, command: Sequence[str]) -> RunSummary:
    """Information about the run for the report."""
    config, flags = run_folder.read_config(folder), str(folder / run_folder.CONFIG)
    again = ["vgg-transfer", "finetune", "--config", flags, "--out", "runs/again"]
    # ``fine_tune`` records no split expressions, with which the command would take other images.
    train = [again] if config.get("train_split") else []
    versions = run_folder.read_json(folder / run_folder.METRICS).get("versions")
    return RunSummary(
        name=folder.resolve().name,
        model=Path(str(config.get("model"))).name,
        cut=config.get("freeze_until"),
        history=run_folder.read_history(folder),
        config=config,
        versions=versions if isinstance(versions, dict) else {},
        trained_on=read_card(folder / f"{run_folder.MODEL}.json").trained_on,
        commands=[*train, *([command] if command else [])],
    )
