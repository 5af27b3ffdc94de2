"""Builds a ``RunRequest`` from the flags of ``finetune``: opens the model and the images."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import fields
from typing import Any

import tensorflow as tf

from recipes import console
from recipes.finetune_flags import FinetuneConfig
from recipes.network_flags import parse_feed, parse_renames
from transfer.activations.fingerprints import remembered
from transfer.core.distribution import Replicas
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.setup import RunRequest
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


def request(config: FinetuneConfig, replicas: Replicas | None = None) -> RunRequest:
    """Open the model and the images.

    Raises:
        ValueError, OSError: see the library functions.
    """
    config.check()
    replicas = replicas or Replicas()
    if replicas.is_chief and (config.out is not None or config.resume):
        run_folder.check(config.out, resume=config.resume)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    graph = load_meta_graph(config.model, rename=parse_renames(config.rename))
    source = config.open()
    on_disk = remembered(source, config.cache_dir) if config.cache == "disk" else None
    with on_disk or contextlib.nullcontext():
        train, held_out = run_data.splits(
            source,
            config.train_split,
            config.eval_split,
            skip_unreadable=config.skip_unreadable,
            resumed=config.out if config.resume else None,
            progress=console.decoding,
        )
    recorded = {name: getattr(config, name) for name in _RECORDED}
    return RunRequest(
        graph,
        train,
        held_out,
        options_of(config),
        feeds=dict(parse_feed(assignment) for assignment in config.feed),
        run_dir=config.out,
        resume=config.resume,
        recorded=recorded,
        command=["vgg-transfer", *sys.argv[1:]],
        verbose=console.verbosity(),
        replicas=replicas,
    )


def options_of(config: FinetuneConfig) -> FineTuneOptions:
    """The flags that are options of ``fine_tune``."""
    return FineTuneOptions(
        **{option.name: getattr(config, option.name) for option in fields(FineTuneOptions)}
    )


def flags_of(config: Any) -> dict[str, Any]:
    """All flags of a subcommand, for ``config.yaml``."""
    return {option.name: getattr(config, option.name) for option in fields(config)}
