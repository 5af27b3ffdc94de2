"""The temperature of a trained classifier, from held-out images: ``calibrate`` of ``fine_tune``."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from sklearn.model_selection import GroupKFold

from transfer.evaluation.metrics import calibration_error
from transfer.evaluation.prediction import summarize
from transfer.layers.head import Head
from transfer.training.ridge import fit_temperature

logger = logging.getLogger(__name__)

_FOLDS = 5


def calibrate(
    head: Head, logits: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None
) -> dict[str, Any]:
    """Scale a head so that the log loss of its predictions for held-out images is lowest.

    Kernel and bias of the last layer are multiplied by the temperature, so that the predicted
    classes stay, and every export has it. Source: Guo et al. 2017, arXiv 1706.04599, whose
    temperature is the inverse.

    Args:
        head: built; it is changed.
        logits: of its predictions for the held-out images, float32 ``[num_examples, num_classes]``.
        labels: int ``[num_examples]``.
        groups: group number of each image, int ``[num_examples]``, of which all are left out
            together; ``None`` if each image is a group.

    Returns:
        The entry ``calibration`` of ``metrics.json``: ``temperature``, the factor of the logits,
        and ``loss`` (nats) and ``calibration_error`` (0 to 1) ``before``, and ``cross_fitted``:
        each fold, of at most five, with the temperature of the others. The latter is missing if all
        images are of one group.

    Raises:
        ValueError: if logits are not finite.
    """
    if not np.isfinite(logits).all():
        raise ValueError(
            "logits of held-out images are not finite, so there is no temperature to calibrate "
            "them; a lower learning_rate may keep the weights finite"
        )
    temperature, _ = fit_temperature(logits, labels)
    for variable in (head.classifier.kernel, head.classifier.bias):
        variable.assign(variable.numpy() * temperature)
    found = {"temperature": temperature, "before": _scores(logits, labels)}
    groups = np.arange(len(labels)) if groups is None else groups
    num_groups = len(np.unique(groups))
    if num_groups > 1:
        scaled = np.empty_like(logits)
        for others, fold in GroupKFold(min(_FOLDS, num_groups)).split(logits, groups=groups):
            scaled[fold] = fit_temperature(logits[others], labels[others])[0] * logits[fold]
        found["cross_fitted"] = _scores(scaled, labels)
    return found


def report(found: dict[str, Any], num_images: int) -> None:
    """Log what ``calibrate`` found."""
    before, after = found["before"], found.get("cross_fitted")
    line = f"calibrated on {num_images:,} held-out images: temperature {found['temperature']:.3g}"
    if after is not None:
        line += (
            f"; log loss {after['loss']:.4f} instead of {before['loss']:.4f}, calibration error "
            f"{after['calibration_error']:.4f} instead of {before['calibration_error']:.4f}, each "
            "image with the temperature of others"
        )
    logger.info(line)


def _scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "loss": summarize(logits, labels)["loss"],
        "calibration_error": calibration_error(logits, labels),
    }
