"""Evaluate a run on its own held-out images, or on any split or dataset with the same classes.

    vgg-transfer evaluate RUN
    vgg-transfer evaluate RUN --eval-split test --assert-accuracy-at-least 0.9

    vgg-transfer evaluate RUN --against OTHER_RUN

Without flags it gives exactly the accuracy that training reported. Writes report.html, plots/,
evaluation.json, predictions.csv and confusion.csv to the run's folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclopts import Parameter

from recipes import console
from recipes.startup import job


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Flags of ``vgg-transfer evaluate``, with their defaults."""

    dataset: str | None = None
    """Name of a tfds dataset. [default: the run's]"""
    data_dir: str | None = None
    """Where tfds datasets are, or the directory of one. [default: the run's]"""
    image_folder: str | None = None
    """A folder of images per class, or of splits with such folders, instead of a dataset."""
    eval_split: str = "auto"
    """Split to evaluate on. auto: the one that the run was evaluated on; of another dataset,
    validation or test, else all of it."""
    batch_size: int | None = None
    """Images per step. [default: 32, as in training; another changes the last bits of the loss]"""
    against: Path | None = None
    """Another run, with the same classes, to compare with on the same images: McNemar's test, and
    the images on which they differ in changes.csv."""
    skip_unreadable: int = 0
    """Leave out up to this many images that cannot be decoded, and list them. By default, one such
    image ends the evaluation."""
    assert_accuracy_at_least: float | None = None
    """Exit with status 1 if the accuracy, 0 to 1, is lower."""


def evaluate(run: Path, /, config: EvaluateConfig = EvaluateConfig()) -> int:
    """Evaluate a run's classifier.

    Args:
        run: run folder of finetune.
    """
    wanted = config.assert_accuracy_at_least
    if wanted is not None and not 0 <= wanted <= 1:
        raise ValueError(f"--assert-accuracy-at-least must be 0 to 1, got {wanted}")
    with job():
        from recipes.data_errors import skip_suggested
        from transfer.core import measurement
        from transfer.runs import evaluation

        flags = vars(config).copy()
        del flags["assert_accuracy_at_least"]
        if flags["batch_size"] is None:
            del flags["batch_size"]
        with skip_suggested():
            figures = evaluation.evaluate_run(
                run, **flags, command=_command(run, flags), progress=measurement.progress
            )
    print(console.describe_accuracy(figures, "images"))
    print(f"top-5    {figures['top5']:.4f}")
    print(f"loss     {figures['loss']:.4f}")
    if other := figures.get("against"):
        print(
            f"right where {other['run']} is wrong: {other['only_first']} images; the other way "
            f"round: {other['only_second']}; p {other['p_value']:.3g} (McNemar, exact)"
        )
    print(run / "report.html")
    if wanted is not None and figures["accuracy"] < wanted:
        raise ValueError(f"accuracy {figures['accuracy']:.4f} is below {wanted}")
    return 0


def _command(run: Path, flags: dict[str, Any]) -> list[str]:
    """The command that evaluates the run like this again."""
    words = ["vgg-transfer", "evaluate", str(run)]
    for name, value in flags.items():
        if value not in (None, "auto", 0):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words
