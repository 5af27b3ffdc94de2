"""Builds a ``RunRequest`` from the flags of ``finetune``: opens the model and the images."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import tensorflow as tf

from recipes import console
from recipes.finetune_flags import EMBEDDED, FinetuneConfig
from recipes.network_flags import parse_feed, parse_renames
from transfer.activations.fingerprints import remembered
from transfer.core.distribution import Replicas
from transfer.data.dataset import Split
from transfer.finetuning.grow import grown_options, grown_request
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest
from transfer.models.meta_graph import load_meta_graph
from transfer.runs import run_data, run_folder

# Flags recorded in config.yaml besides the options.
_RECORDED = (
    "feed",
    "rename",
    "train_split",
    "eval_split",
    "strategy",
    "deterministic",
    "skip_unreadable",
)
_OF_MODEL = ("feed", "rename")


def request(config: FinetuneConfig, replicas: Replicas | None = None) -> RunRequest:
    """Open the model and the images.

    Raises:
        ValueError, OSError: see the library functions.
    """
    options, arguments = _checked(config, replicas)
    graph = load_meta_graph(config.model, rename=parse_renames(config.rename))
    train, held_out = _splits(config, resumed=config.out if config.resume else None)
    feeds = dict(parse_feed(assignment) for assignment in config.feed)
    return RunRequest(graph, train, held_out, options, feeds=feeds, **arguments)


def grown(config: FinetuneConfig, run: Path, replicas: Replicas | None = None) -> RunRequest:
    """Open the images to add to a finished run, and the model of the run.

    Raises:
        ValueError, OSError: see the library functions.
    """
    options, arguments = _checked(config, replicas)
    if not (config.image_folder or config.csv or config.dataset or config.data_dir):
        raise ValueError(
            f"add={run} needs images to add to the run: image_folder=FOLDER or csv=FILE"
        )
    grown_options(run, options)  # before the images are opened
    settings = run_folder.read_config(run)
    if config.group_by is None and settings.get("group_by"):
        config = replace(config, group_by=settings["group_by"])
    of_model = {name: getattr(config, name) or settings.get(name, ()) for name in _OF_MODEL}
    model = settings.get("model") if config.model == EMBEDDED else config.model
    graph = None
    if any(of_model.values()) or model != settings.get("model"):
        graph = load_meta_graph(str(model), rename=parse_renames(of_model["rename"]))
    train, held_out = _splits(config, min_classes=1)
    arguments["recorded"] |= of_model
    feeds = dict(parse_feed(assignment) for assignment in of_model["feed"])
    return grown_request(run, train, held_out, options, graph=graph, feeds=feeds, **arguments)


def _checked(
    config: FinetuneConfig, replicas: Replicas | None
) -> tuple[FineTuneOptions, dict[str, Any]]:
    """The options, and the arguments of ``RunRequest`` that need neither model nor images."""
    options = options_of(config)
    config.check()
    replicas = replicas or Replicas()
    if replicas.is_chief and (config.out is not None or config.resume):
        run_folder.check(config.out, resume=config.resume)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    return options, {
        "run_dir": config.out,
        "resume": config.resume,
        "recorded": {name: getattr(config, name) for name in _RECORDED},
        "command": ["vgg-transfer", *sys.argv[1:]],
        "verbose": console.verbosity(),
        "replicas": replicas,
    }


def _splits(
    config: FinetuneConfig, *, min_classes: int = 2, resumed: Path | None = None
) -> tuple[Split, Split]:
    source = config.open(min_classes)
    on_disk = remembered(source, config.cache_dir) if config.cache == "disk" else None
    with on_disk or contextlib.nullcontext():
        return run_data.splits(
            source,
            config.train_split,
            config.eval_split,
            skip_unreadable=config.skip_unreadable,
            resumed=resumed,
            progress=console.decoding,
        )


def options_of(config: FinetuneConfig) -> FineTuneOptions:
    """The flags that are options of ``fine_tune``."""
    return FineTuneOptions(
        **{option.name: getattr(config, option.name) for option in fields(FineTuneOptions)}
    )


def flags_of(config: Any) -> dict[str, Any]:
    """All flags of a subcommand, for ``config.yaml``."""
    return {option.name: getattr(config, option.name) for option in fields(config)}
