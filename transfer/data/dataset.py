"""Labelled images from tfds datasets, prepared tfds directories and image folders, with one API.

Data contract: a ``Source`` has the class names and the splits. A ``Split`` is a selection of its
examples in a fixed order, with the labels in memory and the images still encoded (JPEG, PNG, ...).
``Split.batches`` decodes and preprocesses them: float32 ``[batch, size, size, channels]`` and int64
``[batch]`` labels.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf

from transfer.core.distribution import NO_LABEL, shards_of_batches
from transfer.data.fingerprints import FINGERPRINT, Fingerprints, fingerprints
from transfer.data.near_duplicates import near_duplicates
from transfer.data.tfds import tfds
from transfer.images.augment import random_view
from transfer.images.decoding import decode, read_image, reason
from transfer.images.image_files import PassedOver
from transfer.images.preprocess import Preprocess

logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.2  # fraction held out of a dataset that has a training split only
TRAIN_SPLITS = ("train", "training")
EVAL_SPLITS = ("validation", "val", "valid", "dev", "test", "testing")
_READERS = 4  # threads; decoding releases the GIL
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
            order, to these examples: ``{"image": encoded bytes, "label": int64, "name": bytes}``.
            Reads no other images.
        labels: maps the name of a split to its labels, int64, in the fixed order.
        names: maps the name of a split to the names of its examples, in the fixed order, without
            reading images.
        ids: maps the name of a split to unique ids of its examples, bytes ``[16]`` each, in the
            fixed order. The id changes if the image changes; it is the cache key of everything
            computed from an image.
        passed_over: the files of a folder that are not among the examples.
        origin: the arguments of ``open_source`` that open the source again.
        refused: maps names of examples that must not be read (pipes, devices) to the reasons; their
            bytes are empty, which makes them unreadable images.
        fingerprints: maps ids to ``fingerprints.FINGERPRINT``, for images decoded so far.
        unreadable: maps names of the images that ``Split.readable`` left out to the reasons.

    Raises:
        ValueError: if there are fewer than two classes.
    """

    name: str
    class_names: list[str]
    sizes: Mapping[str, int]
    examples: Callable[[str, np.ndarray], tf.data.Dataset]
    labels: Callable[[str], np.ndarray]
    names: Callable[[str], list[str]]
    ids: Callable[[str], list[bytes]]
    passed_over: PassedOver = field(default_factory=PassedOver)
    origin: Mapping[str, str | None] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Fingerprints = field(default_factory=Fingerprints, repr=False)
    unreadable: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.class_names) < 2:
            raise ValueError(
                f"dataset {self.name!r} has {len(self.class_names)} class {self.class_names}; "
                "a classifier needs at least 2"
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
        _check_overlap(self.name, expression, parts)
        split = Split(
            self,
            tuple(
                (part.splitname, np.arange(self.sizes[part.splitname])[part.from_ : part.to])
                for part in parts
            ),
        )
        if not len(split):
            raise ValueError(f"split {expression!r} of {self.name!r} has no images")
        _check_labels(split)
        return split

    def train_and_eval_splits(
        self, train_split: str = _AUTO, eval_split: str = _AUTO, *, skip_unreadable: int = 0
    ) -> tuple[Split, Split]:
        """Training and held-out images, see ``train_and_eval_splits``."""
        return train_and_eval_splits(self, train_split, eval_split, skip_unreadable=skip_unreadable)


@dataclass(frozen=True)
class Split:
    """A selection of examples of a source, in a fixed order.

    ``parts`` are pairs of a split name and sorted positions in this split.
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
    def names(self) -> list[str]:
        """One name per example: its file, or ``split/index``."""
        by_part = {part: self.source.names(part) for part, _ in self.parts}
        return [by_part[part][index] for part, indices in self.parts for index in indices]

    @functools.cached_property
    def ids(self) -> list[bytes]:
        """16 bytes per example; see ``Source``."""
        by_part = {part: self.source.ids(part) for part, _ in self.parts}
        return [by_part[part][index] for part, indices in self.parts for index in indices]

    def fingerprints(self, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> np.ndarray:
        """Fingerprints of the images, ``fingerprints.FINGERPRINT`` ``[len(self)]``. Decodes the
        images whose fingerprints are not yet in ``source.fingerprints``."""
        known = self.source.fingerprints
        if known.load is not None:
            known.load([id_ for id_ in self.ids if id_ not in known])
        rest = self.where(np.array([id_ not in known for id_ in self.ids], bool))
        ids = rest.ids
        if len(rest):
            fingerprints(rest, progress, lambda at, new: known.add([ids[i] for i in at], new))
        return np.array([known[id_] for id_ in self.ids], FINGERPRINT)

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

    def readable(
        self, limit: int, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
    ) -> Split:
        """The examples whose images can be decoded; decodes all images once. The others are added
        to ``source.unreadable``.

        Raises:
            UnreadableImageError: if the source has more than ``limit`` unreadable images.
            ValueError: if no examples are left.
        """
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
        taken = {(name, index) for name, indices in other.parts for index in indices.tolist()}
        keep = [
            (name, index) not in taken for name, indices in self.parts for index in indices.tolist()
        ]
        return self.where(np.array(keep, bool))

    def encoded(self) -> tf.data.Dataset:
        """``{"image": encoded bytes, "label": int64, "name": bytes}`` in order."""
        return self.examples(np.arange(len(self)))

    def examples(self, positions: np.ndarray) -> tf.data.Dataset:
        """The examples at the given positions, int64 ``[n]`` in any order; reads no others."""
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
        view_seed: int | None = None,
        first_batch: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> Batches:
        """Decoded, preprocessed batches of all examples; the last batch may be smaller.

        Args:
            preprocess: applied to every image.
            batch_size: images per batch.
            shuffle_seed: seed of the order; ``None`` keeps the order of the split.
            view_seed: seed of the random view (shift, flip) of each image, independent of the
                order; ``None`` does not augment.
            first_batch: number of the first batch, from 0; images of earlier batches are not read.
            shard: index and number of the processes that share each batch; this process reads only
                its shard of a batch. See ``distribution``.
        """
        return Batches(self, preprocess, batch_size, shuffle_seed, view_seed, first_batch, shard)


@dataclass(frozen=True)
class Batches:
    """Iterates over ``(images, labels)``; see ``Split.batches``."""

    split: Split
    preprocess: Preprocess
    batch_size: int
    shuffle_seed: int | None
    view_seed: int | None
    first_batch: int = 0
    shard: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        return max(0, -(-len(self.split) // self.batch_size) - self.first_batch)

    def dataset(self) -> tf.data.Dataset:
        """The batches as a ``tf.data.Dataset``; unreadable images raise TensorFlow errors."""
        examples, rows = self._examples()
        return (
            examples.map(self._to_pair, num_parallel_calls=tf.data.AUTOTUNE)
            .batch(rows)
            .apply(tf.data.experimental.assert_cardinality(len(self)))
            .prefetch(tf.data.AUTOTUNE)
        )

    def _examples(self) -> tuple[tf.data.Dataset, int]:
        """The encoded examples of this process from the first batch on, and their number per
        batch."""
        order = np.arange(len(self.split))
        if self.shuffle_seed is not None:
            order = shuffled(len(self.split), self.shuffle_seed)
        return self._of_shard(order[self.first_batch * self.batch_size :])

    def _of_shard(self, order: np.ndarray) -> tuple[tf.data.Dataset, int]:
        """The examples of this process among those at these positions, and their number per
        batch."""
        if self.shard == (0, 1):
            return self.split.examples(order), self.batch_size
        is_read, stands_in = shards_of_batches(len(order), self.batch_size, *self.shard)
        rows = int(is_read[: self.batch_size].sum())

        def labelled(example: dict[str, Any], without_label: tf.Tensor) -> dict[str, Any]:
            label = tf.where(without_label, tf.cast(NO_LABEL, tf.int64), example["label"])
            return example | {"label": label}

        stand_ins = tf.data.Dataset.from_tensor_slices(stands_in[is_read])
        mine = tf.data.Dataset.zip(self.split.examples(order[is_read]), stand_ins).map(labelled)
        return mine, max(1, rows)

    def _to_pair(self, example: dict[str, Any]) -> tuple[tf.Tensor, tf.Tensor]:
        image = decode(example["image"])
        if self.view_seed is not None:
            # Seeded by its name, so that a view does not depend on the order or the batch.
            number = tf.strings.to_hash_bucket_fast(example["name"], 2**31 - 1)
            image = random_view(image, tf.stack([tf.cast(self.view_seed, tf.int64), number]))
        return self.preprocess(image), example["label"]

    def __iter__(self) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
        """Yields batches of ``(images, labels)``.

        Raises:
            UnreadableImageError: names the images of a batch that cannot be read.
        """
        done = 0
        try:
            for pair in self.dataset():
                yield pair
                done += 1
        except tf.errors.OpError as error:
            unreadable = self._unreadable(done)
            if not unreadable:
                raise
            raise UnreadableImageError(unreadable) from error

    def _unreadable(self, number: int) -> dict[str, str]:
        """Maps the names of the unreadable images of batch ``number`` to the reasons."""
        batches = replace(self, first_batch=self.first_batch + number)
        examples, rows = batches._examples()
        examples = examples.take(rows).as_numpy_iterator()
        try:
            reasons = dict(filter(None, map(_check_readable, examples)))
            return {name: self.split.source.refused.get(name, why) for name, why in reasons.items()}
        except tf.errors.OpError as error:  # a missing file, a damaged shard
            raise ValueError(f"an image cannot be read ({reason(error)})") from error


class UnreadableImageError(ValueError):
    """Some images cannot be decoded; ``reasons`` maps their names to the reasons."""

    def __init__(self, reasons: Mapping[str, str]):
        self.reasons = dict(reasons)
        shown = [f"{name!r} ({reason})" for name, reason in itertools.islice(reasons.items(), 5)]
        more = f" and {len(reasons) - 5} more" if len(reasons) > 5 else ""
        images = "1 image" if len(reasons) == 1 else f"{len(reasons)} images"
        super().__init__(
            f"{images} cannot be decoded: {', '.join(shown)}{more}; repair or remove them"
        )


def shuffled(num_examples: int, seed: int) -> np.ndarray:
    """A random permutation of positions, int64 ``[num_examples]``: the order of ``Split.batches``
    and of ``Activations.batches`` with this seed. As with all TensorFlow op seeds, the result also
    depends on the global seed (``tf.random.set_seed``), which a run sets."""
    positions = tf.data.Dataset.range(num_examples).shuffle(num_examples, seed=seed)
    return positions.batch(num_examples).get_single_element().numpy()


def find_unreadable(
    split: Split, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> dict[str, str]:
    """Decode every image once, on several threads; maps the names of unreadable ones to reasons."""
    examples = iter(progress(split.encoded().prefetch(_READERS).as_numpy_iterator()))
    unreadable: dict[str, str] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        while chunk := list(itertools.islice(examples, 8 * _READERS)):
            unreadable.update(filter(None, pool.map(_check_readable, chunk)))
    return {name: split.source.refused.get(name, why) for name, why in unreadable.items()}


def _check_readable(example: dict[str, Any]) -> tuple[str, str] | None:
    """Name and reason if an image cannot be decoded, else ``None``."""
    try:
        read_image(example["image"])
    except ValueError as error:
        return os.fsdecode(example["name"]), str(error)
    return None


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
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[Split, Split]:
    """Disjoint splits of training and held-out images.

    ``auto`` takes ``train`` and the first of validation and test that exists. If there is neither,
    20 % of each class is held out of the training split, deterministically, with near-duplicates on
    the same side.

    Args:
        source: the dataset.
        train_split: a split expression, or ``auto``.
        eval_split: a split expression, or ``auto``.
        skip_unreadable: leave out up to this many images that cannot be decoded, before the split;
            see ``Split.readable``. 0 does not check.
        max_compared: maximum number of training images for the search for near-duplicates; above
            it, the search is skipped.
        progress: wraps the images that are decoded.

    Raises:
        ValueError: if a split is unknown or empty, or the two overlap.
        UnreadableImageError: if more than ``skip_unreadable`` images are unreadable.
    """
    train = training_split(source, train_split)
    if skip_unreadable:
        train = train.readable(skip_unreadable, progress)
    if is_automatic(source, eval_split):
        evaluation = _held_out(train, max_compared, progress)
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
    train: Split, max_compared: int, progress: Callable[[Iterable[Any]], Iterable[Any]]
) -> Split:
    groups: list[list[int]] = []
    if len(train) <= max_compared:
        groups = near_duplicates(train.fingerprints(progress))
    held_out = stratified_holdout(train.labels, train.names, HELD_OUT_SHARE, groups)
    if not held_out.any():  # all images of each class are near-duplicates
        held_out = stratified_holdout(train.labels, train.names, HELD_OUT_SHARE)
    if not held_out.any():
        raise ValueError(
            f"{train.source.name!r} has too few images to hold some out for evaluation: "
            f"{len(train)} in {len(train.source.class_names)} classes"
        )
    return train.where(held_out)


def whole_eval_split(source: Source) -> Split:
    """The split to evaluate a finished classifier on: validation, test, or else training."""
    return source.split(_first(source, EVAL_SPLITS + TRAIN_SPLITS))


def stratified_holdout(
    labels: np.ndarray, names: Sequence[str], share: float, groups: Sequence[Sequence[int]] = ()
) -> np.ndarray:
    """Stratified hold-out: boolean ``[len(labels)]``, true for the held-out part of each class.

    Examples are chosen by a hash of their names, so that adding or removing a few images changes
    little. At least one example of each class with two or more is held out, and none of a class
    with only one.

    Args:
        labels: int ``[num_examples]``.
        names: one per example.
        share: fraction of each class to hold out, 0 to 1.
        groups: groups of positions to keep on one side, such as near-duplicates, whatever their
            classes. A group is ordered by the hash of its first name, and stays in the training
            part if it is larger than the number still to be held out. No image is held out of a
            class that is a single group.
    """
    digests = [hashlib.sha256(os.fsencode(name)).hexdigest() for name in names]
    grouped = {min(group, key=names.__getitem__): [*group] for group in groups}
    others = {position for group in groups for position in group} - grouped.keys()
    firsts = sorted({*range(len(names))} - others, key=digests.__getitem__)
    sizes = Counter(labels.tolist())
    targets = {label: min(max(1, round(share * n)), n - 1) for label, n in sizes.items()}
    held_out = np.zeros(len(labels), bool)
    taken: Counter[int] = Counter()

    def take(members: list[int], limits: Mapping[int, int]) -> None:
        """Hold out a group if this stays within the limits of all its classes."""
        counts = Counter(labels[members].tolist())
        if all(taken[label] + n <= limits[label] for label, n in counts.items()):
            held_out[members] = True
            taken.update(counts)

    for first, label in zip(firsts, labels[firsts].tolist(), strict=True):
        if first in grouped:
            take(grouped[first], targets)
        elif taken[label] < targets[label]:
            held_out[first] = True
            taken[label] += 1
    # If all groups of a class exceed its target, hold out the smallest one.
    maxima = {label: n - 1 for label, n in sizes.items()}
    smallest_first = sorted((grouped[first] for first in firsts if first in grouped), key=len)
    for label in sorted(sizes):
        for members in smallest_first if targets[label] else ():
            if not taken[label] and label in labels[members]:
                take(members, maxima)
    return held_out


def few_shot(split: Split, shots_per_class: int, seed: int) -> Split:
    """A random subset with ``shots_per_class`` examples of each class.

    Raises:
        ValueError: if a class has fewer examples, or ``shots_per_class`` is less than 1.
    """
    if shots_per_class < 1:
        raise ValueError(f"shots per class must be at least 1, got {shots_per_class}")
    generator = np.random.default_rng(seed)
    keep = np.zeros(len(split), bool)
    for label, name in enumerate(split.source.class_names):
        members = np.flatnonzero(split.labels == label)
        if len(members) < shots_per_class:
            raise ValueError(
                f"class {name!r} has {len(members)} training images; "
                f"{shots_per_class} per class were asked for"
            )
        keep[generator.choice(members, shots_per_class, replace=False)] = True
    return split.where(keep)


def _first(source: Source, candidates: tuple[str, ...]) -> str:
    for name in candidates:
        if name in source.split_names:
            return name
    raise ValueError(
        f"{source.name!r} has no split named {' or '.join(candidates)} but {source.split_names}; "
        "say which one to use"
    )


def _check_overlap(name: str, expression: str, parts: Sequence[Any]) -> None:
    """Refuse split expressions that select an image twice."""
    ranges = sorted((part.splitname, part.from_ or 0, part.to) for part in parts)
    for (first, _, end), (second, start, _) in itertools.pairwise(ranges):
        if first == second and (end is None or start < end):
            raise ValueError(
                f"split {expression!r} of {name!r} has images of {first!r} twice; choose parts "
                "that do not overlap"
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
