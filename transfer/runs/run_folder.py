"""The run folder: file names, lock, configuration and history."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from transfer.core import files, yaml_files
from transfer.core.files import read_text
from transfer.core.files import write_text as write_text
from transfer.layers.classifier import MODEL as MODEL
from transfer.models.checkpoint import check_path

CONFIG = "config.yaml"
LABELS = "labels.txt"
METRICS = "metrics.json"
HELD_OUT = "held_out.txt"
TRAINING = "training.txt"
SOURCES = "sources.json"
HISTORY = "history.csv"
PROVENANCE = "provenance.json"
TRACKING = "tracking.json"
EVENTS = "events"
CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation.json"
PREDICTIONS = "predictions.csv"
CONFUSION = "confusion.csv"
CLASS_MEANS = "class_means.npy"
CHANGES_RESULT = ("epochs", "fc_epochs", "calibrate")
"""Options that may differ in a resumed run although its result depends on them."""
_MAY_DIFFER = (
    *CHANGES_RESULT,
    *("out", "strategy", "track", "track_files"),
    *("cache_dir", "cache_limit", "checkpoint_minutes"),
)
"""Options that may differ in a resumed run."""
_MAX_JSON_BYTES = 2**26  # metrics of tens of thousands of classes

_WORKING_FILES = (
    rf"{CHECKPOINTS}/{files.CHECKPOINT_FILES.pattern}"
    rf"|{EVENTS}/(.+/)?events\.out\.tfevents\.[^/]+"
)
_RUN_FILES = (
    r"\.lock|(config\.yaml|(labels|held_out|training)\.txt|history\.csv)"
    r"|(metrics|provenance|sources|limits|tracking)\.json"
    rf"|checkpoint|{MODEL}(-\d+)?\.(meta|json|index|data-\d{{5}}-of-\d{{5}})|{_WORKING_FILES}"
)
"""Relative paths of the files that a run writes."""


def check(out: Path | None, *, resume: bool) -> None:
    """Check that a run may be written to a folder.

    Raises:
        FileExistsError: if the folder is not empty, and ``resume`` is false.
        FileNotFoundError: if ``resume`` is true and the folder holds other files than a run's. A
            new or empty folder is accepted: the run may have been killed before its first file.
    """
    if out is None:
        raise ValueError("resume=True needs the folder of the run")
    check_path(out.resolve())
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{str(out)!r} is a file; expected a folder to write the run to")
    is_empty = not out.is_dir() or all(_is_temporary(path) for path in out.iterdir())
    if is_empty or (resume and _has_begun(out)):
        return
    if resume:
        raise FileNotFoundError(f"{str(out)!r} holds no run to resume: it has no {CONFIG}")
    raise FileExistsError(
        f"{str(out)!r} is not empty; choose another run_dir, or resume=True to continue its run"
    )


@contextlib.contextmanager
def opened(
    out: Path,
    config: Mapping[str, Any],
    *,
    resume: bool = False,
    defaults: Mapping[str, Any] | None = None,
    may_differ: Collection[str] = (),
    fixed: Collection[str] = (),
) -> Iterator[None]:
    """Lock a run folder and write the configuration; see ``check``.

    Args:
        out: the folder.
        config: the options of the run.
        resume: continue the run in the folder.
        defaults: values of options that did not exist when a resumed run was started.
        may_differ: options that may differ in a resumed run, in addition to those that always may.
        fixed: options that may not differ, such as ``CHANGES_RESULT`` of runs that are compared.

    Raises:
        BlockingIOError: if another process uses the folder.
        ValueError: if the run is resumed with a different configuration.
    """
    check(out, resume=resume)
    out.mkdir(parents=True, exist_ok=True)
    with files.locked_folder(out):
        for name in (EVENTS, CHECKPOINTS):
            # Files of events are never written again: each process begins its own.
            inside = (path for path in (out / name).glob("*") if not path.is_file())
            for folder in (out / name, *inside):
                files.refuse_link(folder)
        files.remove_drafts(out)  # left by a run that was killed while saving its model
        if resume and _has_begun(out):
            free = {*_MAY_DIFFER, *may_differ} - {*fixed}
            _check_resumed(out, config, defaults or {}, free)
        write_text(out / CONFIG, to_yaml(config))
        yield


def check_present(run: Path) -> None:
    """Check that the folder of a run that goes on still holds its configuration.

    Raises:
        FileNotFoundError: if it does not, with what happened.
    """
    if not _has_begun(run):
        raise FileNotFoundError(
            f"{str(run)!r} was removed while the run went on, or its {CONFIG}; the run is lost"
        )


def remove(run: Path, *, only_working: bool = False) -> None:
    """Delete the files of a run and its folder, or only its checkpoints and events. Other files and
    their folders are kept.

    Raises:
        BlockingIOError: if another process works in the folder.
    """
    if not run.is_dir():
        return
    with files.locked_folder(run):
        files.remove_drafts(run)
        names = _WORKING_FILES if only_working else _RUN_FILES
        files.remove_folder(run, re.compile(names))


def files_of(run: Path) -> list[Path]:
    """The files of a run and of its evaluation, without checkpoints, events and other people's."""
    names = re.compile(
        rf"{_RUN_FILES}|{EVALUATION}|{PREDICTIONS}|{CONFUSION}|{CLASS_MEANS}|report\.html"
    )
    return [
        path
        for path in sorted(run.iterdir())
        if names.fullmatch(path.name) and path.is_file() and not path.is_symlink()
        if path.name not in (files.LOCK, TRACKING)
    ]


