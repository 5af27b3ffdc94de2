"""Labelled images from tfds datasets, prepared tfds directories and image folders, with one API.

Data contract: a ``Source`` has the class names and the splits. A ``Split`` is a selection of its
examples in a fixed order, with the labels in memory and the images still encoded (JPEG, PNG, ...).
``Split.batches`` decodes and preprocesses them: float32 ``[batch, size, size, channels]`` and int64
``[batch]`` labels.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf

from transfer.data.batches import Batches, Chained
from transfer.data.fingerprints import FINGERPRINT, Fingerprints
from transfer.data.groups import connected
from transfer.data.holdout import stratified_holdout
from transfer.data.names import Names
from transfer.data.near_duplicates import near_duplicates
from transfer.data.pipeline import without_autotuning
from transfer.data.tfds import tfds
from transfer.data.unreadable import UnreadableImageError, find_unreadable
from transfer.images.image_files import PassedOver
from transfer.images.preprocess import Preprocess

logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.2  # fraction held out of a dataset that has a training split only
TRAIN_SPLITS = ("train", "training")
EVAL_SPLITS = ("validation", "val", "valid", "dev", "test", "testing")
MAX_COMPARED = 10_000
"""Maximum number of images among which near-duplicates are searched, which decodes all of them."""
_AUTO = "auto"


@dataclass(frozen=True)
class Source:
    """A dataset of labelled images.

    Args:
        name: display name.
        class_names: names in the order of the labels.
        sizes: maps the name of a split to its number of examples.
        examples: maps the name of a split and positions in its fixed order, int64 ``[n]`` in any
            order, to these examples: ``{"image": encoded bytes, "label": int64, "name": bytes}``,
            in a source that joins others also ``own_name``, the name in its own source. Reads no
            other images.
        labels: maps the name of a split to its labels, int64, in the fixed order.
        names: maps the name of a split to the names of its examples, in the fixed order, without
            reading images.
        ids: maps the name of a split to unique ids of its examples, ``S16`` ``[n]``, in the
            fixed order. The id changes if the image changes; it is the cache key of everything
            computed from an image.
        passed_over: the files of a folder that are not among the examples.
        origin: the arguments of ``open_source`` that open the source again.
        refused: maps names of examples that must not be read (pipes, devices) to the reasons; their
            bytes are empty, which makes them unreadable images.
        groups: maps the name of a split to the group number of each example, int64, in the fixed
            order; images of a group, such as all of a patient, stay on one side of a hold-out.
            ``None`` if there are no groups.
        fingerprints: those of images decoded so far.
        unreadable: maps names of the images that ``Split.readable`` left out to the reasons.
        members: for a source that joins others, maps the name of a split to the splits of these
            that it consists of, in order; see ``transfer.data.joined``.
    """

    name: str
    class_names: list[str]
    sizes: Mapping[str, int]
    examples: Callable[[str, np.ndarray], tf.data.Dataset]
    labels: Callable[[str], np.ndarray]
    names: Callable[[str], Sequence[str]]
    ids: Callable[[str], np.ndarray]
    passed_over: PassedOver = field(default_factory=PassedOver)
    origin: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    groups: Callable[[str], np.ndarray] | None = None
    fingerprints: Fingerprints = field(default_factory=Fingerprints, repr=False)
    unreadable: dict[str, str] = field(default_factory=dict, repr=False)
    members: Mapping[str, Sequence[Split]] = field(default_factory=dict, repr=False)

    def check_classes(self, minimum: int = 2) -> None:
        """Check the number of classes, and their names.

        Raises:
            ValueError: if there are fewer than ``minimum``, or a name is not UTF-8 text.
        """
        if wrong := [name for name in self.class_names if re.search("[\ud800-\udfff]", name)]:
            raise ValueError(
                f"dataset {self.name!r} has class names that are not UTF-8 text: "
                f"{', '.join(map(repr, wrong[:5]))}{', ...' if wrong[5:] else ''}; rename their "
                "folders"
            )
        if len(self.class_names) < minimum:
            raise ValueError(
                f"dataset {self.name!r} has {len(self.class_names)} class {self.class_names}; "
                f"a classifier needs at least {minimum}"
            )

    @property
    def split_names(self) -> list[str]:
        """Names of the predefined splits."""
        return list(self.sizes)

    def split(self, expression: str) -> Split:
        """The examples of a tfds split expression, e.g. ``train``, ``train[:80%]``, ``a+b``.

        Raises:
            ValueError: if the expression or the split is unknown, selects no examples, or has a
                label outside the range of the classes.
        """
        if re.search(r"shard\s*[\]:]", expression):
            raise ValueError(
                f"cannot take split {expression!r} of {self.name!r}: shards are not known here; "
                "give images or percent, like 'train[:1000]' or 'train[:80%]'"
            )
        infos = tfds.core.SplitDict(
            [
                tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
                for name, size in self.sizes.items()
            ]
        )
        try:
            parts = tfds.core.ReadInstruction.from_spec(expression).to_absolute(infos)
        except (ValueError, KeyError, AssertionError) as error:
            raise ValueError(
                f"cannot take split {expression!r} of {self.name!r} ({_one_line(error)}); "
                f"its splits are {self.split_names}; slices are written like 'train[:80%]'"
            ) from error
        _check_overlap(self, expression, parts)
        split = Split(
            self,
            tuple(
                (part.splitname, _range(self.sizes[part.splitname], part.from_, part.to))
                for part in parts
            ),
        )
        if not len(split):
            raise ValueError(f"split {expression!r} of {self.name!r} has no images")
        _check_labels(split)
        return split

    def train_and_eval_splits(
        self,
        train_split: str = _AUTO,
        eval_split: str = _AUTO,
        *,
        skip_unreadable: int = 0,
        allow_no_eval: bool = False,
    ) -> tuple[Split, Split]:
        """Training and held-out images, see ``train_and_eval_splits``."""
        return train_and_eval_splits(
            self,
            train_split,
            eval_split,
            skip_unreadable=skip_unreadable,
            allow_no_eval=allow_no_eval,
        )


@dataclass(frozen=True)
class Split:
    """A selection of examples of a source, in a fixed order.

    ``parts`` are pairs of a split name and different positions in this split.
    """

    source: Source
    parts: tuple[tuple[str, np.ndarray], ...]

    def __len__(self) -> int:
        return sum(len(indices) for _, indices in self.parts)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int64 ``[len(self)]``."""
        return np.concatenate(
            [self.source.labels(name)[indices] for name, indices in self.parts if len(indices)]
            or [np.zeros(0, np.int64)]
        )

    @functools.cached_property
    def groups(self) -> np.ndarray | None:
        """Group numbers, int64 ``[len(self)]``; ``None`` if the source has no groups."""
        of = self.source.groups
        if of is None:
            return None
        return np.concatenate([of(name)[at] for name, at in self.parts] or [np.zeros(0, np.int64)])

    @functools.cached_property
    def names(self) -> Sequence[str]:
        """One name per example: its file, or ``split/index``."""
        parts = [_taken(self.source.names(part), indices) for part, indices in self.parts]
        return parts[0] if len(parts) == 1 else Names.of(name for part in parts for name in part)

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """``S16`` ``[len(self)]``, read once, and again by a copy (``replace``); see ``Source``."""
        parts = [self.source.ids(part)[indices] for part, indices in self.parts]
        return np.concatenate([np.zeros(0, "S16"), *parts])

    def fingerprints(self, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> np.ndarray:
        """Fingerprints of the images, ``fingerprints.FINGERPRINT`` ``[len(self)]``. Decodes the
        images whose fingerprints are not yet in ``source.fingerprints``."""
        parts = [
            part.source.fingerprints.of(part, part.ids, progress) for part in self.of_members()
        ]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, FINGERPRINT), *parts])

    def of_members(self) -> list[Split]:
        """The same examples, in the same order, as splits of the sources that the source joins,
        with the labels and names that they have there; ``[self]`` if it joins none."""
        if not self.source.members:
            return [self]
        found = []
        for name, indices in self.parts:
            start = 0
            for member in self.source.members[name]:
                keep = np.zeros(len(member), bool)
                at = indices - start
                keep[at[(at >= 0) & (at < len(member))]] = True
                start += len(member)
                if keep.any():
                    found.append(member.where(keep))
        return found

    def where(self, keep: np.ndarray) -> Split:
        """The examples at which the boolean array ``keep`` ``[len(self)]`` is true."""
        ends = np.cumsum([len(indices) for _, indices in self.parts])[:-1]
        masks = np.split(keep, ends)
        return replace(
            self,
            parts=tuple(
                (name, indices[mask])
                for (name, indices), mask in zip(self.parts, masks, strict=True)
            ),
        )

    def in_order(
        self, preprocess: Preprocess, batch_size: int, *, view_seed: int | None = None
    ) -> Chained:
        """``batches`` in the order of the split, where those of each joined source are apart: as
        if this source were computed alone, since activations depend on the batch that they are
        computed in, at float precision."""
        ends = np.cumsum([len(part) for part in self.of_members()])[:-1]
        parts = np.split(np.arange(len(self)), ends)
        splits = [self.where(np.isin(np.arange(len(self)), part)) for part in parts]
        return Chained(
            [part.batches(preprocess, batch_size, view_seed=view_seed) for part in splits]
        )

    def readable(
        self, limit: int, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
    ) -> Split:
        """The examples whose images can be decoded; decodes all images once. The others are added
        to ``source.unreadable``.

        Raises:
            UnreadableImageError: if the source has more than ``limit`` unreadable images.
            ValueError: if ``limit`` is negative, or no examples are left.
        """
        if limit < 0:
            raise ValueError(f"skip_unreadable must be at least 0, got {limit}")
        reasons, unreadable = find_unreadable(self, progress), self.source.unreadable
        unreadable |= reasons
        if len(unreadable) > limit:
            raise UnreadableImageError(unreadable)
        for name, why in reasons.items():
            logger.warning(f"{name} was left out: {why}")
        kept = self.where(np.array([name not in unreadable for name in self.names], bool))
        if not len(kept):
            raise ValueError("no image is left of a split without those that cannot be decoded")
        return kept

    def without(self, other: Split) -> Split:
        """The examples that are not in ``other``."""
        keep = [np.zeros(0, bool)]
        for name, indices in self.parts:
            taken = [positions for part, positions in other.parts if part == name]
            keep.append(~np.isin(indices, np.concatenate([np.zeros(0, np.int64), *taken])))
        return self.where(np.concatenate(keep))

    def encoded(self) -> tf.data.Dataset:
        """``{"image": encoded bytes, "label": int64, "name": bytes}`` in order."""
        return self.examples(np.arange(len(self)))

    def examples(self, positions: np.ndarray) -> tf.data.Dataset:
        """The examples at the given positions, int64 ``[n]`` in any order; reads no others."""
        return without_autotuning(self._examples(positions))

    def _examples(self, positions: np.ndarray) -> tf.data.Dataset:
        sizes = [len(indices) for _, indices in self.parts]
        part_of = np.repeat(np.arange(len(sizes)), sizes)[positions]
        indices = np.concatenate([indices for _, indices in self.parts])[positions]
        used = np.unique(part_of) if len(positions) else [0]
        datasets = [self.source.examples(self.parts[p][0], indices[part_of == p]) for p in used]
        if len(datasets) == 1:
            return datasets[0]
        choices = np.searchsorted(used, part_of)  # each part is read in its own order
        return tf.data.Dataset.choose_from_datasets(
            datasets, tf.data.Dataset.from_tensor_slices(choices), stop_on_empty_dataset=False
        )

    def batches(
        self,
        preprocess: Preprocess,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        view_seed: int | np.ndarray | None = None,
        first_batch: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> Batches:
        """Decoded, preprocessed batches of all examples; the last batch may be smaller.

        Args:
            preprocess: applied to every image.
            batch_size: images per batch.
            shuffle_seed: seed of the order; ``None`` keeps the order of the split.
            view_seed: seed of the random views (shift, flip), independent of the order, or of the
                view of each example, int64 ``[num_examples]``; ``None`` does not augment.
            first_batch: number of the first batch, from 0; images of earlier batches are not read.
            shard: index and number of the processes that share each batch; this process reads only
                its shard of a batch. See ``distribution``.
        """
        return Batches(self, preprocess, batch_size, shuffle_seed, view_seed, first_batch, shard)


def training_split(source: Source, train_split: str = _AUTO) -> Split:
    """The split to take training images from; it still includes the held-out images.

    Raises:
        ValueError: if it is unknown or empty.
    """
    return source.split(_first(source, TRAIN_SPLITS) if train_split == _AUTO else train_split)


def is_automatic(source: Source, eval_split: str = _AUTO) -> bool:
    """Whether the held-out images are taken from the training split."""
    return eval_split == _AUTO and not {*EVAL_SPLITS} & {*source.split_names}


def train_and_eval_splits(
    source: Source,
    train_split: str = _AUTO,
    eval_split: str = _AUTO,
    *,
    skip_unreadable: int = 0,
    max_compared: int = MAX_COMPARED,
    allow_no_eval: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[Split, Split]:
    """Disjoint splits of training and held-out images.

    ``auto`` takes ``train`` and the first of validation and test that exists. If there is neither,
    20 % of each class is held out of the training split, deterministically, with near-duplicates,
    and the images of a group, on the same side.

    Args:
        source: the dataset.
        train_split: a split expression, or ``auto``.
        eval_split: a split expression, or ``auto``.
        skip_unreadable: leave out up to this many images that cannot be decoded, before the split;
            see ``Split.readable``. 0 does not check.
        max_compared: maximum number of training images for the search for near-duplicates; above
            it, the search is skipped.
        allow_no_eval: hold out none of images that are too few to hold some out, instead of raising
            an error: for images that are added to those of a run.
        progress: wraps the images that are decoded.

    Raises:
        ValueError: if a split is unknown or empty, or the two overlap.
        UnreadableImageError: if more than ``skip_unreadable`` images are unreadable.
    """
    train = training_split(source, train_split)
    if skip_unreadable:
        train = train.readable(skip_unreadable, progress)
    if is_automatic(source, eval_split):
        evaluation = _held_out(train, max_compared, allow_no_eval, progress)
        return train.without(evaluation), evaluation
    evaluation = source.split(_first(source, EVAL_SPLITS) if eval_split == _AUTO else eval_split)
    if skip_unreadable:
        evaluation = evaluation.readable(skip_unreadable, progress)
    rest = train.without(evaluation)
    shared = len(train) - len(rest)
    if shared and train_split != _AUTO:
        raise ValueError(
            f"train split {train_split!r} and eval split {eval_split!r} share {shared} images; "
            "choose splits that do not overlap"
        )
    if not len(rest):
        raise ValueError(f"eval split {eval_split!r} leaves no images to train on")
    return rest, evaluation


def _held_out(
    train: Split,
    max_compared: int,
    allow_none: bool,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> Split:
    copies: list[list[int]] = []
    if len(train) <= max_compared:
        copies = near_duplicates(train.fingerprints(progress))
    held_out = _hold_out(train, copies)
    if not held_out.any() and not allow_none:  # all images of each class are near-duplicates
        held_out = _hold_out(train, [])
    if not held_out.any() and not allow_none:
        of_groups = "" if train.groups is None else f" and {len(np.unique(train.groups))} groups"
        raise ValueError(
            f"{train.source.name!r} has too few images to hold some out for evaluation: "
            f"{len(train)} in {len(train.source.class_names)} classes{of_groups}; add "
            "images, or name a split to evaluate on with eval_split"
        )
    if train.groups is not None:
        count, total = len(np.unique(train.groups[held_out])), len(np.unique(train.groups))
        images = f"{held_out.sum()} of {len(train)} images"
        logger.info(f"{count} of {total} groups are held out, with {images}")
    return train.where(held_out)


def _hold_out(train: Split, copies: list[list[int]]) -> np.ndarray:
    """Hold-out with near-duplicates, and the groups of the source, on one side."""
    if train.groups is None:
        return stratified_holdout(train.labels, train.names, HELD_OUT_SHARE, copies)
    groups = connected(train.groups, copies)
    return stratified_holdout(train.labels, train.names, HELD_OUT_SHARE, groups, nearest=True)


def whole_eval_split(source: Source) -> Split:
    """The split to evaluate a finished classifier on: validation, test, or else training."""
    return source.split(_first(source, EVAL_SPLITS + TRAIN_SPLITS))


def few_shot(split: Split, shots_per_class: int, seed: int) -> Split:
    """A random subset with ``shots_per_class`` examples of each class, whatever their groups.

    Raises:
        ValueError: if a class has fewer examples, or ``shots_per_class`` is less than 1.
    """
    if shots_per_class < 1:
        raise ValueError(f"shots per class must be at least 1, got {shots_per_class}")
    generator = np.random.default_rng(seed)
    keep = np.zeros(len(split), bool)
    by_class = np.argsort(split.labels, kind="stable")
    ends = np.searchsorted(split.labels[by_class], np.arange(len(split.source.class_names) + 1))
    for label, name in enumerate(split.source.class_names):
        members = by_class[ends[label] : ends[label + 1]]
        if len(members) < shots_per_class:
            raise ValueError(
                f"class {name!r} has {len(members)} training images; "
                f"{shots_per_class} per class were asked for"
            )
        keep[generator.choice(members, shots_per_class, replace=False)] = True
    chosen = split.where(keep)
    if split.groups is not None and chosen.groups is not None:
        logger.info(
            f"shots_per_class={shots_per_class} draws images whatever their groups: {len(chosen)} "
            f"images of {len(np.unique(chosen.groups))} of {len(np.unique(split.groups))} groups"
        )
    return chosen


def _range(size: int, start: int | None, stop: int | None) -> np.ndarray:
    return np.arange(*slice(start, stop).indices(size))


def _taken(names: Sequence[str], positions: np.ndarray) -> Names:
    return names[positions] if isinstance(names, Names) else Names.of(names[i] for i in positions)


def _first(source: Source, candidates: tuple[str, ...]) -> str:
    for name in candidates:
        if name in source.split_names:
            return name
    raise ValueError(
        f"{source.name!r} has no split named {' or '.join(candidates)} but {source.split_names}; "
        "say which one to use"
    )


def _check_overlap(source: Source, expression: str, parts: Sequence[Any]) -> None:
    """Refuse split expressions that select an image twice."""
    ranges = sorted(
        (
            part.splitname,
            part.from_ or 0,
            source.sizes[part.splitname] if part.to is None else part.to,
        )
        for part in parts
    )
    for (first, _, end), (second, start, _) in itertools.pairwise(ranges):
        if first == second and start < end:
            raise ValueError(
                f"split {expression!r} of {source.name!r} has images of {first!r} twice; choose "
                "parts that do not overlap"
            )


def _check_labels(split: Split) -> None:
    num_classes = len(split.source.class_names)
    wrong = np.flatnonzero((split.labels < 0) | (split.labels >= num_classes))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{len(wrong)} labels of {split.source.name!r} are out of range: image "
            f"{split.names[first]} has label {split.labels[first]}; expected 0 to "
            f"{num_classes - 1} (a split without labels has -1)"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
