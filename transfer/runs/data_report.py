"""All checks of a dataset in one call: the findings of ``vgg-transfer check-data``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from transfer.activations.extraction import EXTRACTION_BATCH, Compiled, stream
from transfer.activations.fingerprints import remembered
from transfer.core.npy_files import FileRows
from transfer.data import data_checks
from transfer.data.dataset import Source, Split
from transfer.data.label_errors import find_label_errors
from transfer.layers.backbone import Backbone
from transfer.models.meta_graph import MetaGraph
from transfer.runs import run_data


@dataclass(frozen=True)
class LabelToReview:
    """An image whose label is probably wrong.

    ``probability`` is that of its ``label`` being right, ``its_probability`` that of the most
    probable other class, ``looks_like``.
    """

    image: str
    label: str
    probability: float
    looks_like: str
    its_probability: float


@dataclass(frozen=True)
class LabelReport:
    """The labels to review, those most probably wrong first, at most 2 % of all, or 10.

    ``num_judged`` labels were compared with the predictions from other images, of which about
    ``num_expected`` are wrong; the classes in ``not_judged`` have too few images.
    """

    to_review: list[LabelToReview]
    num_expected: float
    num_judged: int
    not_judged: list[str]


@dataclass(frozen=True)
class GroupReport:
    """The groups of images, such as patients; ``in_both_splits`` has the first held-out image of
    each group that has images in both splits."""

    num_train: int
    num_held_out: int
    in_both_splits: list[str]


@dataclass(frozen=True)
class DataReport:
    """Findings about a dataset; images are given by their names.

    ``classes`` maps each class to its numbers of training and held-out images, and ``balance`` are
    warnings about them. ``in_both_splits``, ``duplicates`` and ``other_label`` are groups of
    near-duplicates: across the two splits, within one, and with different labels. ``labels`` is
    ``None`` if labels were not checked, ``groups`` if there are none.
    """

    dataset: str
    num_train: int
    num_held_out: int
    classes: dict[str, tuple[int, int]]
    balance: list[str]
    unreadable: list[str]
    in_both_splits: list[list[str]]
    duplicates: list[list[str]]
    other_label: list[list[str]]
    labels: LabelReport | None
    groups: GroupReport | None

    @property
    def is_sound(self) -> bool:
        """Whether no image is unreadable, and no image or group in both splits."""
        shared_groups = [] if self.groups is None else self.groups.in_both_splits
        return not (self.unreadable or self.in_both_splits or shared_groups)


def check_data(
    source: Source,
    train_split: str = "auto",
    eval_split: str = "auto",
    *,
    graph: MetaGraph | None = None,
    preprocess: str | None = None,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
) -> DataReport:
    """Search a dataset for unreadable images, duplicates, rare classes and wrong labels.

    Decodes each image once; the fingerprints are kept in the user's cache folder.

    Args:
        source: the dataset, see ``open_source``.
        train_split: a split expression, or ``auto`` as in ``fine_tune``.
        eval_split: the same for the held-out images.
        graph: model whose features tell wrong labels, at the tap of its card; ``None`` does not
            check labels.
        preprocess: preprocessing that its weights expect. Default: that of the card.
        progress: wraps the images, with the description ``images``, and batches, ``features``.

    Raises:
        ValueError: if a split is unknown or empty.

    Example:
        >>> from transfer import open_source
        >>> from transfer.runs.data_report import check_data
        >>> report = check_data(open_source("digits"))
        >>> report.num_train, report.unreadable
        (1438, [])
    """

    def images(items: Iterable[Any]) -> Iterable[Any]:
        return progress(items, "images")

    with remembered(source):
        train, held_out = run_data.splits(source, train_split, eval_split, progress=images)
        # One split, so that each image is decoded once.
        both = Split(source, train.parts + held_out.parts)
        scan = data_checks.scan(both, images)
    in_train = np.arange(len(both)) < len(train)
    groups = data_checks.duplicates(scan)
    is_leak = [0 < in_train[group].sum() < len(group) for group in groups]

    def named(chosen: Iterable[list[int]]) -> list[list[str]]:
        return [[both.names[index] for index in group] for group in chosen]

    counts = [
        np.bincount(split.labels, minlength=len(source.class_names)).tolist()
        for split in (train, held_out)
    ]
    labels = None
    if graph is not None:
        readable = both.where(~scan.unreadable)
        labels = _check_labels(readable, graph, preprocess, lambda x: progress(x, "features"))
    return DataReport(
        dataset=source.name,
        num_train=len(train),
        num_held_out=len(held_out),
        classes={
            name: (in_train, in_held_out)
            for name, in_train, in_held_out in zip(source.class_names, *counts, strict=True)
        },
        balance=data_checks.describe_balance(source.class_names, train.labels, held_out.labels),
        unreadable=[both.names[index] for index in np.flatnonzero(scan.unreadable).tolist()],
        in_both_splits=named(g for g, leak in zip(groups, is_leak, strict=True) if leak),
        duplicates=named(g for g, leak in zip(groups, is_leak, strict=True) if not leak),
        other_label=named(g for g in groups if len(np.unique(both.labels[g])) > 1),
        labels=labels,
        groups=_group_report(train, held_out),
    )


def _group_report(train: Split, held_out: Split) -> GroupReport | None:
    if train.groups is None or held_out.groups is None:
        return None
    numbers, first = np.unique(held_out.groups, return_index=True)
    shared = np.sort(first[np.isin(numbers, train.groups)])
    return GroupReport(
        len(np.unique(train.groups)), len(numbers), [held_out.names[at] for at in shared.tolist()]
    )


def _check_labels(
    readable: Split,
    graph: MetaGraph,
    mode: str | None,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> LabelReport:
    class_names = readable.source.class_names
    independent = readable.labels
    if readable.groups is not None:  # a label for each of its groups
        independent = np.unique(np.stack([readable.labels, readable.groups]), axis=1)[0]
    counts = np.bincount(independent, minlength=len(class_names))
    split = readable.where(counts[readable.labels] > 1)
    not_judged = [name for name, n in zip(class_names, counts, strict=True) if n < 2]
    if (counts > 1).sum() < 2:
        return LabelReport([], 0.0, 0, not_judged)
    backbone = Backbone(graph)
    preprocess = graph.preprocess(backbone.network.input, mode)
    batches = progress(split.batches(preprocess, EXTRACTION_BATCH))
    width = backbone.compute_output_spec(keras.KerasTensor((1, *preprocess.shape))).shape[-1]
    with FileRows(width) as features:  # in memory, those of a million images may take 16 GB
        for values, _ in stream(Compiled(backbone), batches):
            features.append(values)
        errors = find_label_errors(features, split.labels, split.groups)
    to_review = [
        LabelToReview(
            image=split.names[position],
            label=class_names[split.labels[position]],
            probability=float(probability),
            looks_like=class_names[other],
            its_probability=float(its),
        )
        for position, probability, other, its in zip(
            errors.positions,
            errors.probabilities,
            errors.suggestions,
            errors.suggestion_probabilities,
            strict=True,
        )
    ]
    return LabelReport(to_review, errors.num_expected, len(split), not_judged)
