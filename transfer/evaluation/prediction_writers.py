"""Write predictions as they come: as text, CSV or JSON lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

from transfer.core.csv_files import write_row
from transfer.core.escapes import escaped, printable
from transfer.evaluation.file_predictions import Prediction, as_json

Writer = Callable[[Prediction], None]


def table_writer(file: TextIO, *, may_abstain: bool = False) -> Writer:
    """A line per image: its name, ``not sure:`` if it is below the threshold, and the most probable
    classes with their probabilities."""
    del may_abstain

    def write(prediction: Prediction) -> None:
        cells = [] if prediction.is_sure else ["not sure:"]
        cells += [f"{label} {probability:.4f}" for label, probability in prediction.top]
        line = "  ".join([printable(prediction.path), *cells])
        print(escaped(line), file=file, flush=True)

    return write


def csv_writer(file: TextIO, *, may_abstain: bool = False) -> Writer:
    """A row per image and class. ``may_abstain`` adds a column ``sure``.

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
    write_row(file, ["image", "rank", "label", "probability", *(["sure"] * may_abstain)])

    def write(prediction: Prediction) -> None:
        sure = ["yes" if prediction.is_sure else "no"] * may_abstain
        for rank, (label, probability) in enumerate(prediction.top, 1):
            name = printable(prediction.path)
            write_row(file, [name, rank, label, f"{probability:.6g}", *sure])

    return write


def jsonl_writer(file: TextIO, *, may_abstain: bool = False) -> Writer:
    """A JSON object per image and line, see ``as_json``. ``may_abstain`` adds a value ``sure``."""

    def write(prediction: Prediction) -> None:
        is_sure = prediction.is_sure if may_abstain else None
        line = as_json(printable(prediction.path), prediction.top, is_sure)
        print(line, file=file, flush=True)

    return write


WRITERS = {"table": table_writer, "csv": csv_writer, "jsonl": jsonl_writer}
"""The writers by the name of their format."""
