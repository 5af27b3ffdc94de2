"""Write predictions as they come: as text, CSV or JSON lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

from transfer.core.csv_files import write_row
from transfer.core.escapes import escaped, printable
from transfer.evaluation.file_predictions import Prediction, as_json

Writer = Callable[[Prediction], None]


def table_writer(
    file: TextIO, *, may_abstain: bool = False, has_sets: bool = False, has_scores: bool = False
) -> Writer:
    """A line per image: its name, ``not sure:`` if it is below the threshold, the most probable
    classes with their probabilities, the prediction set and the unknown score, if there are any."""
    del may_abstain, has_sets, has_scores

    def write(prediction: Prediction) -> None:
        cells = [] if prediction.is_sure else ["not sure:"]
        cells += [f"{label} {probability:.4f}" for label, probability in prediction.top]
        if prediction.prediction_set is not None:
            names = ", ".join(label for label, _ in prediction.prediction_set)
            cells.append(f"set: {names or 'empty'}")
        if prediction.unknown_score is not None:
            cells.append(f"unknown: {prediction.unknown_score:.4f}")
        line = "  ".join([printable(prediction.path), *cells])
        print(escaped(line), file=file, flush=True)

    return write


def csv_writer(
    file: TextIO, *, may_abstain: bool = False, has_sets: bool = False, has_scores: bool = False
) -> Writer:
    """A row per image and class.

    ``may_abstain`` adds a column ``sure``. ``has_sets`` adds a column ``in_set``, and rows for all
    classes of the set. ``has_scores`` adds a column ``unknown_score``.

    Example:
        >>> import sys
        >>> from pathlib import Path
        >>> from transfer import Prediction
        >>> from transfer.evaluation.prediction_writers import csv_writer
        >>> write = csv_writer(sys.stdout)
        image,rank,label,probability
        >>> write(Prediction(Path("a.jpg"), "red", 0.75, [("red", 0.75), ("blue", 0.25)]))
        a.jpg,1,red,0.75
        a.jpg,2,blue,0.25
    """
    more = ["sure"] * may_abstain + ["in_set"] * has_sets + ["unknown_score"] * has_scores
    write_row(file, ["image", "rank", "label", "probability", *more])

    def write(prediction: Prediction) -> None:
        name, chosen = printable(prediction.path), prediction.prediction_set or []
        sure = ["yes" if prediction.is_sure else "no"] * may_abstain
        # A number: as text, a minus sign would be escaped as the beginning of a formula.
        score = [float(f"{prediction.unknown_score:.6g}")] if has_scores else []
        # Both begin with the most probable class.
        shown = max(prediction.top, chosen, key=len)
        for rank, (label, probability) in enumerate(shown, 1):
            in_set = ["yes" if rank <= len(chosen) else "no"] * has_sets
            write_row(file, [name, rank, label, f"{probability:.6g}", *sure, *in_set, *score])

    return write


def jsonl_writer(
    file: TextIO, *, may_abstain: bool = False, has_sets: bool = False, has_scores: bool = False
) -> Writer:
    """A JSON object per image and line, see ``as_json``.

    ``may_abstain`` adds a value ``sure``, ``has_sets`` the names of the classes in the ``set``, and
    ``has_scores`` the ``unknown_score``.
    """
    del has_scores

    def write(prediction: Prediction) -> None:
        chosen = [label for label, _ in prediction.prediction_set or []]
        line = as_json(
            printable(prediction.path),
            prediction.top,
            sure=prediction.is_sure if may_abstain else None,
            set=chosen if has_sets else None,
            unknown_score=prediction.unknown_score,
        )
        print(line, file=file, flush=True)

    return write


WRITERS = {"table": table_writer, "csv": csv_writer, "jsonl": jsonl_writer}
"""The writers by the name of their format."""
