"""Metrics of a classifier: per class, calibration, ROC AUC and average precision, with intervals.

Equal to scikit-learn's metrics of the same names. Confidence intervals of shares of images
(accuracy, top-5 accuracy, recall and precision of a class) are Wilson score intervals, which do not
collapse to a point where all images are right. Those of the other metrics are percentiles of a
bootstrap over the images (doi 10.1007/978-1-4899-4541-9, chapter 13), or over their groups, shifted
by the difference between the metric and the median of its resamples: a resample has fewer distinct
images, which makes average precision larger and F1 smaller, so that plain percentiles may not
contain the metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from transfer.evaluation import by_group
from transfer.evaluation.abstention import risk_coverage
from transfer.evaluation.image_scores import ImageScores, score_images
from transfer.evaluation.prediction import TOP_K, by_class, probabilities

MAX_CONFUSED = 20
"""Number of pairs of classes in ``most_confused``."""
BINS = 15
"""Number of confidence bins of the expected calibration error, as in arXiv 1706.04599."""
_OF_CLASSES = ("precision", "recall", "f1")
# For metrics based on ranks: maximum number of probabilities in all resamples together, and minimum
# number of resamples.
_RANK_WORK, _MIN_RANKED = 10**8, 50
_MIN_UNITS = 5
"""Minimum number of images, or groups, of a class for bootstrap intervals of its metrics."""


def measure(
    logits: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    groups: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
    scores: ImageScores | None = None,
) -> dict[str, Any]:
    """Compute metrics per class and over all classes.

    Args:
        logits: float ``[num_examples, num_classes]``.
        labels: int ``[num_examples]``.
        class_names: one name per logit.
        groups: group number of each image, int ``[num_examples]``: resamples then draw groups, and
            there are no intervals for a single group.
        resamples: number of bootstrap resamples. Metrics that need sorting use fewer if it would
            take too long, and none (no interval) for more than two million probabilities.
        seed: seed of the bootstrap.
        scores: those of ``score_images(logits, labels)``, if they are already known.

    Returns:
        ``accuracy``, ``top5``, ``loss`` (mean cross-entropy, nats), ``balanced_accuracy``;
        ``macro`` and ``weighted``, each with ``precision``, ``recall`` and ``f1``; ``roc_auc`` and
        ``average_precision`` (one-vs-rest, averaged over the classes with both positive and
        negative examples); ``calibration_error`` (0 to 1, ``BINS`` bins of equal width);
        ``most_confused``: up to ``MAX_CONFUSED`` pairs of ``label`` and ``prediction`` with the
        ``count`` of their images and its ``share`` of the images of the label; ``risk_coverage``:
        the accuracy if images of low confidence are not predicted (``abstention.risk_coverage``);
        ``classes``: for each its ``label``, ``precision``, ``recall``, ``f1``, ``support``,
        ``roc_auc`` and ``average_precision`` (``None`` where undefined) and ``ci95`` of these; and
        ``ci95``, which maps the names of the metrics over all classes to their intervals. An
        interval is ``None`` where its metric is undefined, or where the bootstrap does not tell it:
        all resamples are equal, or a class has fewer than ``_MIN_UNITS`` images, or groups.

    Raises:
        ValueError: if logits are not finite.
    """
    if not_finite := int((~np.isfinite(logits)).any(-1).sum()):
        raise ValueError(
            f"the logits of {not_finite} of {len(logits)} images are infinite or not a number: the "
            "training diverged, or the model's weights are damaged; a lower learning rate may help"
        )
    num_examples, scores = len(logits), scores or score_images(logits, labels)
    cheap = _cheap(scores, labels, len(class_names))
    overall_metrics, of_class = cheap(np.arange(num_examples)), _ranks(by_class(logits), labels)
    if groups is not None and len(np.unique(groups)) == 1:
        resamples = 0
    generator, resample = np.random.default_rng(seed), by_group.resampler(num_examples, groups)
    num_ranked = min(int(_RANK_WORK / logits.size), resamples)
    num_ranked = 0 if num_ranked < min(_MIN_RANKED, resamples) else num_ranked
    resampled_ranks = _resampled_ranks(probabilities(logits), labels) if num_ranked else None
    drawn: dict[str, list[float]] = {}
    drawn_by_class: dict[str, list[np.ndarray]] = {}
    for number in range(resamples):
        chosen = resample(generator)
        sample = cheap(chosen)
        values_of_sample = _flat(sample)
        of_classes = {name: np.array(sample["classes"][name]) for name in _OF_CLASSES}
        # Metrics of a class without images are undefined.
        occurs = np.array(sample["classes"]["support"]) > 0
        of_classes = {name: np.where(occurs, v, np.nan) for name, v in of_classes.items()}
        if resampled_ranks is not None and number < num_ranked:
            ranks = resampled_ranks(np.bincount(chosen, minlength=num_examples))
            values_of_sample |= {name: _mean(values) for name, values in ranks.items()}
            of_classes |= ranks
        for name, value in values_of_sample.items():
            drawn.setdefault(name, []).append(value)
        for name, values in of_classes.items():
            drawn_by_class.setdefault(name, []).append(values)
    overall = {name: _mean(values) for name, values in of_class.items()}
    of_class |= {name: np.array(overall_metrics["classes"][name]) for name in _OF_CLASSES}
    samples_by_class = {name: np.stack(values) for name, values in drawn_by_class.items()}
    shares = _intervals_of_shares(scores.predictions, labels, len(class_names), groups)
    few = _few_units(labels, len(class_names), groups)
    classes = [
        {"label": name, "support": int(overall_metrics["classes"]["support"][number])}
        | {part: _none_if_nan(values[number]) for part, values in of_class.items()}
        | {
            "ci95": {
                part: None if few[number] else _interval(values[:, number], of_class[part][number])
                for part, values in samples_by_class.items()
            }
            | shares[number]
        }
        for number, name in enumerate(class_names)
    ]
    del overall_metrics["classes"]
    single = _flat(overall_metrics) | overall
    intervals = {
        name: _interval(np.array(drawn.get(name, [])), value, math.inf if name == "loss" else 1.0)
        for name, value in single.items()
    } | _intervals_over_all(scores, labels, len(class_names), groups)
    intervals["weighted_recall"] = intervals["accuracy"]  # the same number
    if single["macro_recall"] == single["balanced_accuracy"]:
        intervals["macro_recall"] = intervals["balanced_accuracy"]
    return (
        overall_metrics
        | {name: _none_if_nan(value) for name, value in overall.items()}
        | {"most_confused": _most_confused(scores.predictions, labels, class_names)}
        | {"risk_coverage": risk_coverage(scores.confidences, scores.predictions == labels)}
        | {"classes": classes, "ci95": intervals}
    )


def calibration(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """Calibration curve: for each non-empty confidence bin its ``low`` and ``high`` ends, mean
    ``confidence`` and ``accuracy``, and ``count``.

    Args:
        confidence: probability of the predicted class of each image, float ``[num_examples]``.
        right: whether it is the label, bool ``[num_examples]``.
    """
    number = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        {
            "low": index / BINS,
            "high": (index + 1) / BINS,
            "confidence": float(confidence[number == index].mean()),
            "accuracy": float(right[number == index].mean()),
            "count": int((number == index).sum()),
        }
        for index in np.unique(number).tolist()
    ]


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean difference between confidence and accuracy, 0 to 1, over the bins of ``calibration``."""
    gaps = [
        bin["count"] * abs(bin["confidence"] - bin["accuracy"])
        for bin in calibration(confidence, right)
    ]
    return float(sum(gaps) / len(right))


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """The expected calibration error of predictions, 0 to 1.

    Args:
        logits: float ``[num_examples, num_classes]``.
        labels: int ``[num_examples]``.
    """
    scores = score_images(logits, labels)
    return expected_calibration_error(scores.confidences, scores.predictions == labels)


