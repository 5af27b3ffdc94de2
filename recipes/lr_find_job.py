"""What ``vgg-transfer lr-find`` does; its flags are in ``recipes.lr_find``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
from matplotlib.figure import Figure

from recipes.data_errors import skip_suggested
from recipes.finetune_flags import FinetuneConfig
from recipes.finetune_request import request
from transfer.core.files import replacing
from transfer.finetuning.hyperparameters import parameter_groups
from transfer.finetuning.inputs import Inputs
from transfer.finetuning.options import cut_of
from transfer.finetuning.setup import RunContext, prepare
from transfer.finetuning.stage import new_trainer
from transfer.runs import run_folder
from transfer.training.lr_range_test import RangeTest, range_test
from transfer.training.trainer import Batch


def run(config: FinetuneConfig, *, lowest: float, highest: float, steps: int) -> tuple[float, Path]:
    """Run the trial; returns the rate that it suggests, and the folder with table and plot.

    Raises:
        ValueError, OSError: as ``finetune``; and if there are several stages, or the loss diverges
            at once.
    """
    if config.strategy not in ("auto", "none"):
        raise ValueError("lr-find works on one device; leave out --strategy")
    if config.schedule is not None or config.solver != "gradient" or config.resume:
        raise ValueError("lr-find tries one cut; leave out --schedule, --solver and --resume")
    keras.utils.set_random_seed(config.seed)
    out = config.out or run_folder.default_out("lr-find")
    config = replace(config, out=out, lr_schedule="constant", learning_rate=1.0)
    with skip_suggested():
        context = prepare(request(config))
        out = context.run_dir
        with run_folder.opened(out, context.config):
            found = _trial(context, lowest=lowest, highest=highest, steps=steps)
            _write_table(out / "lr_find.csv", found)
            with replacing(out / "lr_find.png") as path:
                _plot(found).savefig(path, format="png", dpi=150)
    return found.suggestion, out


def _trial(context: RunContext, *, lowest: float, highest: float, steps: int) -> RangeTest:
    (stage,) = context.stages
    frozen, model = context.classifier.split(cut_of(stage.cut))
    groups = parameter_groups(context.options, context.classifier, stage, context.steps_per_epoch)
    trainer = new_trainer(context, model, groups)
    inputs = Inputs(context, stage.cut, frozen)
    trainer.frozen = inputs.frozen
    batches = itertools.islice(_endless(inputs), steps)
    return range_test(
        trainer,
        context.progress(batches, "trial"),
        lowest=lowest,
        highest=highest,
        steps=steps,
    )


def _endless(inputs: Inputs) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from inputs.train(epoch)


def _write_table(path: Path, found: RangeTest) -> None:
    lines = ["learning_rate,loss,smoothed_loss"]
    rows = zip(found.rates, found.losses, found.smoothed, strict=True)
    lines += [",".join(f"{value:.6g}" for value in row) for row in rows]
    run_folder.write_text(path, "\n".join(lines) + "\n")


def _plot(found: RangeTest) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, color="0.75", linewidth=1, label="loss of a batch")
    axes.plot(found.rates, found.smoothed, color="#0072B2", linewidth=2, label="smoothed")
    axes.axvline(
        found.suggestion, color="#D55E00", linestyle="--", label=f"suggested: {found.suggestion:g}"
    )
    axes.set_xscale("log")
    # A loss that explodes in the end must not flatten the rest.
    axes.set_ylim(0, float(np.quantile(found.losses, 0.9) * 1.5))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss (nats)")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure
