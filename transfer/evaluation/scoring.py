"""Evaluate a classifier on labelled images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from transfer.activations.extraction import EXTRACTION_BATCH, Compiled, stream
from transfer.core.npy_files import check_path
from transfer.data.dataset import Source, Split
from transfer.data.fingerprints import ids_digest
from transfer.evaluation import abstention, metrics
from transfer.evaluation.image_scores import score_images
from transfer.evaluation.prediction import predict_logits, summarize_labels
from transfer.evaluation.tables import write_probabilities
from transfer.layers.classifier import Classifier

logger = logging.getLogger(__name__)


def evaluate(
    classifier: Classifier,
    split: Split,
    *,
    cut: str | None = None,
    batch_size: int = EXTRACTION_BATCH,
    coverage: float | None = None,
    probabilities: str | Path | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Evaluate a classifier on labelled images, each counted once.

    On the held-out images of a run, the metrics are those in its ``metrics.json``, and those that
    ``vgg-transfer evaluate`` writes to ``evaluation.json``. They are bit-identical if the cut and
    the batch size are those of the run. Those in ``metrics.json`` of a run in another precision
    than float32 are of features in this precision, and may differ slightly: a classifier computes
    in float32.

    Args:
        classifier: a classifier from ``fine_tune`` or ``Classifier.load``.
        split: images with the classes of the classifier, in any order; from ``open_source``.
        cut: compute the frozen part of the network, up to this tensor, and the rest in two steps,
            as in training; ``"none"`` computes in one step. Affects the logits at float precision
            only. Default: ``classifier.cut``, which ``fine_tune`` sets.
        batch_size: images per step. A different size than in training changes the logits at float
            precision.
        coverage: also measure prediction sets with this coverage, such as 0.9; see
            ``transfer.evaluation.abstention.prediction_sets``.
        probabilities: file for the probabilities of all classes, ``.npy``, float32
            ``[num_examples, num_classes]``, in the order of the split and of
            ``Classifier.labels``.
        progress: wraps the batches, for a progress bar.

    Returns:
        ``accuracy`` and ``top5`` (0..1), ``loss`` (mean cross-entropy, nats), ``num_examples``,
        ``accuracy_ci95`` (Wilson score interval; with groups, also ``num_groups`` and
        ``effective_examples``, see ``summarize``); ``dataset`` and ``splits``, the images used, and
        ``image_ids_sha256``, a hash of their ids (see ``Source``); and the metrics per class and
        over all classes, with bootstrap intervals, of ``transfer.evaluation.metrics.measure``; with
        ``coverage``, also ``conformal``. All values are JSON types.

    Raises:
        ValueError: if the split is empty or has classes that are new, ``cut`` does not separate the
            input from the tap, the batch size is less than 1, ``coverage`` is not between 0 and 1
            or there are too few images for it, ``probabilities`` does not end in ``.npy``, or
            logits are not finite.
        FileNotFoundError: if the folder of ``probabilities`` does not exist.
        UnreadableImageError: if images cannot be decoded; ``split.readable`` leaves them out.

    Example:
        >>> from transfer import evaluate, fine_tune, load_meta_graph, open_source
        >>> graph = load_meta_graph("embedded")
        >>> train, held_out = open_source("digits").train_and_eval_splits()
        >>> options = {"shots_per_class": 5, "run_dir": "runs/evaluate"}
        >>> result = fine_tune(graph, train, held_out, **options)
        >>> metrics = evaluate(result.classifier, held_out)
        >>> metrics["accuracy"] == result.metrics["eval"]["accuracy"]
        True
    """
    path = None if probabilities is None else Path(probabilities)
    if path is not None:
        check_path(path, "probabilities")
    logits, labels = compute_logits(
        classifier, split, cut=cut, batch_size=batch_size, progress=progress
    )
    if path is not None:
        write_probabilities(path, logits)
    return measure(classifier, split, logits, labels, coverage)


def compute_logits(
    classifier: Classifier,
    split: Split,
    *,
    cut: str | None = None,
    batch_size: int = EXTRACTION_BATCH,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits, float32 ``[num_examples, num_classes]``, and labels, int64 ``[num_examples]``, as
    indices of logits. See ``evaluate``."""
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    if not len(split):
        raise ValueError("the split holds no images to evaluate on")
    to_logit = _class_order(split.source, classifier.labels)
    frozen, trained = classifier.split(classifier.cut if cut is None else cut)
    batches: Iterable[Any] = progress(split.in_order(classifier.preprocess, batch_size))
    if frozen is not None:
        # In two steps, as in training, for bit-identical results.
        batches = stream(Compiled(frozen), batches)
    logits, labels = predict_logits(Compiled(trained), batches)
    return logits, to_logit[labels]


def measure(
    classifier: Classifier,
    split: Split,
    logits: np.ndarray,
    labels: np.ndarray,
    coverage: float | None = None,
) -> dict[str, Any]:
    """The result of ``evaluate``, from the logits and labels of ``compute_logits``."""
    sets = {}
    if coverage is not None:
        sets["conformal"] = abstention.prediction_sets(logits, labels, coverage, split.groups)
    heading = {
        "dataset": split.source.name,
        "splits": [name for name, _ in split.parts],
        "image_ids_sha256": ids_digest(replace(split).ids),
    }
    scores = score_images(logits, labels)
    summary = summarize_labels(
        scores.predictions == labels,
        scores.label_log_likelihoods,
        scores.label_ranks,
        split.groups,
    )
    measured = metrics.measure(
        logits, labels, classifier.labels, groups=split.groups, scores=scores
    )
    return heading | measured | summary | sets


def _class_order(source: Source, labels: list[str]) -> np.ndarray:
    """Index of the logit for each class index of the dataset."""
    missing = sorted(set(labels) - set(source.class_names))
    extra = sorted(set(source.class_names) - set(labels))
    if extra:
        raise ValueError(
            f"{source.name!r} has other classes than the classifier: {len(extra)} are new "
            f"({', '.join(extra[:5])}), {len(missing)} are missing "
            f"({', '.join(missing[:5]) or 'none'}); its images must be of classes of the classifier"
        )
    if missing:
        logger.warning(
            f"{source.name!r} has no images of {len(missing)} of the {len(labels)} classes: "
            f"{', '.join(missing[:5])}{', ...' if missing[5:] else ''}"
        )
    return np.array([labels.index(name) for name in source.class_names])
