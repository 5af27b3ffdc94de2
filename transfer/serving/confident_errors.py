"""The held-out images that a run got most confidently wrong, and their corrected labels."""

from __future__ import annotations

import csv
import functools
import hashlib
import heapq
import io
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from transfer.core.csv_files import original
from transfer.core.escapes import printable
from transfer.core.files import lock, locked, make_folder, read_text, write_bytes, write_text
from transfer.data.dataset import Source
from transfer.data.fingerprints import ids_digest
from transfer.data.remote_files import is_url
from transfer.images.decoding import read_image
from transfer.runs import run_data, run_folder

CORRECTIONS = "corrections.csv"
"""Manifest of corrected labels in the run folder."""
COPIES = "corrections"
"""Folder beside it, with those images of the manifest that come from datasets without files."""
_LOCK = ".corrections.lock"  # not the run's, which is held as long as the run goes on
_HEADER = ["path", "label"]
_MAX_ERRORS = 60
_MAX_BYTES = 2**27


@dataclass(frozen=True)
class ConfidentError:
    """A held-out image with a wrong prediction of high probability (0..1)."""

    name: str
    label: str
    prediction: str
    probability: float


class ConfidentErrors:
    """The most confident errors of a run's last evaluation, in descending order.

    Args:
        run: the run folder.

    Raises:
        FileNotFoundError: if the run was not evaluated.
        ValueError: if ``predictions.csv`` is not the file that ``evaluate`` writes.
    """

    def __init__(self, run: Path):
        self._run = run
        self._lock = threading.RLock()
        path = run / run_folder.PREDICTIONS
        if not path.is_file():
            raise FileNotFoundError(f"the run has no {path.name}; evaluate it")
        self._names: list[str] = []
        self._evaluated = _evaluated_ids(run)
        try:
            wrong = (row for row in self._read(path) if row.label != row.prediction)
            self.all = heapq.nlargest(_MAX_ERRORS, wrong, key=lambda row: row.probability)
        except (csv.Error, ValueError, IndexError) as error:
            raise ValueError(f"{str(path)!r} is not what evaluate writes: {error}") from error

    def _read(self, path: Path) -> Iterator[ConfidentError]:
        for row in _predictions(path):
            self._names.append(row.name)
            yield row

    def image(self, number: int) -> bytes:
        """The encoded image of an error.

        Raises:
            FileNotFoundError, ValueError: if the image, or the data of the run, are gone.
        """
        split, position = self._position(number)
        (example,) = self._source.examples(split, np.array([position]))
        return bytes(example["image"].numpy())

    def corrected(self) -> list[str | None]:
        """The corrected label of each error, ``None`` if it was not corrected.

        Raises:
            FileNotFoundError, ValueError: see ``image`` and ``correct``.
        """
        labels = self._corrections()
        return [
            labels.get(self._path(number)) if labels else None for number in range(len(self.all))
        ]

    def correct(self, number: int, label: str) -> Path:
        """Write the label of an error to ``corrections.csv``, a manifest for ``fine_tune``.

        All other rows of the file stay as they are.

        Returns:
            The manifest.

        Raises:
            FileNotFoundError, ValueError: see ``image``; or if there is another file of this name.
        """
        path, manifest = self._path(number), self._run / CORRECTIONS
        with self._lock, locked(lock(self._run / _LOCK)):
            labels = self._corrections()
            if path.startswith(f"{COPIES}/") and not (self._run / path).exists():
                make_folder(self._run / COPIES)
                write_bytes(self._run / path, _png(read_image(self.image(number))))
            rows = (labels | {path: label}).items()
            file = io.StringIO()
            csv.writer(file, lineterminator="\n").writerows([_HEADER, *rows])
            write_text(manifest, file.getvalue())
        return manifest

    def _corrections(self) -> dict[str, str]:
        """The corrected labels by path, in the order of the file."""
        path = self._run / CORRECTIONS
        if not path.exists():
            return {}
        rows = list(csv.reader(io.StringIO(read_text(path, _MAX_BYTES), newline="")))
        if rows[:1] != [_HEADER] or any(len(row) != 2 for row in rows):
            raise ValueError(f"{str(path)!r} was not written here; move it away to correct labels")
        return {row[0]: row[1] for row in rows[1:]}

    @functools.cached_property
    def _source(self) -> Source:
        return run_data.open_data(self._run)

    @functools.cached_property
    def _is_unchanged(self) -> bool:
        """Whether the run's data have, under the names of the evaluated images, the same images."""
        if self._evaluated is None:
            return True  # evaluated by a version that did not record them
        ids = {
            printable(name): identity
            for split in self._source.split_names
            for name, identity in zip(
                self._source.names(split), self._source.ids(split), strict=True
            )
        }
        return ids_digest(np.array([ids.get(name, b"") for name in self._names], "S16")) == (
            self._evaluated
        )

    @functools.cached_property
    def _positions(self) -> dict[str, tuple[str, int]]:
        """Split and position of each error's image, by its name."""
        wanted = {error.name for error in self.all}
        return {
            shown: (split, position)
            for split in self._source.split_names
            for position, name in enumerate(self._source.names(split))
            if (shown := printable(name)) in wanted
        }

    def _position(self, number: int) -> tuple[str, int]:
        error = self.all[number]
        with self._lock:
            position = self._positions.get(error.name)
            # Other data may have images of the same name: they must not be shown, or corrected.
            if position is None or self._label(*position) != error.label:
                raise ValueError(
                    f"{error.name!r} of the class {error.label!r} is not an image of the run's "
                    "data; the run was evaluated on other images"
                )
            if not self._is_unchanged:
                raise ValueError(
                    "the run was evaluated on other images, or its images changed since then; "
                    "evaluate it again, without naming images"
                )
        return position

    def _label(self, split: str, position: int) -> str:
        return printable(self._source.class_names[int(self._source.labels(split)[position])])

    def _path(self, number: int) -> str:
        """The path of an error's image in the manifest."""
        split, position = self._position(number)
        name = self._source.names(split)[position]
        return file_of(self._source, name) or f"{COPIES}/{_as_file_name(name)}.png"


def _evaluated_ids(run: Path) -> str | None:
    """Digest of the ids of the images of the last evaluation, if it was recorded."""
    path = run / run_folder.EVALUATION
    return run_folder.read_json(path).get("image_ids_sha256") if path.is_file() else None


def file_of(source: Source, name: str) -> str | None:
    """The absolute path or URL of an image; ``None`` if it is not a file, or cannot be in a
    manifest."""
    if source.members:
        return None  # their names begin with a prefix
    folder, manifest = source.origin.get("image_folder"), source.origin.get("csv")
    if folder is None and manifest is not None and not is_url(manifest):
        folder = os.path.dirname(manifest)
    is_writable = name.isprintable()  # no line breaks, and UTF-8
    if not is_writable or not (folder or is_url(name)):
        return None
    return name if is_url(name) else os.path.join(folder or "", name)


def _predictions(path: Path) -> Iterator[ConfidentError]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if header[:3] != ["image", "label", "prediction"]:
            raise ValueError(f"its first columns are {header[:3]}")
        columns = {name: place for place, name in enumerate(header)}
        for row in rows:
            name, label, prediction = map(original, row[:3])
            # With up to 20 classes, each has a column.
            place = columns.get(f"p({prediction})", columns.get("probability", 3))
            yield ConfidentError(name, label, prediction, float(row[place]))


def _as_file_name(name: str) -> str:
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    return f"{re.sub('[^A-Za-z0-9_-]+', '-', name)[-80:]}-{digest}"


def _png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()
