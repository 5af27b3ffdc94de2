"""The output of ``vgg-transfer plan``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields

from tabulate import tabulate

from recipes.console import flag_of
from recipes.finetune_flags import DEFAULTS, FinetuneConfig
from transfer.finetuning.cost import CutCost
from transfer.finetuning.forecast import Forecast


def describe(forecast: Forecast, config: FinetuneConfig) -> Iterator[str]:
    """The lines to print: the tables of taps and cuts, and the recommended command."""
    choice, costs = forecast.choice, forecast.costs
    yield f"heads on frozen features, cross-validated on {choice.num_images:,} training images"
    taps = [
        (score.tap, score.width, f"{score.accuracy:.3f}", _interval(score.interval))
        for score in choice.scores
    ]
    yield _table(["tap", "features", "accuracy", "95 % interval"], taps)
    yield ""
    yield (
        f"runs with the tap {choice.best.tap} on this machine: {forecast.num_train:,} images to "
        f"train on, {forecast.num_held_out:,} held out"
    )
    header = ["freeze until", "epochs", "trained", "extraction", "training", "total", "memory MB"]
    yield _table([*header, "disk MB"], [_cells(cost) for cost in costs])
    yield ""
    yield f"recommended: {_command(forecast, config)}"
    yield (
        f"  accuracy {choice.nested:.3f} ({_interval(choice.nested_interval)}), with the choice of "
        f"the tap cross-validated as well, in {_time(costs[0].total_s)}"
    )
    if len(costs) > 1:
        others = dict.fromkeys((costs[len(costs) // 2].cut, costs[-1].cut))
        total = {cost.cut: _time(cost.total_s) for cost in costs}
        shown = ", ".join(f"--freeze-until {cut} in {total[cut]}" for cut in others)
        yield (
            f"  more training is estimated in time only: {shown}; it gains most with many images, "
            "or images unlike those of the pretraining"
        )


def _table(header: list[str], rows: Sequence[tuple[object, ...]]) -> str:
    align = ["left"] + ["right"] * (len(header) - 1)
    return tabulate(rows, header, "github", disable_numparse=True, colalign=align)


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


def _command(forecast: Forecast, config: FinetuneConfig) -> str:
    """The command of the recommended run, with the given flags."""
    recommended = forecast.options
    words = ["vgg-transfer", "finetune"]
    for option in fields(config):
        value = recommended.get(option.name, getattr(config, option.name))
        if value == getattr(DEFAULTS, option.name):
            continue
        flag = flag_of(option.name)
        for one in value if isinstance(value, tuple) else (value,):
            words += [flag] if one is True else [flag, str(one)]
    return shlex.join(words)
