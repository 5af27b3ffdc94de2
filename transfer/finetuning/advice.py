"""What looks wrong in a finished run, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from transfer.finetuning.options import FineTuneOptions

_RISE = 1.2
"""The held-out loss has risen if it ends at this many times its minimum, both averaged over a third
of the epochs."""

_FEW = 5
"""A class with fewer training images than this is rare."""


def describe_leaks(count: int) -> list[str]:
    """A warning if held-out images are also training images.

    Args:
        count: number of these images, including near-duplicates.
    """
    if not count:
        return []
    return [
        f"{count} of the held-out images are also trained on, so that the accuracy is too high; "
        "remove the copies, or keep them in one split with group_by"
    ]


def describe_rare_classes(class_names: Sequence[str], labels: np.ndarray) -> list[str]:
    """A warning about classes with fewer than 5 training images; those without any are another
    problem.

    Args:
        class_names: names in the order of the labels.
        labels: labels of the training images, int ``[num_images]``.

    Example:
        >>> import numpy as np
        >>> from transfer.finetuning.advice import describe_rare_classes
        >>> describe_rare_classes(["cat", "dog"], np.array([0] * 9 + [1] * 3))[0].split(";")[0]
        '1 class has fewer than 5 training images (dog: 3)'
    """
    counts = np.bincount(labels, minlength=len(class_names)).tolist()
    rare = [(n, name) for name, n in zip(class_names, counts, strict=True) if 0 < n < _FEW]
    if not rare:
        return []
    shown = ", ".join(f"{name}: {n}" for n, name in sorted(rare)[:5])
    what = "1 class has" if len(rare) == 1 else f"{len(rare)} classes have"
    return [
        f"{what} fewer than {_FEW} training images ({shown}{', ...' * (len(rare) > 5)}); their "
        "recall is uncertain: more images help most, class_weights=balanced and augment=True may"
    ]


def describe_overfitting(
    history: Mapping[str, Sequence[float]], options: FineTuneOptions, *, head_only: bool
) -> list[str]:
    """A warning if the held-out loss rose after its minimum, with options that would help and that
    the run can have beside its own.

    Args:
        history: columns of ``history.csv``, one value per epoch; see ``FineTuneResult.history``.
        options: those of the run.
        head_only: whether only the head was trained.

    Example:
        >>> from transfer.finetuning.advice import describe_overfitting
        >>> from transfer.finetuning.options import FineTuneOptions
        >>> options = FineTuneOptions()
        >>> describe_overfitting({"val_loss": [0.5, 0.4, 0.41]}, options, head_only=True)
        []
        >>> (line,) = describe_overfitting({"val_loss": [0.5, 0.4, 0.9]}, options, head_only=True)
        >>> line.split(":")[0]
        'the run overfits'
    """
    losses = history.get("val_loss", ())
    if not losses:
        return []
    window = max(1, len(losses) // 3)  # epochs; the loss of one is noisy
    smooth = np.convolve(losses, np.full(window, 1 / window), "valid")
    if not smooth[-1] > _RISE * smooth.min():
        return []
    best = int(np.argmin(losses)) + 1
    remedies = ["early_stopping=3"]
    if options.schedule is None:
        remedies.append(f"epochs={best}")
    if head_only and not options.of_trained_heads:
        remedies.append("solver=ridge")
    elif not head_only and not options.is_mixed:
        remedies.append("mixup=0.2")
    line = (
        f"the run overfits: the held-out loss was lowest after epoch {best} ({min(losses):.3g}) "
        f"and is {losses[-1]:.3g} after epoch {len(losses)}"
    )
    helps = " or ".join(filter(None, (", ".join(remedies[:-1]), remedies[-1]))) + " helps"
    if options.calibrate:
        return [f"{line}, before the temperature; {helps}"]
    return [
        f"{line}, so that its probabilities are too high; {helps}; calibrate=True corrects only "
        "the probabilities"
    ]


def describe_old_evaluation(
    run: str,
    before: float | None,
    loss: float,
    *,
    is_evaluated: bool = True,
    is_exported: bool = False,
) -> list[str]:
    """A warning if files of ``evaluate`` or ``export`` in the folder of a resumed run are of
    another model.

    Args:
        run: the folder.
        before: log loss of the model on the held-out images before the run was resumed; ``None`` if
            there was none.
        loss: the same of the run's model now.
        is_evaluated: whether the folder has files of ``evaluate``.
        is_exported: whether the folder has exported models.
    """
    if before is None or math.isclose(before, loss, rel_tol=1e-5):
        return []
    files, commands = [], []
    if is_evaluated:
        files += ["report.html", "evaluation.json", "predictions.csv"]
        commands.append(f"vgg-transfer evaluate {run}")
    if is_exported:
        files.append("the models in export")
        commands.append(f"vgg-transfer export {run}")
    if not files:
        return []
    *first, last = files
    names = f"{', '.join(first)} and {last}" if first else last
    return [
        f"{names} are of the model before, with a loss of {before:.4g}; write them again: "
        f"{', and '.join(commands)}"
    ]
