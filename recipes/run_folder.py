"""The folder of a run: what is in it, under which name, and written so that none sees a half."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import yaml

from transfer.checkpoint import check_path

CONFIG = "config.yaml"
LABELS = "labels.txt"
METRICS = "metrics.json"
HELD_OUT = "held_out.txt"
HISTORY = "history.csv"
EVENTS = "events"
CHECKPOINTS = "checkpoints"
MODEL = "model"
EVALUATION = "evaluation.json"
PREDICTIONS = "predictions.csv"
CONFUSION = "confusion.csv"


def check(out: Path | None, *, resume: bool) -> None:
    """Whether a run may go there.

    Raises:
        FileExistsError: if there is something in it, and ``resume`` is not set.
        FileNotFoundError: if there is no run to resume.
    """
    if out is None:
        raise ValueError("--resume needs the folder of the run: give --out")
    check_path(out.resolve())
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
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_config(run: Path, config: Any) -> None:
    """Write a config dataclass as YAML that ``--config`` reads."""
    write_text(run / CONFIG, to_yaml(config))


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(_plain(config), sort_keys=False)


def check_resumed(run: Path, config: Any) -> None:
    """Whether a run that is resumed has the flags that it began with; only epochs may differ.

    Raises:
        ValueError: names all that differ.
    """
    began, now = read_config(run), _plain(config)
    different = [
        f"--{name.replace('_', '-')} was {began.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(began.keys() | now.keys())
        if name not in ("epochs", "out") and began.get(name) != now.get(name)
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
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def default_out(*words: str) -> Path:
    """``runs/<date-time>-<words>``."""
    from datetime import datetime

    words = tuple(word.replace("/", "-") for word in words)
    return Path("runs", "-".join((datetime.now().strftime("%Y%m%d-%H%M%S"), *words)))
