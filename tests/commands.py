"""Run commands, and read the files that they write."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from recipes.cli import main
from transfer import load_meta_graph
from transfer.core.assignments import parse_feeds, parse_renames
from transfer.images.preprocess import parse_size
from transfer.models.plan import ModelPlan, plan


def finetune(out: Path, model: Path, folder: Path, *flags: Any) -> int:
    """Exit status of ``vgg-transfer finetune``; ``flags`` override the short defaults given
    here."""
    arguments = {"--model": model, "--image-folder": folder, "--out": out}
    arguments |= {"--epochs": 3, "--batch-size": 6}
    for default in arguments.keys() & set(flags):
        del arguments[default]
    if "--schedule" in flags:
        del arguments["--epochs"]
    flags = tuple(item for pair in arguments.items() for item in pair) + flags
    return main(["finetune", *map(str, flags)])


def flags_of(command: str) -> dict[str, str]:
    """The flags of a command that ``inspect`` printed."""
    words = shlex.split(command)
    assert words[:2] == ["vgg-transfer", "finetune"]
    pairs = [word.split("=", 1) if word.startswith("--rename=") else [word] for word in words[2:]]
    words = [word for pair in pairs for word in pair]
    return dict(zip(words[::2], words[1::2], strict=True))


def planned(flags: dict[str, str]) -> ModelPlan:
    """The plan with which ``finetune`` begins for these flags."""
    rename = [flags["--rename"]] if "--rename" in flags else []
    graph = load_meta_graph(flags["--model"], rename=parse_renames(rename))
    return plan(
        graph,
        flags.get("--tap"),
        input=flags.get("--input"),
        feeds=parse_feeds([flags["--feed"]] if "--feed" in flags else []),
        preprocess=flags.get("--preprocess"),
        image_size=parse_size(flags["--image-size"]) if "--image-size" in flags else None,
    )


def metrics(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


def saved_values(prefix: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Values of variables in a checkpoint by name; by default of all variables."""
    reader = tf.train.load_checkpoint(str(prefix))
    chosen = reader.get_variable_to_shape_map() if names is None else names
    return {name: reader.get_tensor(name) for name in chosen}


def largest_difference(first: Path, second: Path) -> float:
    """The largest absolute difference between the values of two models with the same variables."""
    before, after = saved_values(first), saved_values(second)
    assert before.keys() == after.keys()
    return max(float(np.max(np.abs(before[name] - after[name]))) for name in before)
