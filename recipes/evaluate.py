"""Evaluate a run on its held-out images, or on another split or dataset with the same classes.

    vgg-transfer evaluate RUN
    vgg-transfer evaluate RUN --eval-split test --assert-accuracy-at-least 0.9

    vgg-transfer evaluate RUN --against OTHER_RUN
    vgg-transfer evaluate models/mine --image-folder photos/
    vgg-transfer evaluate RUN --coverage 0.9 --risk 0.05 --unknown other-photos/

Without flags it reproduces exactly the accuracy that training reported. Writes report.html, plots/,
evaluation.json, predictions.csv and confusion.csv to the run's folder; of a model without a run, it
prints the metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recipes import console
from recipes.flag_values import changed, words_of
from recipes.image_flags import ImageFlags
from recipes.startup import job


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ImageFlags):
    """Flags of ``vgg-transfer evaluate``, with their defaults."""

    dataset: str | None = None
    """Name of a tfds dataset. [default: the run's]"""
    data_dir: str | None = None
    """Directory of tfds datasets, or of one prepared dataset. [default: the run's]"""
    group_by: str | None = None
    """What groups the images, e.g. by patient, camera or video: a column of the manifest, or a
    regular expression on the paths of an image folder, e.g. 'patient(\\d+)'. Intervals then take
    groups as independent, not images. [default: as in the run; for another manifest its column
    group, if it has one]"""
    eval_split: str = "auto"
    """Split to evaluate on. auto: the run's held-out images; for another dataset, its validation
    or test split, else the training images."""
    batch_size: int | None = None
    """Images per step. [default: 32, as in training; other values change the loss at float
    precision]"""
    against: Path | None = None
    """Another run with the same classes to compare with on the same images: McNemar's test, and
    changes.csv lists the images with different predictions."""
    coverage: float | None = None
    """Also measure prediction sets, which contain the label of this share of images, such as 0.9:
    conformal prediction, calibrated on one half of the images and measured on the other, both
    ways. predict --sets then adds the sets of new images."""
    risk: float | None = None
    """Also find the threshold for predict --abstain-below that keeps the error rate among the
    remaining images at this value at most, such as 0.05, with 95 % confidence."""
    unknown: Path | None = None
    """Folder of images that are of none of the classes, at any depth: also measure how well
    out-of-distribution scores tell them from the images of the classes. predict --unknown-score
    then shows a score for new images."""
    skip_unreadable: int = 0
    """Skip and list up to this many images that cannot be decoded. By default, one such image
    stops the evaluation."""
    probabilities: Path | None = None
    """File for the probabilities of all classes: a NumPy array (.npy, float32) with a row per row
    of predictions.csv and a column per line of labels.txt. [default: predictions.csv has those of
    up to 20 classes, else the 5 most probable]"""


def evaluate(
    run: Path,
    /,
    config: EvaluateConfig = EvaluateConfig(),
    *,
    assert_accuracy_at_least: float | None = None,
) -> int:
    """Evaluate a classifier.

    Args:
        run: run folder of finetune; or prefix of a model with classes, such as one from convert, to
            evaluate on the images given.
        assert_accuracy_at_least: Exit with status 1 if the accuracy (0 to 1) is lower.
    """
    threshold = assert_accuracy_at_least
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"--assert-accuracy-at-least must be 0 to 1, got {threshold}")
    flags = changed(config)
    with job():
        from transfer.core.measurement import progress
        from transfer.evaluation.metrics_text import describe
        from transfer.models.formats import is_graph
        from transfer.runs.evaluation import evaluate_model, evaluate_run

        is_run = run.is_dir() or not is_graph(run)
        with console.skip_suggested():
            if is_run:
                command = ["vgg-transfer", "evaluate", str(run), *words_of(flags)]
                metrics = evaluate_run(run, **flags, command=command, progress=progress)
            elif config.against is not None:
                raise ValueError(f"--against compares two runs, and {str(run)!r} is a model")
            else:
                metrics = evaluate_model(run, **flags, progress=progress)
    print("\n".join(describe(metrics)))
    if is_run:
        print(run / "report.html")
    if threshold is not None and metrics["accuracy"] < threshold:
        raise ValueError(f"accuracy {metrics['accuracy']:.4f} is below {threshold}")
    return 0
