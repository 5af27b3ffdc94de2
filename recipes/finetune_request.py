"""Builds a ``RunRequest`` from the flags of ``finetune``: opens the model and the images."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import tensorflow as tf

from recipes import console
from recipes.finetune_flags import EMBEDDED, FinetuneConfig
from recipes.flag_values import options_of
from transfer.activations.fingerprints import remembered
from transfer.core.distribution import Replicas
from transfer.data.dataset import Split
from transfer.data.manifest import GROUP
from transfer.finetuning.grow import grown_options, grown_request
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest
from transfer.runs import run_data, run_folder

# Flags recorded in config.yaml besides the options.
_RECORDED = (
    *("feed", "train_split", "eval_split"),
    *("strategy", "deterministic", "skip_unreadable"),
)


def request(config: FinetuneConfig, replicas: Replicas | None = None) -> RunRequest:
    """Open the model and the images.

    Raises:
        ValueError, OSError: see the library functions.
    """
    options, arguments = _checked(config, replicas)
    graph = config.open_model()
    train, held_out = _splits(config, resumed=config.out if config.resume else None)
    return RunRequest(graph, train, held_out, options, **arguments)


def grown(config: FinetuneConfig, run: Path, replicas: Replicas | None = None) -> RunRequest:
    """Open the images to add to a finished run, and the model of the run.

    Raises:
        ValueError, OSError: see the library functions.
    """
    if not (config.image_folder or config.csv or config.dataset or config.data_dir):
        raise ValueError(
            f"add={run} needs images to add to the run: image_folder=FOLDER or csv=FILE"
        )
    settings = run_folder.read_config(run)
    for name in ("feed", "rename"):  # those of the run, unless they are given
        if settings.get(name) and not getattr(config, name):
            config = replace(config, **{name: settings[name]})
    # A column groups the rows of a manifest, a regular expression the paths of a folder. The column
    # group is found without being named.
    group_by = settings.get("group_by")
    same = any(getattr(config, kind) and settings.get(kind) for kind in ("csv", "image_folder"))
    if same and group_by and not config.group_by and not (config.csv and group_by == GROUP):
        config = replace(config, group_by=group_by)
    options, arguments = _checked(config, replicas)
    grown_options(run, options)  # before the images are opened
    is_own = config.model in (EMBEDDED, settings.get("model"))
    if is_own and not (config.feed or config.rename):
        graph = None  # the library opens it
    else:
        model = settings.get("model") if is_own else config.model
        graph = replace(config, model=str(model)).open_model()
    train, held_out = _splits(config, min_classes=1, allow_no_eval=True)
    return grown_request(run, train, held_out, options, graph=graph, **arguments)


def _checked(
    config: FinetuneConfig, replicas: Replicas | None
) -> tuple[FineTuneOptions, dict[str, Any]]:
    """The options, and the arguments of ``RunRequest`` that need neither model nor images."""
    options = options_of(FineTuneOptions, config)
    config.check()
    replicas = replicas or Replicas()
    if replicas.is_chief and (config.out is not None or config.resume):
        run_folder.check(config.out, resume=config.resume)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    return options, {
        "feeds": config.feeds,
        "run_dir": config.out,
        "resume": config.resume,
        "recorded": {name: getattr(config, name) for name in _RECORDED},
        "command": ["vgg-transfer", *sys.argv[1:]],
        "verbose": console.verbosity(),
        "replicas": replicas,
    }


def _splits(
    config: FinetuneConfig,
    *,
    min_classes: int = 2,
    allow_no_eval: bool = False,
    resumed: Path | None = None,
) -> tuple[Split, Split]:
    source = config.open(min_classes)
    on_disk = remembered(source, config.cache_dir) if config.cache == "disk" else None
    with on_disk or contextlib.nullcontext():
        return run_data.splits(
            source,
            config.train_split,
            config.eval_split,
            skip_unreadable=config.skip_unreadable,
            allow_no_eval=allow_no_eval,
            resumed=resumed,
            progress=console.decoding,
        )
