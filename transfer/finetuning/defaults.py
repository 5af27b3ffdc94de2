"""Options that were given, else those of the resumed run, else the defaults."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
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


def recorded_options(request: RunRequest) -> dict[str, Any]:
    """The configuration of the resumed run; empty for a new run, and for one that has not begun."""
    if request.resume and request.run_dir is not None:
        with contextlib.suppress(FileNotFoundError):
            return run_folder.read_config(request.run_dir)
    return {}


def best_tap(request: RunRequest, recorded: Mapping[str, Any], train: Split) -> str:
    """The tap of the resumed run, else the one that is best on the training images."""
    if isinstance(tap := recorded.get("tap"), str):
        return tap
    choice = choose_tap(
        request.graph,
        train,
        request.options,
        request.feeds,
        lambda taps: measurement.progress(taps, "features", "tap") if request.verbose else taps,
    )
    return choice.best.tap


def solver_of(
    request: RunRequest,
    recorded: Mapping[str, Any],
    backbone: Backbone,
    num_images: int,
    width: int,
) -> Literal["gradient", "ridge", "lbfgs"]:
    """The solver that was given, else that of the resumed run, else the default."""
    options = request.options
    if options.solver == "auto" and request.callbacks:
        if choose_solver(options, backbone, num_images, width) != "gradient":
            logger.info("solver: gradient, as only its epochs call callbacks")
        return "gradient"
    if options.solver == "auto" and recorded:
        solver = recorded.get("solver", "gradient")
        if solver in ("gradient", "lbfgs"):
            return cast("Literal['gradient', 'lbfgs']", solver)
    num_examples = num_images * max(1, options.views)
    by_ridge = {"solver": "gradient", "head_start": "random"}  # with what does not
    for option, other in by_ridge.items():
        if getattr(options, option) == "ridge" and not is_solvable(num_examples, width):
            logger.warning(
                f"{option}=ridge decomposes {num_examples:,} x {width:,} features, which takes "
                f"long and much memory; {option}={other} does not"
            )
    return choose_solver(options, backbone, num_images, width)


def batch_size_of(
    request: RunRequest, recorded: Mapping[str, Any], train: Split, backbone: Backbone
) -> int:
    """The batch size that was given, else that of the resumed run, else the default."""
    options = request.options
    if options.batch_size is not None:
        return options.batch_size
    batch_size = recorded.get("batch_size")
    if isinstance(batch_size, int) and 1 <= batch_size <= len(train):
        return batch_size
    is_cached_head = trains_cached_head(options, backbone, request.replicas.num_workers)
    default = default_batch_size(len(train), is_cached_head=is_cached_head)
    if default > BATCH:
        logger.info(
            f"batch_size: {default}, as the head is trained on the features of {len(train):,} "
            "images"
        )
    return default


def epochs_of(request: RunRequest, recorded: Mapping[str, Any]) -> int | None:
    """The epochs that were given, else those of the resumed run; ``None`` for the default, and with
    a schedule or a solver, which have none."""
    options = request.options
    if options.epochs is not None or options.schedule or options.solver != "gradient":
        return options.epochs
    epochs = recorded.get("epochs")
    return epochs if isinstance(epochs, int) and epochs >= 1 else None


def label_smoothing_of(
    request: RunRequest,
    recorded: Mapping[str, Any],
    options: ResolvedOptions,
    train: Split,
    classifier: Classifier,
    stages: Sequence[Stage],
) -> float:
    """The label smoothing that was given, else that of the resumed run, else the default.

    Args:
        request: the run.
        recorded: see ``recorded_options``.
        options: its options, with the other defaults.
        train: its training images.
        classifier: before training.
        stages: the last one trains the most.
    """
    if request.options.label_smoothing is not None:
        return request.options.label_smoothing
    if isinstance(smoothing := recorded.get("label_smoothing"), int | float):
        return float(smoothing)
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


def ema_of(request: RunRequest, recorded: Mapping[str, Any], backbone: Backbone) -> float:
    """The decay of the moving average that was given, else that of the resumed run, else the
    default.

    Where more than a head is trained, the loss on held-out images jumps from epoch to epoch as long
    as the learning rate is high. That of the average does not; and at the end, when the learning
    rate has fallen to zero, it hardly differs from that of the weights.
    """
    options = request.options
    if options.ema is not None:
        return options.ema
    if recorded:
        return float(recorded.get("ema", 0.0))
    is_head = options.solver != "gradient" or trains_head_only(options, backbone)
    return 0.0 if is_head else EMA


def calibrate_of(request: RunRequest, recorded: Mapping[str, Any]) -> bool:
    """Whether to calibrate, as was given, else as in the resumed run or the run that images are
    added to, else not."""
    if request.options.calibrate is not None:
        return request.options.calibrate
    if not recorded and request.growth is not None:
        recorded = run_folder.read_config(request.growth.run)
    return bool(recorded.get("calibrate"))


def precision_of(request: RunRequest, recorded: Mapping[str, Any]) -> dict[str, str]:
    """Where they are ``auto``, the precision and its engine are those of the resumed run."""
    options = {name: getattr(request.options, name) for name in ("precision", "int8_engine")}
    if options["precision"] == "float32":
        return options
    return {
        name: recorded.get(name, value) if value == "auto" else value
        for name, value in options.items()
    }
