"""Implementation of ``vgg-transfer predict``; its flags are in ``recipes.predict_flags``."""

from __future__ import annotations

import glob
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from recipes import console, terminal
from recipes.predict_flags import PredictConfig
from transfer import Classifier
from transfer.core import measurement, npy_files
from transfer.core.csv_files import write_row
from transfer.core.escapes import printable
from transfer.evaluation.explain import Explainer
from transfer.evaluation.file_predictions import (
    Prediction,
    as_json,
    check_counts,
    check_threshold,
    predict_files,
    reason,
)
from transfer.images import image_files
from transfer.images.image_files import PassedOver

Writer = Callable[[Prediction], None]


def run(model: Path, images: Sequence[str], config: PredictConfig, results: TextIO) -> int:
    """Predict, write to ``results``, and return the number of images that could not be read.

    Only a few batches are in memory at any time, whatever the number of images.

    Raises:
        FileNotFoundError, ValueError: if the model does not exist, or there are no images.
    """
    check_counts(top_k=config.top_k, batch_size=config.batch_size)
    check_threshold(config.abstain_below)
    if config.probabilities is not None:
        npy_files.check_path(config.probabilities, "probabilities")
    if not images:
        raise ValueError("no images are named; give files, folders, patterns, or - for a list")
    classifier = Classifier.load(model)
    explainer = None if config.explain is None else Explainer(classifier, config.explain)
    write = _WRITERS[config.format](results, config.abstain_below is not None)
    passed_over = PassedOver()
    done = num_failed = 0
    start = time.perf_counter()
    with tqdm(
        unit="image",
        file=sys.stderr,
        mininterval=1.0,
        leave=False,
        disable=console.verbosity() != 1,
    ) as bar:

        def report(path: Path, error: Exception) -> None:
            nonlocal num_failed
            num_failed += 1
            bar.clear()
            terminal.say(f"error: {printable(path)}: {reason(error)}")
            bar.update()

        predictions: Iterable[Prediction] = predict_files(
            classifier,
            find_images(images, passed_over),
            top_k=config.top_k,
            batch_size=config.batch_size,
            abstain_below=config.abstain_below,
            explainer=explainer,
            probabilities=config.probabilities,
            on_unreadable=report,
        )
        if console.verbosity() == 2:  # a line now and then, in place of the bar
            predictions = measurement.progress(predictions, "predictions", "image")
        for prediction in predictions:
            write(prediction)
            done += 1
            bar.update()
    if not done + num_failed:
        reasons = "".join(f"; {line}" for line in passed_over.describe())
        raise ValueError(f"no images were found{reasons}")
    for line in passed_over.describe():
        print(f"warning: {line}", file=sys.stderr)
    rate = done / (time.perf_counter() - start)
    failed = f", {num_failed} could not be read" if num_failed else ""
    console.say_unless_quiet(f"{done} images, {rate:.1f} images/s{failed}")
    return num_failed


def find_images(words: Iterable[str], passed_over: PassedOver) -> Iterator[Path]:
    """Yield the image files that the arguments name: folders are searched for images, glob patterns
    are expanded, ``-`` reads one path per line from standard input. Files in folders that are not
    images are recorded in ``passed_over``."""
    for word in words:
        path = Path(word).expanduser()
        if word == "-":
            # As bytes: file names need not be UTF-8.
            lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
            yield from (Path(line) for line in lines if line.strip())
        elif path.exists() or not glob.has_magic(word):
            yield from _in_folder(path, passed_over) if path.is_dir() else (path,)
        else:
            for match in map(Path, glob.iglob(str(path), recursive=True)):
                # ** already matches the files inside folders.
                if not match.is_dir():
                    yield match
                elif "**" not in word:
                    yield from _in_folder(match, passed_over)


def _in_folder(folder: Path, passed_over: PassedOver) -> Iterator[Path]:
    return image_files.find(folder, passed_over, in_order=True)


def _table(file: TextIO, may_abstain: bool) -> Writer:
    del may_abstain

    def write(prediction: Prediction) -> None:
        cells = [] if prediction.is_sure else ["not sure:"]
        cells += [f"{label} {probability:.4f}" for label, probability in prediction.top]
        line = "  ".join([printable(prediction.path), *cells])
        print(terminal.escaped(line), file=file, flush=True)

    return write


def _csv(file: TextIO, may_abstain: bool) -> Writer:
    write_row(file, ["image", "rank", "label", "probability", *(["sure"] * may_abstain)])

    def write(prediction: Prediction) -> None:
        sure = ["yes" if prediction.is_sure else "no"] * may_abstain
        for rank, (label, probability) in enumerate(prediction.top, 1):
            name = printable(prediction.path)
            write_row(file, [name, rank, label, f"{probability:.6g}", *sure])

    return write


def _jsonl(file: TextIO, may_abstain: bool) -> Writer:
    def write(prediction: Prediction) -> None:
        is_sure = prediction.is_sure if may_abstain else None
        line = as_json(printable(prediction.path), prediction.top, is_sure)
        print(line, file=file, flush=True)

    return write


_WRITERS = {"table": _table, "csv": _csv, "jsonl": _jsonl}
