"""All that is measured of a classifier beyond its accuracy: by class, by confidence, by rank.

Equal to scikit-learn's figures of these names. Intervals are percentiles of a bootstrap over the
images (doi 10.1007/978-1-4899-4541-9, chapter 13), what another set of as many images might have
given, shifted by how far its median lies from the figure: fewer different images make an average
precision larger and an F1 smaller, so that plain percentiles may lie beside the figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from transfer.evaluation.prediction import probabilities

BINS = 15
"""Of the confidence, in the calibration error; as in arXiv 1706.04599."""
_OF_CLASSES = ("precision", "recall", "f1")
_RANK_WORK, _MIN_RANKED = 10**8, 50  # probabilities in all resamples together; resamples at least


def measure(
    logits: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures by class and over all classes.

    Args:
        logits: float ``[num_examples, num_classes]``.
        labels: int ``[num_examples]``.
        class_names: a name per logit.
        resamples: of the bootstrap. Where sorting would take too long there are fewer for the
            figures that need it, and none (no interval) for more than two million probabilities.
        seed: of the bootstrap.

    Returns:
        ``accuracy``, ``top5``, ``loss`` (mean cross-entropy, nats), ``balanced_accuracy``;
        ``macro`` and ``weighted``, each with ``precision``, ``recall`` and ``f1``; ``roc_auc`` and
        ``average_precision`` (one class against the rest, averaged over the classes that occur and
        are not all there is); ``calibration_error`` (0 to 1, ``BINS`` bins of equal width);
        ``classes``: for each its ``label``, ``precision``, ``recall``, ``f1``, ``support``,
        ``roc_auc`` and ``average_precision`` (``None`` where undefined) and ``ci95`` of these; and
        ``ci95``, the names of the figures over all classes with their intervals.
    """
    p = probabilities(logits)
    num_examples = len(p)
    cheap, resampled_ranks = _cheap(p, labels), _resampled_ranks(p, labels)
    figures, by_class = cheap(np.arange(num_examples)), _ranks(p, labels)
    generator = np.random.default_rng(seed)
    num_ranked = min(int(_RANK_WORK / p.size), resamples)
    num_ranked = 0 if num_ranked < min(_MIN_RANKED, resamples) else num_ranked
    drawn: dict[str, list[float]] = {}
    drawn_by_class: dict[str, list[np.ndarray]] = {}
    for number in range(resamples):
        chosen = generator.integers(0, num_examples, num_examples)
        sample = cheap(chosen)
        found = _flat(sample)
        of_classes = {name: np.array(sample["classes"][name]) for name in _OF_CLASSES}
        # Without an image of it, there is nothing to say of a class.
        occurs = np.array(sample["classes"]["support"]) > 0
        of_classes = {name: np.where(occurs, v, np.nan) for name, v in of_classes.items()}
        if number < num_ranked:
            ranks = resampled_ranks(np.bincount(chosen, minlength=num_examples))
            found |= {name: _mean(values) for name, values in ranks.items()}
            of_classes |= ranks
        for name, value in found.items():
            drawn.setdefault(name, []).append(value)
        for name, values in of_classes.items():
            drawn_by_class.setdefault(name, []).append(values)
    overall = {name: _mean(values) for name, values in by_class.items()}
    by_class |= {name: np.array(figures["classes"][name]) for name in _OF_CLASSES}
    samples_by_class = {name: np.stack(values) for name, values in drawn_by_class.items()}
    classes = [
        {"label": name, "support": int(figures["classes"]["support"][number])}
        | {part: _none_if_nan(values[number]) for part, values in by_class.items()}
        | {
            "ci95": {
                part: _interval(values[:, number], by_class[part][number])
                for part, values in samples_by_class.items()
            }
        }
        for number, name in enumerate(class_names)
    ]
    del figures["classes"]
    single = _flat(figures) | overall
    intervals = {
        name: _interval(np.array(drawn.get(name, [])), figure, math.inf if name == "loss" else 1.0)
        for name, figure in single.items()
    }
    return (
        figures
        | {name: _none_if_nan(value) for name, value in overall.items()}
        | {"classes": classes, "ci95": intervals}
    )


