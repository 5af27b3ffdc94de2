"""Learning-rate range test on the model and images of a run request."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
from matplotlib.figure import Figure

from transfer.core.files import replacing
from transfer.finetuning.context import RunContext
from transfer.finetuning.head_start import solve_head
from transfer.finetuning.hyperparameters import parameter_groups
from transfer.finetuning.inputs import Inputs
from transfer.finetuning.request import RunRequest
from transfer.finetuning.setup import prepare
from transfer.finetuning.stage import new_trainer
from transfer.runs import run_folder
from transfer.training.lr_range_test import RangeTest, range_test
from transfer.training.trainer import Batch

TABLE = "lr_find.csv"
PLOT = "lr_find.png"


def find_learning_rate(
    request: RunRequest, *, lowest: float = 1e-7, highest: float = 1.0, steps: int = 100
) -> RangeTest:
    """Find a learning rate for a run by training with rising rates (learning-rate range test).

    Writes ``lr_find.csv``, ``lr_find.png`` and ``config.yaml``, the options of the request with the
    suggested learning rate, to its ``run_dir``, or no files if that is ``None``. The weights are
    discarded. The seed of the options is set globally.

    Args:
        request: as for the run; its learning rate and learning-rate schedule are replaced.
        lowest: learning rate of the first step.
        highest: learning rate of the last step.
        steps: maximum number of steps.

    Returns:
        The rates with their losses; ``suggestion`` is the suggested learning rate.

    Raises:
        ValueError, OSError: as for the run; also if it has several stages or replicas, the range is
            empty, or the loss diverges in the first steps.

    Example:
        >>> from transfer import load_meta_graph, open_source
        >>> from transfer.finetuning.lr_find import find_learning_rate
        >>> from transfer.finetuning.request import RunRequest
        >>> graph = load_meta_graph("embedded")
        >>> train, held_out = open_source("digits").train_and_eval_splits()
        >>> result = find_learning_rate(RunRequest(graph, train, held_out))
        >>> 1e-6 < result.suggestion < 1
        True
    """
    options = request.options
    if request.replicas.count > 1:
        raise ValueError("the range test works on one device")
    is_solved = options.solver in ("ridge", "lbfgs") or options.lbfgs_c is not None
    if options.schedule is not None or is_solved or request.resume:
        raise ValueError(
            "the range test trains from one cut, anew; leave out schedule=STAGES, solver=NAME, "
            "lbfgs_c=C and resume=True"
        )
    keras.utils.set_random_seed(options.seed)
    rising = replace(options, lr_schedule="constant", learning_rate=1.0, solver="gradient")
    context = prepare(replace(request, options=rising))
    if request.run_dir is None:
        return _trial(context, lowest=lowest, highest=highest, steps=steps)
    config = {**request.origin, **vars(options), "out": context.run_dir}
    with run_folder.opened(context.run_dir, config):
        test = _trial(context, lowest=lowest, highest=highest, steps=steps)
        suggested = config | {"learning_rate": float(f"{test.suggestion:g}")}
        run_folder.write_text(context.run_dir / run_folder.CONFIG, run_folder.to_yaml(suggested))
        _write_table(context.run_dir / TABLE, test)
        with replacing(context.run_dir / PLOT) as path:
            _plot(test).savefig(path, format="png", dpi=150)
    return test


def _trial(context: RunContext, *, lowest: float, highest: float, steps: int) -> RangeTest:
    (stage,) = context.stages
    frozen, model = context.split(stage)
    options = replace(context.options, ema=0.0)  # the losses are those of the weights
    groups = parameter_groups(options, context.classifier, stage, context.steps_per_epoch)
    trainer = new_trainer(context, model, groups)
    inputs = Inputs(context, stage.cut, frozen)
    if context.options.head_start == "ridge":
        solve_head(context, inputs, model)
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


def _write_table(path: Path, test: RangeTest) -> None:
    lines = ["learning_rate,loss,smoothed_loss"]
    rows = zip(test.rates, test.losses, test.smoothed, strict=True)
    lines += [",".join(f"{value:.6g}" for value in row) for row in rows]
    run_folder.write_text(path, "\n".join(lines) + "\n")


def _plot(test: RangeTest) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(test.rates, test.losses, color="0.75", linewidth=1, label="batch loss")
    axes.plot(test.rates, test.smoothed, color="#0072B2", linewidth=2, label="smoothed")
    axes.axvline(
        test.suggestion, color="#D55E00", linestyle="--", label=f"suggested: {test.suggestion:g}"
    )
    axes.set_xscale("log")
    # Limit the axis, so that the diverging loss at the end does not flatten the curve.
    axes.set_ylim(0, float(np.quantile(test.losses, 0.9) * 1.5))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss (nats)")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure
