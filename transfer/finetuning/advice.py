"""What looks wrong in a finished run, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

_RISE = 1.2
"""The held-out loss has risen if it ends at this many times its minimum, both averaged over a third
of the epochs."""


def describe_overfitting(history: Mapping[str, Sequence[float]], *, head_only: bool) -> list[str]:
    """A warning if the held-out loss rose after its minimum.

    Args:
        history: columns of ``history.csv``, one value per epoch; see ``FineTuneResult.history``.
        head_only: whether only the head was trained.

    Example:
        >>> from transfer.finetuning.advice import describe_overfitting
        >>> describe_overfitting({"val_loss": [0.5, 0.4, 0.41]}, head_only=True)
        []
        >>> (line,) = describe_overfitting({"val_loss": [0.5, 0.4, 0.9]}, head_only=True)
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
    remedies = ["early_stopping=3", f"epochs={best}"] + ["solver=ridge"] * head_only
    return [
        f"the run overfits: the held-out loss was lowest after epoch {best} ({min(losses):.3g}) "
        f"and is {losses[-1]:.3g} after epoch {len(losses)}, so that its probabilities are too "
        f"high; {', '.join(remedies[:-1])} or {remedies[-1]} helps"
    ]
