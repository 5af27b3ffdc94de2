"""What ``vgg-transfer predict`` does; its flags are in ``recipes.predict``."""

from __future__ import annotations

import glob
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np
import tensorflow as tf
from PIL import Image
from tqdm import tqdm

from recipes import terminal
from recipes.predict import PredictConfig
from recipes.predict_beam import PredictBeamConfig
from transfer import Classifier
from transfer.activations.extraction import Compiled
from transfer.core.csv_files import write_row
from transfer.core.files import replacing
from transfer.evaluation.explain import grad_cam, overlay
from transfer.images import image_files
from transfer.images.decoding import read_image
from transfer.images.image_files import PassedOver, PixelBudget
from transfer.images.preprocess import Preprocess, to_channels
from transfer.runs import run_folder

_READERS = 4  # threads; decoding lets go of Python's lock

Prediction = list[tuple[str, float]]


def run(model: Path, images: Sequence[str], config: PredictConfig, results: TextIO) -> int:
    """Predict, write to ``results``, and return how many images could not be read.

    Only a few batches are in memory at any time, however many images there are.

    Raises:
        FileNotFoundError, ValueError: if there is no such model, or no image.
    """
    check(config)
    if not images:
        raise ValueError("no images are named; give files, folders, patterns, or - for a list")
    is_run = (model / run_folder.CONFIG).is_file()
    classifier = Classifier.load(model / run_folder.MODEL if is_run else model)
    network = Compiled(classifier.probabilities_of_resized)
    explain = None if config.explain is None else Explainer(classifier, config.explain)
    write = _WRITERS[config.format](results)
    passed_over = PassedOver()
    done = num_failed = 0
    start = time.perf_counter()
    with tqdm(unit="image", file=sys.stderr, mininterval=1.0, leave=False) as bar:
        paths = find_images(images, passed_over)
        for names, pixels, failures in _batches(paths, classifier, config.batch_size):
            for name, reason in failures:
                bar.clear()
                terminal.say(f"error: {name}: {reason}")
            num_failed += len(failures)
            if names:
                probabilities = np.asarray(network(tf.stack(pixels)))
                for name, row in zip(names, probabilities, strict=True):
                    write(name, top(row, classifier.labels, config.top_k))
                if explain is not None:
                    explain(names, tf.stack(pixels), probabilities.argmax(-1))
            done += len(names)
            bar.update(len(names) + len(failures))
    if not done + num_failed:
        reasons = "".join(f"; {line}" for line in passed_over.describe())
        raise ValueError(f"no image was found in what was named{reasons}")
    for line in passed_over.describe():
        print(f"warning: {line}", file=sys.stderr)
    rate = done / (time.perf_counter() - start)
    failed = f", {num_failed} could not be read" if num_failed else ""
    print(f"{done} images, {rate:.1f} images/s{failed}", file=sys.stderr)
    return num_failed


def check(config: PredictConfig | PredictBeamConfig) -> None:
    """Raises:
    ValueError: if a number makes no sense.
    """
    for name in ("top_k", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name.replace('_', ' ')} must be at least 1")


class Explainer:
    """Writes a picture for each image, with the part of it in red that the prediction came from."""

    def __init__(self, classifier: Classifier, folder: Path):
        self._normalize = classifier.preprocess.normalize
        self._grad_cam = grad_cam(classifier)
        self._folder = folder
        self._count = 0
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, names: Sequence[str], pixels: tf.Tensor, classes: np.ndarray) -> None:
        heats = self._grad_cam(self._normalize(pixels), classes)
        for name, image, heat in zip(names, pixels.numpy(), heats, strict=True):
            self._count += 1
            path = self._folder / f"{self._count:06d}-{Path(name).stem}.png"
            with replacing(path) as temporary:
                Image.fromarray(overlay(image, heat)).save(temporary, "PNG")


