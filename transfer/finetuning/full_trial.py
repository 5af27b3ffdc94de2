"""What full fine-tuning gains over a head, tried on some of the training images."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from transfer.data.dataset import Split
from transfer.evaluation import by_group
from transfer.finetuning import image_inspection, setup
from transfer.finetuning.cost import NONE, CutCost
from transfer.finetuning.hyperparameters import BATCH, default_epochs
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest
from transfer.finetuning.run import run
from transfer.runs.interruption import Interrupted
from transfer.training.folds import stratified_folds

_FOLDS = 5  # of which one is tested on
_SHARE, _MOST_S = 0.1, 600.0  # of the time of full fine-tuning; seconds
_STEP_IN_PASSES = 3  # a training step relative to a forward pass, as in validation
_RESAMPLES = 2000


@dataclass(frozen=True)
class FullTrial:
    """Accuracies (0 to 1) of full fine-tuning and of a head, both trained on ``num_train`` of the
    training images and tested on ``num_test`` others; ``interval`` is the 95 % interval of their
    difference, for other test images."""

    accuracy: float
    head_accuracy: float
    interval: tuple[float, float]
    num_train: int
    num_test: int

    @property
    def gain(self) -> float:
        """The difference of the accuracies."""
        return self.accuracy - self.head_accuracy


def trial_seconds(
    full: CutCost, options: FineTuneOptions, few: int, train: int, test: int
) -> float:
    """Seconds that a trial would take.

    Args:
        full: costs of full fine-tuning.
        options: of the run.
        few: number of the training images of the trial.
        train: number of training images of the run.
        test: number of its held-out images.
    """
    few_train = few - few // _FOLDS
    epochs = options.epochs or default_epochs(
        -(-few_train // (options.batch_size or BATCH)), only_head=False
    )
    passes = epochs * (_STEP_IN_PASSES * few_train + few // _FOLDS)
    of_run = full.epochs * (_STEP_IN_PASSES * train + test)
    return full.total_s - full.train_s + full.train_s * passes / of_run


def is_affordable(seconds: float, full: CutCost, most_s: float | None) -> bool:
    """Whether a trial may take this long: up to ``most_s``; by default up to a tenth of the time of
    full fine-tuning, and ten minutes."""
    return seconds <= (min(_SHARE * full.total_s, _MOST_S) if most_s is None else most_s)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Leave out what is said about the images of a run: those of a trial are drawn here."""
    modules = (setup.__name__, image_inspection.__name__, run.__module__)
    loggers = [logging.getLogger(name) for name in modules]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def try_full(request: RunRequest, few: Split, tap: str) -> FullTrial | None:
    """Fine-tune the whole network on four fifths of some training images, solve for a head on the
    same, and compare both on the rest; ``None`` if a class has too few images, or groups.

    Args:
        request: the run that is planned.
        few: images of its ``train``.
        tap: tap of the head.

    Raises:
        ValueError, OSError: as for ``fine_tune``.
        KeyboardInterrupt: on Ctrl-C or SIGTERM.
    """
    folds = stratified_folds(few.labels, _FOLDS, seed=request.options.seed, groups=few.groups)
    if not folds:
        return None
    in_test = np.zeros(len(few), bool)
    in_test[folds[0][1]] = True
    train, test = few.where(~in_test), few.where(in_test)
    size = request.options.batch_size
    options = replace(
        request.options,
        tap=tap,
        shots_per_class=None,
        batch_size=None if size is None else min(size, len(train)),
        early_stopping=None,  # the test images choose nothing
        precision="float32",
        track=None,
        track_files=False,
    )
    full = replace(options, freeze_until=NONE, freeze_from=None, schedule=None, solver="auto")
    right = []
    with tempfile.TemporaryDirectory() as folder:
        for name, given in (("full", full), ("head", options.head_only())):
            of_trial = replace(
                request,
                train=train,
                held_out=test,
                options=given,
                run_dir=Path(folder, name),
                callbacks=(),
            )
            try:
                with _without_warnings():
                    logits = run(of_trial).logits
            except Interrupted as error:  # there is nothing to resume
                raise KeyboardInterrupt from error
            right.append(logits.argmax(-1) == test.labels)
    difference = right[0].astype(float) - right[1]
    resample, generator = by_group.resampler(len(test), test.groups), np.random.default_rng(0)
    means = [difference[resample(generator)].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return FullTrial(
        accuracy=float(right[0].mean()),
        head_accuracy=float(right[1].mean()),
        interval=(float(low), float(high)),
        num_train=len(train),
        num_test=len(test),
    )