def confused_pairs(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The pairs of classes that are confused, most frequent first.

    Args:
        predictions: int ``[num_examples]``.
        labels: int ``[num_examples]``.

    Returns:
        int64 ``[num_pairs, 3]``: label, prediction and number of images.
    """
    pairs = np.stack([labels, predictions], axis=-1)[labels != predictions]
    pairs, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return np.column_stack([pairs, counts])[order]


def compare(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None
) -> dict[str, Any]:
    """McNemar's exact test of two classifiers on the same images (doi 10.1007/BF02295996).

    Args:
        first: predictions of the first classifier, int ``[num_examples]``.
        second: predictions of the second classifier, int ``[num_examples]``.
        labels: int ``[num_examples]``.
        groups: group number of each image, int ``[num_examples]``: the p-value is then that of
            ``by_group.exchange_test``.

    Returns:
        ``only_first`` and ``only_second``, the numbers of images that only this classifier predicts
        correctly, ``p_value``, and with groups ``num_groups``.
    """
    from scipy.stats import binomtest

    first_right, second_right = first == labels, second == labels
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    counts = {"only_first": only_first, "only_second": only_second}
    if groups is not None:
        difference = first_right.astype(int) - second_right
        p_value = by_group.exchange_test(difference, groups)
        return counts | {"p_value": p_value, "num_groups": len(np.unique(groups))}
    total = only_first + only_second
    p_value = binomtest(only_first, total).pvalue if total else 1.0
    return counts | {"p_value": float(p_value)}


def _most_confused(
    predictions: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> list[dict[str, Any]]:
    support = np.bincount(labels, minlength=len(class_names)).tolist()
    return [
        {
            "label": class_names[label],
            "prediction": class_names[prediction],
            "count": count,
            "share": count / support[label],
        }
        for label, prediction, count in confused_pairs(predictions, labels)[:MAX_CONFUSED].tolist()
    ]


def _cheap(
    scores: ImageScores, labels: np.ndarray, num_classes: int
) -> Callable[[np.ndarray], dict[str, Any]]:
    """A function that computes the metrics that need no sorting, for chosen positions."""
    predictions, confidences = scores.predictions, scores.confidences
    losses, in_top5 = -scores.label_log_likelihoods, scores.label_ranks <= TOP_K
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)

    def compute(chosen: np.ndarray) -> dict[str, Any]:
        label, prediction = labels[chosen], predictions[chosen]
        # Equal to scikit-learn's precision_recall_fscore_support, too slow for 1000 resamples.
        support = np.bincount(label, minlength=num_classes)
        predicted = np.bincount(prediction, minlength=num_classes)
        both = np.bincount(label[label == prediction], minlength=num_classes)
        precision = both / np.maximum(predicted, 1)
        recall = both / np.maximum(support, 1)
        f1 = 2 * both / np.maximum(predicted + support, 1)
        occurs = (support > 0) | (predicted > 0)
        named = {"precision": precision, "recall": recall, "f1": f1}
        right = prediction == label
        gaps = np.abs(
            np.bincount(bins[chosen], right, BINS)
            - np.bincount(bins[chosen], confidences[chosen], BINS)
        )
        return {
            "accuracy": float(right.mean()),
            "top5": float(in_top5[chosen].mean()),
            "loss": float(losses[chosen].mean()),
            "balanced_accuracy": float(recall[support > 0].mean()),
            "macro": {name: float(values[occurs].mean()) for name, values in named.items()},
            "weighted": {
                name: float(np.average(values, weights=support)) for name, values in named.items()
            },
            "calibration_error": float(gaps.sum() / len(chosen)),
            "classes": {name: values.tolist() for name, values in named.items()}
            | {"support": support.tolist()},
        }

    return compute


def _ranks(columns: Iterable[np.ndarray], labels: np.ndarray) -> dict[str, np.ndarray]:
    """ROC AUC and average precision of each class, float ``[num_classes]``; NaN for a class without
    positive or without negative examples.

    Both depend only on how many images have a lower, and how many a higher or equal probability
    than each image of the class. These are found in the sorted probabilities; scikit-learn takes
    fifty times as long.

    Args:
        columns: the probabilities of each class, float ``[num_examples]``.
        labels: int ``[num_examples]``.
    """
    by_class: dict[str, list[float]] = {"roc_auc": [], "average_precision": []}
    for number, p in enumerate(columns):
        own = np.sort(p[labels == number])
        num_right, num_wrong = len(own), len(p) - len(own)
        if not num_right or not num_wrong:
            auc = average_precision = math.nan
        else:
            ordered = np.sort(p)
            below, upto = (np.searchsorted(ordered, own, side) for side in ("left", "right"))
            own_below, own_upto = (np.searchsorted(own, own, side) for side in ("left", "right"))
            # A wrong image with an equal probability counts half.
            wrong_below = ((below - own_below) + (upto - own_upto)) / 2
            auc = wrong_below.sum() / (num_right * num_wrong)
            average_precision = ((num_right - own_below) / (len(p) - below)).mean()
        by_class["roc_auc"].append(float(auc))
        by_class["average_precision"].append(float(average_precision))
    return {name: np.array(values) for name, values in by_class.items()}


def _resampled_ranks(
    p: np.ndarray, labels: np.ndarray
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """A function that computes ``_ranks`` for a resample, given how often each image was drawn, int
    ``[num_examples]``. Vectorized over classes, and sorts once: scikit-learn would take minutes."""
    order = np.argsort(-p, axis=0, kind="stable")
    ordered = np.take_along_axis(p, order, axis=0)
    is_last_of_equals = np.ones_like(order, bool)
    is_last_of_equals[:-1] = ordered[:-1] != ordered[1:]
    is_it = labels[order] == np.arange(p.shape[1])

    def compute(counts: np.ndarray) -> dict[str, np.ndarray]:
        drawn = counts[order]
        all_so_far = np.where(is_last_of_equals, drawn.cumsum(0), 0)
        right_so_far = np.where(is_last_of_equals, (drawn * is_it).cumsum(0), 0)
        # The counts change only at the last of equal probabilities.
        all_so_far = np.maximum.accumulate(all_so_far, axis=0)
        right_so_far = np.maximum.accumulate(right_so_far, axis=0)
        wrong_so_far = all_so_far - right_so_far
        num_right, num_wrong = right_so_far[-1], wrong_so_far[-1]
        right = np.diff(right_so_far, axis=0, prepend=0)
        wrong = np.diff(wrong_so_far, axis=0, prepend=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = right_so_far / np.maximum(all_so_far, 1)
            auc = (wrong * (right_so_far - right / 2)).sum(0) / (num_right * num_wrong)
            mean_precision = (right * precision).sum(0) / num_right
        mean_precision[num_wrong == 0] = np.nan
        return {"roc_auc": auc, "average_precision": mean_precision}

    return compute


def _flat(metrics: dict[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict) and name != "classes":
            flat |= {f"{name}_{part}": number for part, number in value.items()}
        elif isinstance(value, float):
            flat[name] = value
    return flat


def _intervals_over_all(
    scores: ImageScores, labels: np.ndarray, num_classes: int, groups: np.ndarray | None
) -> dict[str, list[float]]:
    """Intervals of the shares of images over all classes."""
    in_top5 = scores.label_ranks <= TOP_K
    # By definition, and not as a result.
    certain = [1.0, 1.0] if num_classes <= TOP_K else None
    return {
        "accuracy": by_group.proportion_interval(scores.predictions == labels, groups),
        "top5": certain or by_group.proportion_interval(in_top5, groups),
    }


def _intervals_of_shares(
    predictions: np.ndarray, labels: np.ndarray, num_classes: int, groups: np.ndarray | None
) -> list[dict[str, list[float] | None]]:
    """Intervals of the ``precision`` and ``recall`` of each class: shares of the images that are
    predicted as the class, and of the images of the class."""
    right = predictions == labels
    intervals: list[dict[str, list[float] | None]] = [{} for _ in range(num_classes)]
    for part, classes in (("precision", predictions), ("recall", labels)):
        order = np.argsort(classes, kind="stable")
        ends = np.cumsum(np.bincount(classes, minlength=num_classes))
        for number, chosen in enumerate(np.split(order, ends[:-1])):
            of_chosen = None if groups is None else groups[chosen]
            intervals[number][part] = (
                by_group.proportion_interval(right[chosen], of_chosen) if len(chosen) else None
            )
    return intervals


def _few_units(labels: np.ndarray, num_classes: int, groups: np.ndarray | None) -> np.ndarray:
    """Whether a class has fewer than ``_MIN_UNITS`` images, or groups, bool ``[num_classes]``."""
    units = np.arange(len(labels)) if groups is None else groups
    pairs = np.unique(np.stack([labels, units]), axis=1)
    return np.bincount(pairs[0], minlength=num_classes) < _MIN_UNITS


def _interval(values: np.ndarray, metric: float, highest: float = 1.0) -> list[float] | None:
    """95 % interval of a metric in 0 to ``highest``, from its values in the resamples; ``None`` if
    there are none, or all are equal: that all images drawn are right does not make it certain."""
    known = values[~np.isnan(values)]
    if not len(known) or math.isnan(metric) or known.min() == known.max():
        return None
    low, middle, high = np.quantile(known, [0.025, 0.5, 0.975])
    shift = metric - middle
    return [float(max(low + shift, 0.0)), float(min(high + shift, highest))]


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