def find_images(words: Iterable[str], passed_over: PassedOver) -> Iterator[Path]:
    """The files that words mean, one after the other: folders are searched for images, patterns are
    resolved, ``-`` reads a path a line from standard input. Files of folders that are not images go
    to ``passed_over``."""
    for word in words:
        path = Path(word).expanduser()
        if word == "-":
            # As bytes: names of files need not be UTF-8.
            lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
            yield from (Path(line) for line in lines if line.strip())
        elif path.exists() or not glob.has_magic(word):
            yield from _in_folder(path, passed_over) if path.is_dir() else (path,)
        else:
            for found in map(Path, glob.iglob(str(path), recursive=True)):
                # Where ** is, what is in a folder is found by itself.
                if not found.is_dir():
                    yield found
                elif "**" not in word:
                    yield from _in_folder(found, passed_over)


def top(probabilities: np.ndarray, labels: Sequence[str], count: int) -> Prediction:
    """The most probable classes, the first of equals first."""
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [(labels[index], float(probabilities[index])) for index in order]


def _in_folder(folder: Path, passed_over: PassedOver) -> Iterator[Path]:
    return image_files.find(folder, passed_over, in_order=True)


def _batches(
    paths: Iterable[Path], classifier: Classifier, batch_size: int
) -> Iterator[tuple[list[str], list[tf.Tensor], list[tuple[str, str]]]]:
    """Names and resized images of each batch, and the names of what could not be read with the
    reasons; the next batches are read while one is predicted."""
    prepare = prepare_images(classifier.preprocess)
    budget = PixelBudget()

    def read(path: Path) -> tf.Tensor:
        with budget.hold(path):
            return prepare(read_image(image_files.read(path)))

    with ThreadPoolExecutor(_READERS) as pool:
        waiting: list[tuple[Path, Future]] = []
        paths = iter(paths)
        while True:
            wanted = 2 * batch_size - len(waiting)
            waiting += [(path, pool.submit(read, path)) for path in islice(paths, wanted)]
            if not waiting:
                return
            batch, waiting = waiting[:batch_size], waiting[batch_size:]
            names, images, failures = [], [], []
            for path, future in batch:
                try:
                    images.append(future.result())
                    names.append(_shown(path))
                except Exception as error:  # a damaged file makes its reader raise anything
                    failures.append((_shown(path), reason(error)))
            yield names, images, failures


def prepare_images(preprocess: Preprocess) -> Callable[[np.ndarray], tf.Tensor]:
    """From pixels, uint8 ``[height, width, 3]``, to float32 ``[size, size, channels]``, 0..255."""
    return tf.function(
        lambda image: preprocess.resize(to_channels(image, preprocess.channels)),
        input_signature=[tf.TensorSpec([None, None, 3], tf.uint8)],
        autograph=False,
    )


def reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ValueError):
        return str(error)
    return f"it cannot be read ({type(error).__name__}: {str(error)[:200]})"


def _shown(path: Path) -> str:
    """A name that can be written: bytes that are no text are shown by their numbers."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def _table(file: TextIO) -> Callable[[str, Prediction], None]:
    def write(name: str, found: Prediction) -> None:
        cells = "  ".join(f"{label} {probability:.4f}" for label, probability in found)
        print(terminal.escaped(f"{name}  {cells}"), file=file, flush=True)

    return write


def _csv(file: TextIO) -> Callable[[str, Prediction], None]:
    write_row(file, ["image", "rank", "label", "probability"])

    def write(name: str, found: Prediction) -> None:
        for rank, (label, probability) in enumerate(found, 1):
            write_row(file, [name, rank, label, f"{probability:.6g}"])

    return write


def _jsonl(file: TextIO) -> Callable[[str, Prediction], None]:
    def write(name: str, found: Prediction) -> None:
        print(as_json(name, found), file=file, flush=True)

    return write


def as_json(name: str, found: Prediction) -> str:
    """A line of ``--format jsonl``."""
    predictions = [{"label": label, "probability": p} for label, p in found]
    line = json.dumps({"image": name, "predictions": predictions}, ensure_ascii=False)
    return terminal.escaped_json(line)


_WRITERS = {"table": _table, "csv": _csv, "jsonl": _jsonl}
