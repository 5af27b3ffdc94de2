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
    temperature is the inverse. Labels are not smoothed. Predictions that are all correct have no
    such temperature, and keep theirs.

    The temperature is applied only if it lowers the log loss of images that it was not fitted to;
    see ``cross_fitted`` below.

    Args:
        head: built; it is changed.
        logits: of its predictions for the held-out images, float32 ``[num_examples, num_classes]``.
        labels: int ``[num_examples]``.
        groups: group number of each image, int ``[num_examples]``, of which all are left out
            together; ``None`` if each image is a group.

    Returns:
        The entry ``calibration`` of ``metrics.json``: ``temperature``, the factor of the logits, 1
        if none is applied; ``fitted``, the factor with the lowest log loss; and ``loss`` (nats) and
        ``calibration_error`` (0 to 1) ``before``, and ``cross_fitted``: each fold, of at most five,
        with the temperature of the others. The latter is missing if all images are of one group;
        the temperature is then applied.

    Raises:
        ValueError: if logits are not finite.
    """
    if not np.isfinite(logits).all():
        raise ValueError(
            "logits of held-out images are not finite, so there is no temperature to calibrate "
            "them; a lower learning_rate may keep the weights finite"
        )
    temperature = fitted = _fitted(logits, labels)
    before, after = _scores(logits, labels), None
    groups = np.arange(len(labels)) if groups is None else groups
    num_groups = len(np.unique(groups))
    if num_groups > 1:
        scaled = np.empty_like(logits)
        for others, fold in GroupKFold(min(_FOLDS, num_groups)).split(logits, groups=groups):
            scaled[fold] = _fitted(logits[others], labels[others]) * logits[fold]
        after = _scores(scaled, labels)
        if not after["loss"] < before["loss"]:
            temperature = 1.0
    if temperature != 1:
        for variable in (head.classifier.kernel, head.classifier.bias):
            variable.assign(variable.numpy() * temperature)
    found = {"temperature": temperature, "fitted": fitted, "before": before}
    return found if after is None else found | {"cross_fitted": after}


def report(found: dict[str, Any], num_images: int) -> None:
    """Log what ``calibrate`` found, as a warning if it left the predictions as they were."""
    before, after, fitted = found["before"], found.get("cross_fitted"), found["fitted"]
    compared = ""
    if after is not None:
        compared = (
            f"; log loss {after['loss']:.4f} instead of {before['loss']:.4f}, calibration error "
            f"{after['calibration_error']:.4f} instead of {before['calibration_error']:.4f}, each "
            "image with the temperature of others"
        )
    if found["temperature"] != 1:
        logger.info(
            f"calibrated on {num_images:,} held-out images: temperature {fitted:.3g}{compared}"
        )
    elif fitted == 1:
        logger.warning(
            f"calibrate changes nothing: no temperature lowers the log loss of the {num_images:,} "
            "held-out images, or all of them are classified correctly, for which there is none"
        )
    else:
        logger.warning(
            f"calibrate changes nothing: the temperature {fitted:.3g} of the {num_images:,} "
            f"held-out images does not lower the log loss of others{compared}"
        )


def _fitted(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the lowest log loss; 1 if all predictions are correct, as the loss then
    falls with any larger one."""
    own = logits[np.arange(len(labels)), labels]
    if (own >= logits.max(-1)).all():
        return 1.0
    return fit_temperature(logits, labels, smoothing=0.0)[0]


def _scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "loss": summarize(logits, labels)["loss"],
        "calibration_error": calibration_error(logits, labels),
    }
