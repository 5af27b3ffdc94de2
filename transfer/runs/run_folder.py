"""The folder of a run: names of its files, its lock, its configuration and its history."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import yaml

from transfer.checkpoint import check_path
from transfer.files import write_text

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


def check(out: Path | None, *, resume: bool) -> None:
    """Whether a run may go there.

    Raises:
        FileExistsError: if there is something in it, and ``resume`` is not set.
        FileNotFoundError: if it is to be resumed, and what is there is no run. Where there is
            nothing at all the run begins: it may have been killed before it had written anything.
    """
    if out is None:
        raise ValueError("resume=True needs the folder of the run")
    check_path(out.resolve())
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{str(out)!r} is a file; expected a folder to write the run to")
    is_empty = not out.is_dir() or all(_is_passing(path) for path in out.iterdir())
    if is_empty or (resume and _has_begun(out)):
        return
    if resume:
        raise FileNotFoundError(f"{str(out)!r} holds no run to resume: it has no {CONFIG}")
    raise FileExistsError(
        f"{str(out)!r} is not empty; choose another folder, or resume=True to continue its run"
    )


@contextlib.contextmanager
def opened(out: Path, config: Mapping[str, Any], *, resume: bool = False) -> Iterator[None]:
    """Take a folder for a run and write its configuration; see ``check``.

    Raises:
        BlockingIOError: if another process uses it.
        ValueError: if the run is resumed with another configuration.
    """
    check(out, resume=resume)
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(out / _LOCK).acquire(timeout=0)
    except filelock.Timeout:
        raise BlockingIOError(
            f"another process works in {str(out)!r}; wait for it, or choose another folder"
        ) from None
    with lock:
        for left in out.glob(".saving-*"):  # of a run that was killed while it saved its model
            shutil.rmtree(left, ignore_errors=True)
        if resume and _has_begun(out):
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


def add_to_metrics(run: Path, name: str, figures: Any) -> None:
    """Write figures into a run's ``metrics.json``, beside those of its training."""
    path = run / METRICS
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {name: figures})


def to_yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(_plain(config), sort_keys=False)


def _check_resumed(run: Path, config: Mapping[str, Any]) -> None:
    """Whether a run that is resumed has the flags that it began with. Epochs may differ, and what
    has no part in the result."""
    began, now = read_config(run), _plain(config)
    may_differ = ("epochs", "fc_epochs", "out", "strategy")
    different = [
        f"{name} was {began.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(began.keys() | now.keys())
        if name not in may_differ and began.get(name) != now.get(name)
    ]
    if different:
        raise ValueError(
            f"cannot resume the run in {str(run)!r} with other options: {', '.join(different)}; "
            f"{run / CONFIG} has those that it began with"
        )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in YAML's own types, without what is not set."""
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
        raise FileNotFoundError(f"{str(run)!r} is no run folder: it has no {CONFIG}")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def default_out(*words: str) -> Path:
    """``runs/<date-time>-<words>``."""
    from datetime import datetime

    words = tuple(word.replace("/", "-") for word in words)
    return Path("runs", "-".join((datetime.now().strftime("%Y%m%d-%H%M%S"), *words)))
