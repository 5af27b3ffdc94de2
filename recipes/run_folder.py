"""The folder of a run: what is in it, under which name, and written so that none sees a half."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from recipes import yaml_files
from transfer.checkpoint import check_path
from transfer.files import read_text, write_text

CONFIG = "config.yaml"
LABELS = "labels.txt"
METRICS = "metrics.json"
HELD_OUT = "held_out.txt"
HISTORY = "history.csv"
PROVENANCE = "provenance.json"
EVENTS = "events"
CHECKPOINTS = "checkpoints"
MODEL = "model"
EVALUATION = "evaluation.json"
PREDICTIONS = "predictions.csv"
CONFUSION = "confusion.csv"
_LOCK = ".lock"
_MAX_JSON_BYTES = 2**26  # metrics of tens of thousands of classes


def check(out: Path | None, *, resume: bool) -> None:
    """Whether a run may go there.

    Raises:
        FileExistsError: if there is something in it, and ``resume`` is not set.
        FileNotFoundError: if it is to be resumed, and what is there is no run. Where there is
            nothing at all the run begins: it may have been killed before it had written anything.
    """
    if out is None:
        raise ValueError("--resume needs the folder of the run: give --out")
    check_path(out.resolve())
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{str(out)!r} is a file; expected a folder to write the run to")
    is_empty = not out.is_dir() or all(_is_passing(path) for path in out.iterdir())
    if is_empty or (resume and _has_begun(out)):
        return
    if resume:
        raise FileNotFoundError(f"{str(out)!r} holds no run to resume: it has no {CONFIG}")
    raise FileExistsError(
        f"{str(out)!r} is not empty; choose another --out, or --resume to continue its run"
    )


@contextlib.contextmanager
def opened(config: Any) -> Iterator[None]:
    """Take the folder ``config.out`` for a run, with its flags written down; see ``check``.

    Raises:
        BlockingIOError: if another process has it.
        ValueError: if the run is resumed with other flags than those that it began with.
    """
    out = config.out
    check(out, resume=config.resume)
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(out / _LOCK).acquire(timeout=0)
    except filelock.Timeout:
        raise BlockingIOError(
            f"another process works in {str(out)!r}; wait for it, or choose another --out"
        ) from None
    with lock:
        for left in out.glob(".saving-*"):  # of a run that was killed while it saved its model
            shutil.rmtree(left, ignore_errors=True)
        if config.resume and _has_begun(out):
            _check_resumed(out, config)
        write_text(out / CONFIG, to_yaml(config))
        yield


def _is_passing(path: Path) -> bool:
    """Whether it is no work: the lock, or a file that was not finished."""
    return path.name == _LOCK or (path.name.startswith(".") and path.suffix == ".tmp")


def _has_begun(out: Path) -> bool:
    return (out / CONFIG).is_file()


def keep_history(run: Path, epochs: int) -> None:
    """Forget what ``history.csv`` says of epochs, counted from 0, that are to be done again; and
    of one whose line was cut short."""
    path = run / HISTORY
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        lines = file.readlines()
    commas = lines[0].count(",") if lines else 0
    kept = [
        line
        for line in lines[1:]
        if line.endswith("\n") and line.count(",") == commas and float(line.split(",")[0]) < epochs
    ]
    if not kept:
        path.unlink()  # with its header, which the next epoch writes
        return
    write_text(path, "".join([lines[0], *kept]))


def read_history(run: Path) -> dict[str, list[float]]:
    """The columns of ``history.csv``; none where no epoch is done."""
    path = run / HISTORY
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else {})}


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote.

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


def add_to_metrics(run: Path, name: str, figures: Any) -> None:
    """Write figures into a run's ``metrics.json``, beside those of its training."""
    path = run / METRICS
    write_json(path, read_json(path) | {name: figures})


def to_yaml(config: Any) -> str:
    return yaml_files.to_yaml(_plain(config))


def _check_resumed(run: Path, config: Any) -> None:
    """Whether a run that is resumed has the flags that it began with. Epochs may differ, and what
    has no part in the result."""
    began, now = read_config(run), _plain(config)
    may_differ = ("epochs", "fc_epochs", "out", "strategy")
    different = [
        f"--{name.replace('_', '-')} was {began.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(began.keys() | now.keys())
        if name not in may_differ and began.get(name) != now.get(name)
    ]
    if different:
        raise ValueError(
            f"cannot resume the run in {str(run)!r} with other flags: {', '.join(different)}; "
            f"give --config {run / CONFIG} with --resume"
        )


def _plain(config: Any) -> dict[str, Any]:
    """What a config says, in YAML's own types."""
    values = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if value not in (None, ()) and key != "resume"
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
        raise FileNotFoundError(f"{str(run)!r} is no run folder: it has no {CONFIG}")
    return yaml_files.read_flags(path)


def default_out(*words: str) -> Path:
    """``runs/<date-time>-<words>``."""
    from datetime import datetime

    words = tuple(word.replace("/", "-") for word in words)
    return Path("runs", "-".join((datetime.now().strftime("%Y%m%d-%H%M%S"), *words)))
