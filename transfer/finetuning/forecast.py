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
from transfer.finetuning.context import RunContext
from transfer.finetuning.cost import NONE, CutCost, measure_costs
from transfer.finetuning.full_trial import FullTrial, is_affordable, trial_seconds, try_full
from transfer.finetuning.hyperparameters import choose_solver
from transfer.finetuning.options import HEAD_ONLY
from transfer.finetuning.request import RunRequest
from transfer.finetuning.setup import prepare
from transfer.finetuning.tap_choice import (
    AUTO,
    TapChoice,
    TapScore,
    candidate_taps,
    choose_tap,
    drawn,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forecast:
    """``choice`` has the accuracy of a head on each tap, ``costs`` the time, memory and disk space
    of a run at each cut of the network up to the best tap, from the tap to ``none``.

    ``few`` are training images on which full fine-tuning can be compared with the head, in
    ``trial_s`` seconds; see ``with_trial``. They are ``None`` if the whole network cannot be
    trained, or it was tried. ``trial`` is the result. ``given`` is the tap that was given, with the
    same costs for it, if another one is the best.
    """

    choice: TapChoice
    costs: Sequence[CutCost]
    num_train: int
    num_held_out: int
    few: Split | None = None
    trial_s: float | None = None
    trial: FullTrial | None = None
    given: tuple[str, Sequence[CutCost]] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The recommended options of ``fine_tune``: a head on the best tap."""
        return {"tap": self.choice.best.tap, **HEAD_ONLY}


def forecast(request: RunRequest) -> Forecast:
    """Estimate accuracy and cost of the runs that a request could become; writes only features, to
    the activation cache.

    Args:
        request: as for ``fine_tune``. ``tap`` is compared with others, ``freeze_until`` is not
            used. Times are those of float32, whatever the ``precision``.

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
    named = None if options.tap == AUTO else options.tap
    own = named or next(iter(candidate_taps(request.graph, options.head_only(), request.feeds)))
    # More than a head is trained by gradient descent, whatever solves for the head.
    options = replace(options.head_only(), solver="gradient", precision="float32")
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

    def costs_of(context: RunContext, score: TapScore) -> list[CutCost]:
        as_given = replace(request.options.head_only(), tap=score.tap)
        num_train = len(context.train)
        solver = choose_solver(as_given, context.classifier.backbone, num_train, score.width)
        ridge_s = score.fit_s * num_train / choice.num_images
        return measure_costs(context, setup_s, ridge_s if solver == "ridge" else None)

    given = None
    if choice.best != choice.scores[0]:
        if named is not None:
            given = named, costs_of(context, choice.scores[0])
        context = prepare(replace(request, options=replace(options, tap=choice.best.tap)))
    costs = costs_of(context, choice.best)
    result = Forecast(choice, costs, len(context.train), len(context.held_out), given=given)
    if costs[-1].cut != NONE:
        return result
    few = drawn(context.train, choice.num_images, options.seed)
    seconds = trial_seconds(
        costs[-1], request.options, len(few), len(context.train), len(context.held_out)
    )
    return replace(result, few=few, trial_s=seconds)


def with_trial(result: Forecast, request: RunRequest, minutes: float | None = None) -> Forecast:
    """The forecast with what full fine-tuning gains over the head on the best tap, if it is
    affordable to try it on some of the training images. Writes run folders, which are deleted, to
    the system's temporary folder.

    Args:
        result: the forecast.
        request: that it was made for.
        minutes: the longest time that this may take; 0 does not try. Default: a tenth of the time
            of full fine-tuning, and at most 10 minutes.
    """
    if result.few is None or result.trial_s is None:
        return result
    full = result.costs[-1]
    if not is_affordable(result.trial_s, full, None if minutes is None else 60 * minutes):
        return result
    if request.verbose:
        logger.info(
            f"full fine-tuning is tried on {len(result.few)} training images, "
            f"{_time(result.trial_s)}"
        )
    try:
        free_mb = measurement.peak_rss_mb() + measurement.available_memory_mb()
        if full.memory_mb > free_mb:
            raise MemoryError(f"it takes {full.memory_mb:,.0f} MB, and {free_mb:,.0f} MB are free")
        trial = try_full(request, result.few, result.choice.best.tap)
    except (ValueError, ArithmeticError, OSError, MemoryError) as error:
        logger.warning(f"full fine-tuning could not be tried: {error}")
        trial = None
    return replace(result, few=None, trial=trial)


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
    header = ["freeze until", "epochs", "trained", "extraction", "training", "total", "memory MB"]
    for tap, of_tap in ((choice.best.tap, costs), *([forecast.given] if forecast.given else [])):
        yield (
            f"runs with the tap {tap} on this machine: {forecast.num_train:,} images to train on, "
            f"{forecast.num_held_out:,} held out"
        )
        yield from _table([*header, "disk MB"], [_cells(cost) for cost in of_tap])
        yield ""
    options = ", ".join(f"{name}={value!r}" for name, value in forecast.options.items())
    yield f"recommended: {run or options}"
    yield (
        f"  accuracy {choice.nested:.3f}, with the choice of the tap cross-validated as well, "
        f"{_interval(choice.nested_interval)} on the held-out images, in {_time(costs[0].total_s)} "
        "after the start of the program"
    )
    if costs[0].solver == "gradient":
        yield (
            "  this accuracy is that of a head that is solved for; the options of gradient descent "
            "that were given train one instead"
        )
    if len(costs) > 1:
        others = dict.fromkeys((costs[len(costs) // 2].cut, costs[-1].cut))
        total = {cost.cut: _time(cost.total_s) for cost in costs}
        shown = ", ".join(f"freeze_until={cut} in {total[cut]}" for cut in others)
        is_trained = costs[0].solver == "gradient"
        more = f"more training{'' if is_trained else ', by gradient descent'}"
        yield (
            f"  {more}: {shown}; it gains most with many images, or images unlike those of the "
            "pretraining"
        )


def describe_trial(forecast: Forecast) -> Iterator[str]:
    """Describe what full fine-tuning gains, or how long it takes to try, in lines."""
    trial = forecast.trial
    if trial is not None:
        low, high = trial.interval
        yield (
            f"  an estimate from {trial.num_train:,} training images, tested on "
            f"{trial.num_test:,} others: full fine-tuning {trial.accuracy:.3f}, the head "
            f"{trial.head_accuracy:.3f}"
        )
        yield f"  difference {trial.gain:+.3f} (95 % interval {low:+.3f} to {high:+.3f})"
    elif forecast.few is not None and forecast.trial_s is not None:
        minutes = math.ceil(1.5 * forecast.trial_s / 60)  # it is measured anew
        yield (
            "  what full fine-tuning gains was not tried, as that takes "
            f"{_time(forecast.trial_s)}; trial_minutes={minutes} tries it"
        )


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
