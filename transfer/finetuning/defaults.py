"""Options that were given, else those of the resumed run, else the defaults."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any, Literal, cast

from transfer.core import measurement
from transfer.data.dataset import Split
from transfer.finetuning.hyperparameters import (
    BATCH,
    Stage,
    choose_solver,
    default_batch_size,
    trains_cached_head,
    trains_head_only,
)
from transfer.finetuning.label_smoothing import choose_smoothing
from transfer.finetuning.options import ResolvedOptions
from transfer.finetuning.request import RunRequest
from transfer.finetuning.tap_choice import choose_tap
from transfer.layers.backbone import Backbone
from transfer.layers.classifier import Classifier
from transfer.runs import run_folder
from transfer.training.ridge import is_solvable

logger = logging.getLogger(__name__)

EMA = 0.999
"""Decay of the moving average of the weights."""


def best_tap(request: RunRequest, train: Split) -> str:
    """The tap of the resumed run, else the one that is best on the training images."""
    if isinstance(recorded := _recorded(request).get("tap"), str):
        return recorded
    choice = choose_tap(
        request.graph,
        train,
        request.options,
        request.feeds,
        lambda taps: measurement.progress(taps, "features", "tap") if request.verbose else taps,
    )
    return choice.best.tap


def solver_of(
    request: RunRequest, backbone: Backbone, num_images: int, width: int
) -> Literal["gradient", "ridge", "lbfgs"]:
    """The solver that was given, else that of the resumed run, else the default."""
    options = request.options
    if options.solver == "auto" and request.callbacks:
        return "gradient"  # only its epochs call them
    if options.solver == "auto" and (config := _recorded(request)):
        recorded = config.get("solver", "gradient")
        if recorded in ("gradient", "lbfgs"):
            return cast("Literal['gradient', 'lbfgs']", recorded)
    num_examples = num_images * max(1, options.views)
    by_ridge = {"solver": "gradient", "head_start": "random"}  # with what does not
    for option, other in by_ridge.items():
        if getattr(options, option) == "ridge" and not is_solvable(num_examples, width):
            logger.warning(
                f"{option}=ridge decomposes {num_examples:,} x {width:,} features, which takes "
                f"long and much memory; {option}={other} does not"
            )
    return choose_solver(options, backbone, num_images, width)


def batch_size_of(request: RunRequest, train: Split, backbone: Backbone) -> int:
    """The batch size that was given, else that of the resumed run, else the default."""
    options = request.options
    if options.batch_size is not None:
        return options.batch_size
    recorded = _recorded(request).get("batch_size")
    if isinstance(recorded, int) and 1 <= recorded <= len(train):
        return recorded
    is_cached_head = trains_cached_head(options, backbone, request.replicas.num_workers)
    default = default_batch_size(len(train), is_cached_head=is_cached_head)
    if default > BATCH:
        logger.info(
            f"batch_size: {default}, as the head is trained on the features of {len(train):,} "
            "images"
        )
    return default


def epochs_of(request: RunRequest) -> int | None:
    """The epochs that were given, else those of the resumed run; ``None`` for the default, and with
    a schedule or a solver, which have none."""
    options = request.options
    if options.epochs is not None or options.schedule or options.solver != "gradient":
        return options.epochs
    recorded = _recorded(request).get("epochs")
    return recorded if isinstance(recorded, int) and recorded >= 1 else None


def label_smoothing_of(
    request: RunRequest,
    options: ResolvedOptions,
    train: Split,
    classifier: Classifier,
    stages: Sequence[Stage],
) -> float:
    """The label smoothing that was given, else that of the resumed run, else the default.

    Args:
        request: the run.
        options: its options, with the other defaults.
        train: its training images.
        classifier: before training.
        stages: the last one trains the most.
    """
    if request.options.label_smoothing is not None:
        return request.options.label_smoothing
    if isinstance(recorded := _recorded(request).get("label_smoothing"), int | float):
        return float(recorded)
    backbone = classifier.feature_extractor
    if options.solver != "gradient" or options.is_mixed or trains_head_only(options, backbone):
        return 0.0
    replicas = request.replicas
    model = request.graph.name
    cut = stages[-1].cut
    smoothing = 0.0
    if replicas.is_chief:
        smoothing = choose_smoothing(options, train, classifier, model, cut)
    return float(replicas.from_chief(str(smoothing)))


def ema_of(request: RunRequest, backbone: Backbone) -> float:
    """The decay of the moving average that was given, else that of the resumed run, else the
    default.

    Where more than a head is trained, the loss on held-out images jumps from epoch to epoch as long
    as the learning rate is high. That of the average does not; and at the end, when the learning
    rate has fallen to zero, it hardly differs from that of the weights.
    """
    options = request.options
    if options.ema is not None:
        return options.ema
    if recorded := _recorded(request):
        return float(recorded.get("ema", 0.0))
    is_head = options.solver != "gradient" or trains_head_only(options, backbone)
    return 0.0 if is_head else EMA


def precision_of(request: RunRequest) -> dict[str, str]:
    """Where they are ``auto``, the precision and its engine are those of the resumed run."""
    options = {name: getattr(request.options, name) for name in ("precision", "int8_engine")}
    recorded = _recorded(request) if options["precision"] != "float32" else {}
    return {
        name: recorded.get(name, value) if value == "auto" else value
        for name, value in options.items()
    }


def _recorded(request: RunRequest) -> dict[str, Any]:
    """The configuration of the resumed run; empty for a new run, and for one that has not begun."""
    if request.resume and request.run_dir is not None:
        with contextlib.suppress(FileNotFoundError):
            return run_folder.read_config(request.run_dir)
    return {}
