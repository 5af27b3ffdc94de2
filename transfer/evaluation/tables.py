"""The files of an evaluation for other programs: predictions, confusion matrix, probabilities."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from transfer.core.csv_files import write_row
from transfer.core.files import is_regular, replacing
from transfer.core.npy_files import row_writer
from transfer.evaluation.image_scores import ImageScores
from transfer.evaluation.prediction import probabilities, row_blocks

MAX_LISTED = 20
"""Maximum number of classes of which ``predictions.csv`` has all probabilities."""
_CHANGES_COLUMNS = ("image", "label", "prediction", "prediction of the other")


def write_predictions(
    path: Path,
    names: Sequence[str],
    class_names: Sequence[str],
    logits: np.ndarray,
    labels: np.ndarray,
    scores: ImageScores,
) -> None:
    """Write a table with one row per image: its name, label and prediction.

    Up to ``MAX_LISTED`` classes, the other columns are ``p(NAME)``, the probability of each class.
    With more classes they are the probability of the prediction, probability and rank of the label
    (1 if no class is more probable), and the next most probable classes with their probabilities.
    """
    is_short = len(class_names) <= MAX_LISTED
    if is_short:
        header = [f"p({name})" for name in class_names]
    else:
        header = ["probability", "label probability", "label rank"]
        for place in range(2, scores.top.shape[1] + 1):
            header += [f"prediction {place}", f"probability {place}"]
    with _writing(path) as file:
        write_row(file, ["image", "label", "prediction", *header])
        for rows in row_blocks(logits):
            others = (
                _all_probabilities(logits[rows])
                if is_short
                else _most_probable(scores, rows, class_names)
            )
            for index, cells in zip(range(rows.start, rows.stop), others, strict=True):
                label, prediction = class_names[labels[index]], class_names[scores.top[index, 0]]
                write_row(file, [names[index], label, prediction, *cells])


def write_changes(
    path: Path,
    names: Sequence[str],
    class_names: Sequence[str],
    predictions: np.ndarray,
    others: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Write the images for which the predictions of two classifiers differ."""
    with _writing(path) as file:
        write_row(file, _CHANGES_COLUMNS)
        for index in np.flatnonzero(predictions != others).tolist():
            classes = (labels[index], predictions[index], others[index])
            write_row(file, [names[index], *(class_names[number] for number in classes)])


def remove_changes(path: Path) -> None:
    """Delete the file of ``write_changes``, but no other file of this name."""
    if not is_regular(path):
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        is_ours = file.readline() == f"{','.join(_CHANGES_COLUMNS)}\n"
    if is_ours:
        path.unlink()


def write_class_means(path: Path, means: np.ndarray | None) -> None:
    """Write the means of ``out_of_distribution.class_means``, float32 ``[num_classes,
    num_features]``; ``None`` removes those of an earlier evaluation."""
    if means is None:
        if is_regular(path):
            path.unlink()
        return
    with row_writer(path, means.shape[1]) as append:
        append(means)


def write_confusion(path: Path, class_names: Sequence[str], counts: np.ndarray) -> None:
    """Write a confusion matrix, int ``[num_classes, num_classes]``: rows are labels, columns
    predictions."""
    with _writing(path) as file:
        write_row(file, ["label \\ prediction", *class_names])
        for name, row in zip(class_names, counts, strict=True):
            write_row(file, [name, *row.tolist()])


def write_probabilities(path: Path, logits: np.ndarray) -> None:
    """Write the probabilities of all classes as a ``.npy`` file, float32 ``[num_examples,
    num_classes]``."""
    with row_writer(path, logits.shape[1]) as append:
        for rows in row_blocks(logits):
            append(probabilities(logits[rows]))


def _all_probabilities(logits: np.ndarray) -> Iterator[list[str | int]]:
    for p in probabilities(logits).tolist():
        yield [f"{x:.6g}" for x in p]


def _most_probable(
    scores: ImageScores, rows: slice, class_names: Sequence[str]
) -> Iterator[list[str | int]]:
    for classes, p, of_label, rank in zip(
        scores.top[rows].tolist(),
        scores.top_probabilities[rows].tolist(),
        scores.label_probabilities[rows].tolist(),
        scores.label_ranks[rows].tolist(),
        strict=True,
    ):
        cells: list[str | int] = [f"{p[0]:.6g}", f"{of_label:.6g}", rank]
        for number, probability in zip(classes[1:], p[1:], strict=True):
            cells += [class_names[number], f"{probability:.6g}"]
        yield cells


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[TextIO]:
    """A text file that gets its name when the block ends. Names of images that are not UTF-8 are
    written with escapes."""
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        yield file
