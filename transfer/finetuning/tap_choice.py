"""Choose the tap for a head by the cross-validated accuracy of a head on each of several taps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from transfer.activations.extraction import EXTRACTION_BATCH
from transfer.activations.features import extract_features
from transfer.data.dataset import Split
from transfer.evaluation import by_group
from transfer.finetuning.hyperparameters import requested_stages
from transfer.finetuning.model_plan import plan_model
from transfer.finetuning.options import FineTuneOptions, parse_tap
from transfer.graph import cut, infer
from transfer.graph.cuts import list_cuts
from transfer.graph.policy import ForbiddenOpError
from transfer.layers.backbone import Backbone
from transfer.models.meta_graph import MetaGraph
from transfer.models.plan import ModelPlan, cut_tensor
from transfer.training.folds import stratified_folds
from transfer.training.linear_head import Solution
from transfer.training.ridge import GRID, fit_ridge

logger = logging.getLogger(__name__)

AUTO = "auto"
"""Value of the option ``tap`` that chooses the tap by the training images."""
MAX_TAPS = 4
# Images to compare taps on, and the multiply-adds that they may take if they are more than a few.
MAX_IMAGES, _MIN_IMAGES, _MAX_WORK = 2000, 500, 10**13
_FOLDS = 5
_PENALTIES = GRID[::3]  # coarser, as many heads are fitted


@dataclass(frozen=True)
class TapScore:
    """Cross-validated accuracy (0 to 1) of a head on a tap, and the 95 % interval of that of a run;
    ``width`` is the number of features, ``fit_s`` the seconds that it would take to solve for a
    head on all images."""

    tap: str
    width: int
    accuracy: float
    interval: tuple[float, float]
    fit_s: float = 0.0


@dataclass(frozen=True)
class TapChoice:
    """The scores of several taps, and the one with the highest accuracy.

    The accuracy of the best of several is too high by the choice. ``nested`` is the accuracy of the
    whole procedure, choice included: for each fold, the tap is chosen on the other folds by the
    leave-one-out accuracy of their heads. ``nested_interval`` is the 95 % interval of the accuracy
    of a run that makes this choice.
    """

    scores: list[TapScore]
    best: TapScore
    nested: float
    nested_interval: tuple[float, float]
    num_images: int


def choose_tap(
    graph: MetaGraph,
    train: Split,
    options: FineTuneOptions,
    feeds: Mapping[str, float | bool] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    num_held_out: int | None = None,
) -> TapChoice:
    """Score the taps of a network on training images; no held-out image is looked at.

    The features are cached, where a run with the chosen tap finds them.

    Args:
        graph: the network.
        train: training images. Of more than ``MAX_IMAGES``, as many are drawn; fewer for a large
            network.
        options: of the run; ``tap`` may be ``auto``.
        feeds: values of placeholders, see ``Backbone``.
        progress: wraps the taps, for a progress bar.
        num_held_out: see ``score_taps``.

    Raises:
        ValueError: if no tap works, or a class has fewer than two images, or groups.

    Example:
        >>> from transfer import load_meta_graph, open_source
        >>> from transfer.finetuning.options import FineTuneOptions
        >>> from transfer.finetuning.tap_choice import choose_tap
        >>> train, _ = open_source("digits").train_and_eval_splits()
        >>> choice = choose_tap(load_meta_graph("embedded"), train, FineTuneOptions())
        >>> choice.best.accuracy > 0.8
        True
    """
    candidates = candidate_taps(graph, options, feeds)
    work = sum(_multiply_adds(planned) for planned in candidates.values())
    few = drawn(train, max(_MIN_IMAGES, min(MAX_IMAGES, _MAX_WORK // max(1, work))), options.seed)
    features = {}
    for tap, planned in progress(list(candidates.items())):
        backbone = Backbone(
            graph,
            parse_tap(tap),
            input=options.input,
            feeds=feeds,
            keep_dropout=options.keep_dropout,
            use_ema=options.use_ema,
            name="backbone",
        )
        if options.random_weights:
            backbone.randomize(options.seed)
        features[tap] = extract_features(
            backbone,
            few,
            planned.preprocess,
            cache="disk" if options.cache == "disk" else "memory",
            cache_dir=options.cache_dir,
            cache_limit=options.cache_limit,
        ).values
    choice = score_taps(
        features,
        few.labels,
        few.groups,
        seed=options.seed,
        num_train=len(train),
        num_held_out=num_held_out,
    )
    logger.info(
        f"tap: {choice.best.tap}, cross-validated accuracy {choice.nested:.3f} on "
        f"{choice.num_images} training images"
    )
    return choice


def candidate_taps(
    graph: MetaGraph, options: FineTuneOptions, feeds: Mapping[str, float | bool] | None = None
) -> dict[str, ModelPlan]:
    """The taps to compare, with how each is used: that of the options or the default, ``all``, and
    the most promising others that work with the input and the images, at most ``MAX_TAPS``.

    Raises:
        ValueError: if none of them works; the reason of the first.
    """
    given = options.tap if options.tap not in (None, AUTO) else None
    names = [given or graph.card.tap or "fc7", "all", *(tap.name for tap in graph.taps())]
    taps: dict[str, ModelPlan] = {}
    seen = set()
    problem: Exception | None = None
    for name in names:
        try:
            planned = plan_model(graph, replace(options, tap=name), feeds)
            _check_cuts(graph, planned, options)
            shape = infer(planned.network).get(planned.network.output)
        except (ValueError, OSError, ForbiddenOpError) as error:
            problem = problem or error
            continue
        # The same layers and shape: the output of a dropout, for example, is that of its input.
        layers = frozenset(variable.name for variable in planned.network.variables)
        if (layers, shape) not in seen and planned.network.output != planned.network.input:
            seen.add((layers, shape))
            taps[name.removesuffix(":0")] = planned
        if len(taps) == MAX_TAPS:
            break
    if not taps:
        raise problem or ValueError(f"{str(graph.prefix)!r} has no tap")
    return taps


def _check_cuts(graph: MetaGraph, planned: ModelPlan, options: FineTuneOptions) -> None:
    """Refuse a tap up to which the network cannot be cut where the options ask for it."""
    for stage in requested_stages(options):
        for at in (stage.cut, stage.freeze_from):
            if at not in (None, "tap", "none"):
                cut(planned.network, cut_tensor(graph, planned.network, at))


def _multiply_adds(planned: ModelPlan) -> int:
    cuts = list_cuts(planned.network, planned.preprocess.size)
    return (cuts[-1].multiply_adds or 0) if cuts else 0


def score_taps(
    features: Mapping[str, np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    seed: int = 0,
    num_train: int | None = None,
    num_held_out: int | None = None,
) -> TapChoice:
    """Cross-validated accuracy of a head on the features of each tap, solved by ridge regression.

    Intervals are for the accuracy of a run on its held-out images. They are Wilson score intervals
    whose number of images accounts for the sample of held-out images and, with the factor of Nadeau
    and Bengio (doi 10.1023/A:1024068626366), for heads of different folds having most of their
    images in common. As a run has more training images than a head of a fold, the upper end is that
    of the accuracy extrapolated to them.

    Args:
        features: maps taps to float ``[num_examples, width]``.
        labels: int ``[num_examples]``.
        groups: group number of each image, int ``[num_examples]``: groups are kept together in the
            folds.
        seed: seed of the folds.
        num_train: number of training images of a run. Default: those given.
        num_held_out: number of images that its accuracy is measured on. Default: infinitely many.

    Raises:
        ValueError: if a class has fewer than two images, or groups.
    """
    folds = stratified_folds(labels, _FOLDS, seed=seed, groups=groups)
    if not folds:
        raise ValueError(
            "taps are compared by cross-validation, for which each class needs at least two "
            "training images, of two groups if they have groups; add images, or choose a tap "
            "yourself: finetune takes any"
        )
    predicted = {tap: np.empty_like(labels) for tap in features}
    nested = np.empty_like(labels)
    seconds = dict.fromkeys(features, 0.0)
    left_out: list[float] = []  # accuracies of all taps and folds
    for train, test in folds:
        others = None if groups is None else groups[train]
        inner = {}
        for tap, values in features.items():
            start = time.perf_counter()
            inner[tap], predicted[tap][test] = _fit(values, labels, train, test, others)
            seconds[tap] += time.perf_counter() - start
        left_out += inner.values()
        nested[test] = predicted[max(inner, key=inner.__getitem__)][test]
    # A run tries all penalties, and fits to the images of all folds.
    once = len(GRID) / len(_PENALTIES) / (len(folds) - 1)
    in_all = [
        _left_out_accuracy(_head(values, labels, groups), labels) for values in features.values()
    ]
    in_fold = len(labels) * (1 - 1 / len(folds))
    slope = _learning_curve(left_out, in_all, in_fold / len(labels))
    grown = (in_fold / max(num_train or 0, len(labels))) ** slope

    def score(right: np.ndarray) -> tuple[float, tuple[float, float]]:
        accuracy = float(right.mean())
        share = 1.0 if groups is None else by_group.effective_size(right, groups) / len(right)
        variance = (1 + len(folds) / (len(folds) - 1)) / len(right)
        size = share / (variance + (1 / num_held_out if num_held_out else 0))
        low, _ = by_group.wilson_interval(accuracy, size)
        _, high = by_group.wilson_interval(1 - grown * (1 - accuracy), size)
        return accuracy, (low, high)

    scores = [
        TapScore(tap, values.shape[1], *score(predicted[tap] == labels), fit_s=once * seconds[tap])
        for tap, values in features.items()
    ]
    best = max(scores, key=lambda score: score.accuracy)  # of equal ones the first
    return TapChoice(scores, best, *score(nested == labels), len(labels))


def _fit(
    values: np.ndarray,
    labels: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    groups: np.ndarray | None,
) -> tuple[float, np.ndarray]:
    """The leave-one-out accuracy of a head on the training images of a fold, and its predictions
    for the others, int ``[len(test)]``."""
    head = _head(values[train], labels[train], groups)
    predicted = head.logits(values[test]).argmax(-1)
    return _left_out_accuracy(head, labels[train]), predicted


def _head(values: np.ndarray, labels: np.ndarray, groups: np.ndarray | None) -> Solution:
    num_classes = int(labels.max()) + 1
    return fit_ridge(values, labels, num_classes, groups=groups, penalties=_PENALTIES)


def _left_out_accuracy(head: Solution, labels: np.ndarray) -> float:
    if (left_out := head.left_out(labels)) is None:
        return 0.0
    logits, labels = left_out
    return float((logits.argmax(-1) == labels).mean())


def _learning_curve(fewer: Sequence[float], more: Sequence[float], share: float) -> float:
    """The exponent of the power law by which the error falls with the number of images, 0 to 1.

    Args:
        fewer: accuracies of heads on ``share`` of the images.
        more: accuracies of heads on all of them.
        share: 0 to 1.
    """
    errors = [1 - float(np.mean(accuracies)) for accuracies in (fewer, more)]
    if min(errors) <= 0:
        return 0.0
    return float(np.clip(math.log(errors[1] / errors[0]) / math.log(share), 0, 1))


def drawn(train: Split, most: int, seed: int) -> Split:
    """About this number of the images.

    Whole batches if they have enough images of each class, since a run computes batches as a whole,
    and finds only whole ones in the cache; else images that are drawn by class, of rare classes a
    few more, without which there would be no cross-validation.
    """
    if len(train) <= most:
        return train
    batches = np.arange(len(train)) // EXTRACTION_BATCH
    chosen = np.linspace(0, batches[-1], max(1, most // EXTRACTION_BATCH)).astype(int)
    keep = np.isin(batches, chosen)
    available = np.bincount(train.labels)
    counts = np.bincount(train.labels[keep], minlength=len(available))
    if counts[available > 0].min() < _FOLDS:
        order = np.random.default_rng(seed).permutation(len(train))
        order = order[np.argsort(train.labels[order], kind="stable")]
        keep = np.zeros(len(train), bool)
        keep[order[np.linspace(0, len(train) - 1, most).astype(int)]] = True
        drawn = np.bincount(train.labels[keep], minlength=len(available))
        wanted = max(2, min(_FOLDS, most // np.count_nonzero(available)))
        for label in np.flatnonzero(drawn < np.minimum(available, wanted)):
            keep[order[train.labels[order] == label][:wanted]] = True
    return train.where(keep)
