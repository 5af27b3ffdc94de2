"""What a fine-tuning run would give and cost, before anything is trained."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
from tabulate import tabulate

from transfer.core import measurement
from transfer.data.dataset import Split
from transfer.finetuning.cost import NONE, CutCost, measure_costs
from transfer.finetuning.full_trial import FullTrial, is_affordable, trial_seconds, try_full
from transfer.finetuning.hyperparameters import choose_solver
from transfer.finetuning.options import HEAD_ONLY
from transfer.finetuning.request import RunRequest
from transfer.finetuning.setup import prepare
from transfer.finetuning.tap_choice import AUTO, TapChoice, choose_tap, drawn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forecast:
    """``choice`` has the accuracy of a head on each tap, ``costs`` the time, memory and disk space
    of a run at each cut of the network up to the best tap, from the tap to ``none``.

    ``trial`` compares full fine-tuning with the head, if it was tried. ``trial_s`` are the seconds
    that this takes, ``None`` if the whole network cannot be trained, or has too few images.
    """

    choice: TapChoice
    costs: Sequence[CutCost]
    num_train: int
    num_held_out: int
    trial: FullTrial | None = None
    trial_s: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The recommended options of ``fine_tune``: a head on the best tap."""
        return {"tap": self.choice.best.tap, **HEAD_ONLY}


def forecast(request: RunRequest, trial_minutes: float | None = None) -> Forecast:
    """Estimate accuracy and cost of the runs that a request could become; writes only features, to
    the activation cache.

    What full fine-tuning gains is tried on as many training images as the taps are compared on, if
    that is affordable.

    Args:
        request: as for ``fine_tune``. ``tap`` is compared with others, ``freeze_until`` is not
            used. Times are those of float32, whatever the ``precision``.
        trial_minutes: the longest time that this trial may take; 0 does not try. Default: a tenth
            of the time of full fine-tuning, and at most 10 minutes.

    Raises:
        ValueError, OSError: as for ``fine_tune``; also for several stages or replicas, and if a
            class has fewer than two training images.

    Example:
        >>> from transfer import load_meta_graph, open_source
        >>> from transfer.finetuning.forecast import forecast
        >>> from transfer.finetuning.options import FineTuneOptions
        >>> from transfer.finetuning.request import RunRequest
        >>> splits = open_source("digits").train_and_eval_splits()
        >>> few = FineTuneOptions(shots_per_class=5)
        >>> result = forecast(RunRequest(load_meta_graph("embedded"), *splits, few))
        >>> result.costs[-1].cut
        'none'
    """
    options = request.options
    if request.replicas.count > 1:
        raise ValueError("a forecast is for one device")
    is_lbfgs = options.solver == "lbfgs" or options.lbfgs_c is not None
    if options.schedule is not None or is_lbfgs or request.resume:
        raise ValueError(
            "a forecast is for a new run with one cut; leave out schedule=STAGES, "
            "solver=lbfgs, lbfgs_c=C and resume=True"
        )
    keras.utils.set_random_seed(options.seed)
    own = None if options.tap == AUTO else options.tap
    # More than a head is trained by gradient descent, whatever solves for the head.
    options = replace(
        options.head_only(), solver="gradient", precision="float32", label_smoothing=0.0
    )
    start = time.perf_counter()
    context = prepare(replace(request, options=replace(options, tap=own)))
    # A later run finds the fingerprints of the images on disk.
    setup_s = time.perf_counter() - start - context.inspect_s
    choice = choose_tap(
        request.graph,
        context.train,
        options,
        request.feeds,
        lambda taps: measurement.progress(taps, "features", "tap") if request.verbose else taps,
        len(context.held_out),
    )
    best = choice.best.tap
    output = context.classifier.feature_extractor.network.output
    if best == "all" or "," in best or request.graph.tensor(best) != output:
        context = prepare(replace(request, options=replace(options, tap=best)))
        output = context.classifier.feature_extractor.network.output
    is_found = options.cache == "disk" and options.cache_dtype == "float32"
    is_found = is_found and request.options.precision == "float32"
    is_found = is_found and not (options.augment or options.views)
    cached = {output.removesuffix(":0"): choice.num_images} if is_found else {}
    as_given = replace(request.options.head_only(), tap=best)
    solver = choose_solver(
        as_given, context.classifier.backbone, len(context.train), choice.best.width
    )
    ridge_s = choice.best.fit_s * len(context.train) / choice.num_images
    costs = measure_costs(context, setup_s, cached, ridge_s if solver == "ridge" else None)
    result = Forecast(choice, costs, len(context.train), len(context.held_out))
    return _with_trial(result, request, context.train, trial_minutes)