def _is_temporary(path: Path) -> bool:
    """Whether a file is the lock, or an unfinished file."""
    return path.name == files.LOCK or (path.name.startswith(".") and path.suffix == ".tmp")


def _has_begun(out: Path) -> bool:
    return (out / CONFIG).is_file()


def num_epochs(run: Path) -> int:
    """Number of epochs in ``history.csv``, without an incomplete line."""
    path = run / HISTORY
    return len(_epoch_lines(path)) if path.is_file() else 0


def keep_history(run: Path, epochs: int) -> None:
    """Keep the first ``epochs`` epochs of ``history.csv``; drops later ones, which will be
    repeated, and an incomplete line."""
    path = run / HISTORY
    if not path.is_file():
        files.unshare(path)  # a broken link, which the next epoch would write through
        return
    with path.open(newline="", encoding="utf-8") as file:
        header = file.readline()
    kept = [line for line in _epoch_lines(path) if float(line.split(",")[0]) < epochs]
    if not kept:
        path.unlink()  # with its header, which the next epoch writes again
        return
    write_text(path, "".join([header, *kept]))


def _epoch_lines(path: Path) -> list[str]:
    """The complete lines of ``history.csv`` after its header."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *lines = file.readlines() or [""]
    return [it for it in lines if it.endswith("\n") and it.count(",") == header.count(",")]


def read_history(run: Path) -> dict[str, list[float]]:
    """The columns of ``history.csv``; empty before the end of the first epoch."""
    path = run / HISTORY
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else {})}


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file written by ``write_json``.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it does not hold a JSON object.
    """
    try:
        values = json.loads(read_text(path, _MAX_JSON_BYTES), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not a JSON file of a run: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} holds a {type(values).__name__}; expected a JSON object")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def add_to_metrics(run: Path, name: str, metrics: Any) -> None:
    """Add an entry to a run's ``metrics.json``."""
    path = run / METRICS
    write_json(path, read_json(path) | {name: metrics})


def to_yaml(config: Mapping[str, Any]) -> str:
    """The text of ``config.yaml`` for some options."""
    return yaml_files.to_yaml(_plain(config))


def _check_resumed(
    run: Path, config: Mapping[str, Any], defaults: Mapping[str, Any], may_differ: Collection[str]
) -> None:
    """Refuse to resume a run with different options."""
    began = {**_plain(defaults), **read_config(run)}
    now = _plain(config)
    different = [
        f"{name}={began.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(began.keys() | now.keys())
        if name not in may_differ
        and began.get(name) != now.get(name)
        and (name in began or now[name])  # an option that is newer than the run, and off
        and not (began.get(name) is False and name not in now)  # off, which was then recorded
    ]
    if different:
        raise ValueError(
            f"cannot resume the run in {str(run)!r} with other options ({'; '.join(different)}); "
            f"{run / CONFIG} has those that it began with"
        )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in YAML types, without options that are not set."""
    values = {
        key: value for key, value in config.items() if value not in (None, ()) and key != "resume"
    }
    kinds = {tuple: list, Path: str}
    for key, value in values.items():
        for kind, convert in kinds.items():
            if isinstance(value, kind):
                values[key] = convert(value)
    return values


def read_config(run: Path) -> dict[str, Any]:
    """The resolved flags of a finished or running run.

    Raises:
        FileNotFoundError: if the folder holds no run.
    """
    path = run / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{str(run)!r} is not a run folder: it has no {CONFIG}")
    return yaml_files.read_flags(path)


def create(out: Path) -> Path:
    """Create a folder that no other run has, and return it: ``out``, or if that exists, the first
    of ``out-2``, ``out-3`` and so on that does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder, number = out, 1
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        number += 1
        folder = out.with_name(f"{out.name}-{number}")


def default_out(*words: str) -> Path:
    """``runs/<date-time>-<words>``; see ``create``, as runs may start in the same second."""
    from datetime import datetime

    words = tuple(word.replace("/", "-") for word in words)
    return Path("runs", "-".join((datetime.now().strftime("%Y%m%d-%H%M%S"), *words)))
