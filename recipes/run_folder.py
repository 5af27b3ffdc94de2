"""The folder of a run: what is in it, under which name, and written so that none sees a half."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path, PosixPath, WindowsPath
from typing import Any

import yaml

CONFIG = "config.yaml"
LABELS = "labels.txt"
METRICS = "metrics.json"
HISTORY = "history.csv"
EVENTS = "events"
CHECKPOINTS = "checkpoints"
MODEL = "model"
EVALUATION = "evaluation.json"
PREDICTIONS = "predictions.csv"
CONFUSION = "confusion.csv"


def check(out: Path, *, resume: bool) -> None:
    """Whether a run may go there.

    Raises:
        FileExistsError: if there is something in it, and ``resume`` is not set.
        FileNotFoundError: if there is no run to resume.
    """
    if resume and not (out / CONFIG).is_file():
        raise FileNotFoundError(f"{str(out)!r} holds no run to resume: it has no {CONFIG}")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{str(out)!r} is a file; expected a folder to write the run to")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise FileExistsError(
            f"{str(out)!r} is not empty; choose another --out, or --resume to continue its run"
        )


def create(out: Path, *, resume: bool) -> Path:
    """Make the folder of a run, or take that of the run to resume; see ``check``."""
    check(out, resume=resume)
    out.mkdir(parents=True, exist_ok=True)
    return out.resolve()


def write_text(path: Path, text: str) -> None:
    """Write a file at once: to a temporary name first, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_config(run: Path, config: Any) -> None:
    """Write a config dataclass as YAML that ``--config`` reads."""
    plain = {tuple: list, PosixPath: str, WindowsPath: str}
    values = {
        key: plain.get(type(value), lambda same: same)(value)
        for key, value in dataclasses.asdict(config).items()
        if value not in (None, ()) and key != "resume"
    }
    write_text(run / CONFIG, yaml.safe_dump(values, sort_keys=False))


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