def _with_trial(
    result: Forecast, request: RunRequest, train: Split, minutes: float | None
) -> Forecast:
    full = result.costs[-1]
    if full.cut != NONE:
        return result
    few, options = drawn(train, result.choice.num_images, request.options.seed), request.options
    seconds = trial_seconds(full, options, len(few), result.num_train, result.num_held_out)
    if not is_affordable(seconds, full, None if minutes is None else 60 * minutes):
        return replace(result, trial_s=seconds)
    if request.verbose:
        logger.info(f"full fine-tuning is tried on {len(few)} training images, {_time(seconds)}")
    trial = try_full(request, few, result.choice.best.tap)
    return replace(result, trial=trial, trial_s=None if trial is None else seconds)


def describe(forecast: Forecast, run: str = "") -> Iterator[str]:
    """Describe a forecast, in lines: the tables of taps and cuts, and the recommended run.

    Args:
        forecast: the estimates.
        run: how to start the recommended run. Default: its options.
    """
    choice, costs = forecast.choice, forecast.costs
    yield f"heads on frozen features, cross-validated on {choice.num_images:,} training images"
    taps = [
        (score.tap, score.width, f"{score.accuracy:.3f}", _interval(score.interval))
        for score in choice.scores
    ]
    yield from _table(["tap", "features", "accuracy", "95 % interval"], taps)
    yield ""
    yield (
        f"runs with the tap {choice.best.tap} on this machine: {forecast.num_train:,} images to "
        f"train on, {forecast.num_held_out:,} held out"
    )
    header = ["freeze until", "epochs", "trained", "extraction", "training", "total", "memory MB"]
    yield from _table([*header, "disk MB"], [_cells(cost) for cost in costs])
    yield ""
    options = ", ".join(f"{name}={value!r}" for name, value in forecast.options.items())
    yield f"recommended: {run or options}"
    yield (
        f"  accuracy {choice.nested:.3f}, with the choice of the tap cross-validated as well, "
        f"{_interval(choice.nested_interval)} on the held-out images, in {_time(costs[0].total_s)}"
    )
    if len(costs) > 1:
        others = dict.fromkeys((costs[len(costs) // 2].cut, costs[-1].cut))
        total = {cost.cut: _time(cost.total_s) for cost in costs}
        shown = ", ".join(f"freeze_until={cut} in {total[cut]}" for cut in others)
        yield (
            f"  more training: {shown}; it gains most with many images, or images unlike those of "
            "the pretraining"
        )
    if forecast.trial is not None:
        yield from _describe_trial(forecast.trial)
    elif forecast.trial_s is not None:
        minutes = math.ceil(forecast.trial_s / 60)
        yield (
            "  what full fine-tuning gains was not tried, as that takes "
            f"{_time(forecast.trial_s)}; trial_minutes={minutes} tries it"
        )


def _describe_trial(trial: FullTrial) -> Iterator[str]:
    low, high = trial.interval
    yield (
        f"  an estimate from {trial.num_train:,} training images, tested on {trial.num_test:,} "
        f"others: full fine-tuning {trial.accuracy:.3f}, the head {trial.head_accuracy:.3f}"
    )
    yield f"  difference {trial.gain:+.3f} (95 % interval {low:+.3f} to {high:+.3f})"


def _table(header: list[str], rows: Sequence[tuple[object, ...]]) -> list[str]:
    align = ["left"] + ["right"] * (len(header) - 1)
    return tabulate(rows, header, "github", disable_numparse=True, colalign=align).splitlines()


def _cells(cost: CutCost) -> tuple[object, ...]:
    times = (_time(seconds) for seconds in (cost.extract_s, cost.train_s, cost.total_s))
    sizes = (f"{size:,.0f}" for size in (cost.memory_mb, cost.disk_mb))
    epochs = cost.epochs if cost.solver == "gradient" else cost.solver
    return (cost.cut, epochs, f"{cost.trained:,}", *times, *sizes)


def _interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
