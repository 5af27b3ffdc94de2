"""Evaluate a classifier on labelled images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from transfer.activations.extraction import EXTRACTION_BATCH, Compiled, stream
from transfer.core.escapes import printable
from transfer.core.npy_files import check_path
from transfer.data.dataset import Source, Split
from transfer.data.fingerprints import ids_digest
from transfer.evaluation import (
    abstention,
    conformal,
    file_predictions,
    metrics,
    out_of_distribution,
)
from transfer.evaluation.image_scores import score_images
from transfer.evaluation.prediction import check_share, predict_logits, summarize_labels
from transfer.evaluation.tables import write_probabilities
from transfer.layers.classifier import Classifier
from transfer.layers.head import before_head

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outputs:
    """What a classifier computes of images.

    ``logits`` are float32 ``[num_examples, num_classes]``; ``features``, float32 ``[num_examples,
    num_features]``, are those that the head takes, ``None`` if they are not needed.
    """

    logits: np.ndarray
    features: np.ndarray | None = None

    @classmethod
    def split(cls, both: np.ndarray, num_classes: int) -> Outputs:
        """Of the output of ``out_of_distribution.features_and_logits``."""
        return cls(both[:, -num_classes:].copy(), both[:, :-num_classes])


@dataclass(frozen=True)
class Uncertainty:
    """What else is measured of a classifier: the arguments ``coverage`` and ``risk`` of
    ``evaluate``, and the ``unknown`` images, in the folder ``unknown_folder``.

    Raises:
        ValueError: if the coverage or the risk is not between 0 and 1.
    """

    coverage: float | None = None
    risk: float | None = None
    unknown_folder: str | None = None

    def __post_init__(self) -> None:
        check_share("coverage", self.coverage)
        check_share("risk", self.risk)
        if self.unknown_folder is not None:
            next(file_predictions.files_in(self.unknown_folder))


def evaluate(
    classifier: Classifier,
    split: Split,
    *,
    cut: str | None = None,
    batch_size: int = EXTRACTION_BATCH,
    coverage: float | None = None,
    risk: float | None = None,
    unknown: str | Path | None = None,
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
            ``transfer.evaluation.conformal.prediction_sets``.
        risk: also find the confidence from which on the error rate is at most this, such as 0.05;
            see ``transfer.evaluation.abstention.risk_threshold``.
        unknown: folder of images of none of the classes, at any depth: also measure how well
            out-of-distribution scores tell them apart; see
            ``transfer.evaluation.out_of_distribution``.
        probabilities: file for the probabilities of all classes, ``.npy``, float32
            ``[num_examples, num_classes]``, in the order of the split and of
            ``Classifier.labels``.
        progress: wraps the batches, for a progress bar.

    Returns:
        ``accuracy`` and ``top5`` (0..1), ``loss`` (mean cross-entropy, nats), ``num_examples``,
        ``accuracy_ci95`` (Wilson score interval; with groups, also ``num_groups`` and
        ``effective_examples``, see ``summarize``); ``dataset`` and ``splits``, the images used, and
        ``image_ids_sha256``, a hash of their ids (see ``Source``); and the metrics per class and
        over all classes, with intervals, of ``transfer.evaluation.metrics.measure``; with
        ``coverage``, also ``conformal``, with ``risk`` ``abstention``, and with ``unknown``
        ``unknown``: the ``folder``, ``num_images``, and ``scores`` by name, each with the results
        of ``out_of_distribution.separation``. All values are JSON types.

    Raises:
        ValueError: if the split is empty or has classes that are new, ``cut`` does not separate the
            input from the tap, the batch size is less than 1, ``coverage`` or ``risk`` is not
            between 0 and 1, there are too few images for the coverage, ``unknown`` has no images,
            ``probabilities`` does not end in ``.npy``, or logits are not finite.
        FileNotFoundError: if ``unknown`` or the folder of ``probabilities`` does not exist.
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
    wanted = Uncertainty(coverage, risk, None if unknown is None else str(unknown))
    outputs, labels = compute(
        classifier,
        split,
        cut=cut,
        batch_size=batch_size,
        with_features=unknown is not None,
        progress=progress,
    )
    if path is not None:
        write_probabilities(path, outputs.logits)
    return measure(classifier, split, outputs, labels, wanted, batch_size, progress)


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
    outputs, labels = compute(classifier, split, cut=cut, batch_size=batch_size, progress=progress)
    return outputs.logits, labels


def compute(
    classifier: Classifier,
    split: Split,
    *,
    cut: str | None = None,
    batch_size: int = EXTRACTION_BATCH,
    with_features: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[Outputs, np.ndarray]:
    """The outputs of a classifier, and the labels, int64 ``[num_examples]``, as indices of logits.
    See ``evaluate``."""
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
    if not with_features:
        logits, labels = predict_logits(Compiled(trained), batches)
        return Outputs(logits), to_logit[labels]
    extractor, head = before_head(trained), trained.layers[-1]
    both = Compiled(out_of_distribution.features_and_logits(extractor, head))
    values, labels = predict_logits(both, batches)
    return Outputs.split(values, len(classifier.labels)), to_logit[labels]


def compute_unknown(
    classifier: Classifier,
    folder: str | Path,
    *,
    batch_size: int = EXTRACTION_BATCH,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Outputs:
    """Features and logits of the images in a folder, at any depth and without labels. Images that
    cannot be read are left out, with a warning.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if no image can be read.
    """
    network = Compiled(out_of_distribution.of_resized(classifier))
    files = file_predictions.files_in(folder)
    rows, failures = [], []
    batches = file_predictions.batches_of(files, classifier.preprocess, batch_size)
    for _, pixels, failed in progress(batches):
        failures += failed
        if pixels:
            rows.append(np.asarray(network(tf.stack(pixels))))
    if failures:
        path, error = failures[0]
        logger.warning(
            f"{len(failures)} images in {printable(folder)} cannot be read and are left out, e.g. "
            f"{printable(path)}: {file_predictions.reason(error)}"
        )
    if not rows:
        raise ValueError(f"unknown={printable(folder)}: none of its images can be read")
    return Outputs.split(np.concatenate(rows), len(classifier.labels))


def measure(
    classifier: Classifier,
    split: Split,
    outputs: Outputs,
    labels: np.ndarray,
    wanted: Uncertainty = Uncertainty(),
    batch_size: int = EXTRACTION_BATCH,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """The result of ``evaluate``, from the outputs and labels of ``compute``."""
    logits = outputs.logits
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
    extra: dict[str, Any] = {}
    if wanted.coverage is not None:
        extra["conformal"] = conformal.prediction_sets(
            logits, labels, wanted.coverage, split.groups
        )
    if wanted.risk is not None:
        right = scores.predictions == labels
        extra["abstention"] = abstention.risk_threshold(
            scores.confidences, right, wanted.risk, split.groups
        )
    if wanted.unknown_folder is not None:
        folder = wanted.unknown_folder
        others = compute_unknown(classifier, folder, batch_size=batch_size, progress=progress)
        extra["unknown"] = {
            "folder": folder,
            "num_images": len(others.logits),
            "scores": _separations(outputs, labels, others, split.groups),
        }
    return heading | measured | summary | extra


def _separations(
    known: Outputs, labels: np.ndarray, unknown: Outputs, groups: np.ndarray | None
) -> dict[str, Any]:
    """How well each out-of-distribution score tells unknown images from held-out ones."""
    if known.features is None or unknown.features is None:
        raise ValueError("out-of-distribution scores need the features of the images")
    num_classes = known.logits.shape[1]
    means = out_of_distribution.class_means(known.features, labels, num_classes)
    distances = out_of_distribution.held_out_distance(known.features, labels, num_classes, groups)
    of_known = {"feature_distance": distances} | out_of_distribution.logit_scores(known.logits)
    others = out_of_distribution.feature_distance(unknown.features, means)
    of_unknown = {"feature_distance": others} | out_of_distribution.logit_scores(unknown.logits)
    return {
        name: out_of_distribution.separation(of_known[name], of_unknown[name], groups)
        for name in out_of_distribution.SCORES
    }


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