def calibration(p: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """For each bin of the confidence that has images: ``low``, ``high``, ``confidence`` and
    ``accuracy`` (means), ``count``."""
    confidence, right = p.max(-1), p.argmax(-1) == labels
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


def compare(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """McNemar's test of two classifiers on the same images (doi 10.1007/BF02295996), exact.

    Args:
        first: predictions of one classifier, int ``[num_examples]``.
        second: predictions of the other one, int ``[num_examples]``.
        labels: int ``[num_examples]``.

    Returns:
        ``only_first`` and ``only_second``: how many images only that one has right; ``p_value``.
    """
    from scipy.stats import binomtest

    first_right, second_right = first == labels, second == labels
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    total = only_first + only_second
    p_value = binomtest(only_first, total).pvalue if total else 1.0
    return {"only_first": only_first, "only_second": only_second, "p_value": float(p_value)}


def _cheap(p: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], dict[str, Any]]:
    """What follows from predictions and confidences, for a choice of images."""
    predictions, confidences = p.argmax(-1), p.max(-1)
    num_examples, num_classes = p.shape
    own = p[np.arange(num_examples), labels]
    losses = -np.log(np.maximum(own, np.finfo(float).tiny))
    in_top5 = (p > own[:, None]).sum(-1) < 5
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)

    def figures(chosen: np.ndarray) -> dict[str, Any]:
        label, prediction = labels[chosen], predictions[chosen]
        # As scikit-learn's precision_recall_fscore_support, which a thousand times is too slow.
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

    return figures


def _ranks(p: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """What follows from the order of the probabilities of each class: float ``[num_classes]``, NaN
    where all images or none are of the class."""
    import sklearn.metrics

    scores: dict[str, Callable[..., float]] = {
        "roc_auc": sklearn.metrics.roc_auc_score,
        "average_precision": sklearn.metrics.average_precision_score,
    }
    found = {name: np.full(p.shape[1], np.nan) for name in scores}
    for number in range(p.shape[1]):
        is_it = labels == number
        if is_it.any() and not is_it.all():
            for name, score in scores.items():
                found[name][number] = score(is_it, p[:, number])
    return found


def _resampled_ranks(
    p: np.ndarray, labels: np.ndarray
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The same of images that count several times or not at all, by how often each is drawn: int
    ``[num_examples]``. All classes at once, and sorted once: scikit-learn would take minutes."""
    order = np.argsort(-p, axis=0, kind="stable")
    ordered = np.take_along_axis(p, order, axis=0)
    is_last_of_equals = np.ones_like(order, bool)
    is_last_of_equals[:-1] = ordered[:-1] != ordered[1:]
    is_it = labels[order] == np.arange(p.shape[1])

    def figures(counts: np.ndarray) -> dict[str, np.ndarray]:
        drawn = counts[order]
        all_so_far = np.where(is_last_of_equals, drawn.cumsum(0), 0)
        right_so_far = np.where(is_last_of_equals, (drawn * is_it).cumsum(0), 0)
        # Within equals, and only there, nothing is added.
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

    return figures


def _flat(figures: dict[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, dict) and name != "classes":
            flat |= {f"{name}_{part}": number for part, number in value.items()}
        elif isinstance(value, float):
            flat[name] = value
    return flat


def _interval(values: np.ndarray, figure: float, highest: float = 1.0) -> list[float] | None:
    """Of a figure of 0 to ``highest``, by its resamples."""
    known = values[~np.isnan(values)]
    if not len(known) or math.isnan(figure):
        return None
    low, middle, high = np.quantile(known, [0.025, 0.5, 0.975])
    shift = figure - middle
    return [float(max(low + shift, 0.0)), float(min(high + shift, highest))]


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
