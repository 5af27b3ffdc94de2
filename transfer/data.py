"""Labelled images from tfds datasets, prepared tfds directories and folders of images, all alike.

Data contract: a ``Source`` knows the class names and the splits. A ``Split`` is a selection of its
examples in a fixed order, with the labels in memory and the images still encoded (JPEG, PNG, ...).
``Split.batches`` decodes and preprocesses them: float32 ``[batch, size, size, channels]`` and int64
``[batch]`` labels.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from transfer.augment import random_view
from transfer.distribution import NO_LABEL, pieces_of_batches
from transfer.images import decode
from transfer.preprocess import Preprocess

HELD_OUT_SHARE = 0.2  # of a dataset that comes with nothing but a training split
TRAIN_SPLITS = ("train", "training")
EVAL_SPLITS = ("validation", "val", "valid", "dev", "test", "testing")
SHUFFLE_BUFFER = 16_384  # encoded images; up to this many, a shuffle is perfect
_AUTO = "auto"


@dataclass(frozen=True)
class Source:
    """One dataset.

    Args:
        name: for people.
        class_names: in the order of the labels.
        sizes: split's name to the number of its examples.
        read: split's name to its examples in a fixed order: ``{"image": encoded bytes, "label":
            int64, "name": str}``.
        names: split's name to the names of its examples, in that order, without reading an image.
        ids: split's name to what tells its examples from all others, bytes ``[16]`` each, in that
            order: another id where an image has changed. What is computed of an image is kept
            under it.
        origin: the arguments of ``open_source`` that open it again.

    Raises:
        ValueError: if there are fewer than two classes.
    """

    name: str
    class_names: list[str]
    sizes: Mapping[str, int]
    read: Callable[[str], tf.data.Dataset]
    names: Callable[[str], list[str]]
    ids: Callable[[str], list[bytes]]
    origin: Mapping[str, str | None] = field(default_factory=dict)
    _labels: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.class_names) < 2:
            raise ValueError(
                f"dataset {self.name!r} has {len(self.class_names)} class {self.class_names}; "
                "a classifier needs at least 2"
            )

    @property
    def split_names(self) -> list[str]:
        return list(self.sizes)

    def split(self, expression: str) -> Split:
        """The examples that a tfds split expression names: ``train``, ``train[:80%]``, ``a+b``.

        Raises:
            ValueError: if the expression or the split is unknown, selects nothing, or has a label
                that is not the number of a class.
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
        self, train_split: str = _AUTO, eval_split: str = _AUTO
    ) -> tuple[Split, Split]:
        """Training and held-out images, see ``train_and_eval_splits``."""
        return train_and_eval_splits(self, train_split, eval_split)

    def labels(self, split_name: str) -> np.ndarray:
        """int64, one per example of a split; read once."""
        if split_name not in self._labels:
            labels = self.read(split_name).map(lambda example: example["label"])
            self._labels[split_name] = np.fromiter(labels.as_numpy_iterator(), np.int64)
        return self._labels[split_name]

    def examples(self, split_name: str, indices: np.ndarray) -> tf.data.Dataset:
        """The examples of a split at sorted positions, still encoded."""
        first, last = int(indices[0]), int(indices[-1])
        wanted = np.zeros(last - first + 1, bool)
        wanted[indices - first] = True
        wanted = tf.constant(wanted)
        examples = self.read(split_name).skip(first).take(last - first + 1).enumerate()
        return examples.filter(lambda index, _: wanted[index]).map(lambda _, example: example)


@dataclass(frozen=True)
class Split:
    """Some examples of a source, in a fixed order.

    ``parts`` are pairs of a split's name and the sorted positions within it.
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
        """A name per example: its file, or ``split/index``."""
        by_part = {part: self.source.names(part) for part, _ in self.parts}
        return [by_part[part][index] for part, indices in self.parts for index in indices]

    @functools.cached_property
    def ids(self) -> list[bytes]:
        """16 bytes per example; see ``Source``."""
        by_part = {part: self.source.ids(part) for part, _ in self.parts}
        return [by_part[part][index] for part, indices in self.parts for index in indices]

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

    def without(self, other: Split) -> Split:
        """The examples that are not in ``other``."""
        taken = {(name, index) for name, indices in other.parts for index in indices.tolist()}
        keep = [
            (name, index) not in taken for name, indices in self.parts for index in indices.tolist()
        ]
        return self.where(np.array(keep, bool))

    def encoded(self) -> tf.data.Dataset:
        """``{"image": encoded bytes, "label": int64, "name": bytes}`` in order."""
        datasets = [self.source.examples(name, idx) for name, idx in self.parts if len(idx)]
        return functools.reduce(lambda first, second: first.concatenate(second), datasets)

    def batches(
        self,
        preprocess: Preprocess,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        view_seed: int | None = None,
        first_batch: int = 0,
        piece: tuple[int, int] = (0, 1),
    ) -> Batches:
        """Decoded, preprocessed batches; the last one may be smaller, none is left out.

        Args:
            preprocess: applied to every image.
            batch_size: images per batch.
            shuffle_seed: gives the order; ``None`` keeps the split's.
            view_seed: gives a random view (shift, flip) of each image, the same in any order;
                ``None`` shows the images as they are.
            first_batch: where to begin, from 0; what comes before is not decoded.
            piece: number and count of the processes that share each batch; this one gets, and
                decodes, its piece. See ``distribution``.
        """
        return Batches(self, preprocess, batch_size, shuffle_seed, view_seed, first_batch, piece)


@dataclass(frozen=True)
class Batches:
    """Iterates over ``(images, labels)``; see ``Split.batches``."""

    split: Split
    preprocess: Preprocess
    batch_size: int
    shuffle_seed: int | None
    view_seed: int | None
    first_batch: int = 0
    piece: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        return max(0, -(-len(self.split) // self.batch_size) - self.first_batch)

    def dataset(self) -> tf.data.Dataset:
        """The same as a ``tf.data.Dataset``; unreadable images raise TensorFlow's own errors."""
        examples = self.split.encoded()
        if self.shuffle_seed is not None:
            buffer = min(len(self.split), SHUFFLE_BUFFER)
            examples = examples.shuffle(buffer, seed=self.shuffle_seed)
        examples = examples.skip(self.first_batch * self.batch_size)
        examples, rows = self._of_piece(examples)
        return (
            examples.map(self._to_pair, num_parallel_calls=tf.data.AUTOTUNE)
            .batch(rows)
            .apply(tf.data.experimental.assert_cardinality(len(self)))
            .prefetch(tf.data.AUTOTUNE)
        )

    def _of_piece(self, examples: tf.data.Dataset) -> tuple[tf.data.Dataset, int]:
        """The examples of this process, and how many a batch has of them."""
        if self.piece == (0, 1):
            return examples, self.batch_size
        rest = max(0, len(self.split) - self.first_batch * self.batch_size)
        is_read, stands_in = pieces_of_batches(rest, self.batch_size, *self.piece)
        rows = int(is_read[: self.batch_size].sum())
        read, without_label = tf.constant(is_read), tf.constant(stands_in)

        def labelled(number: tf.Tensor, example: dict) -> dict:
            label = tf.where(without_label[number], tf.cast(NO_LABEL, tf.int64), example["label"])
            return example | {"label": label}

        mine = examples.enumerate().filter(lambda number, _: read[number]).map(labelled)
        return mine, max(1, rows)

    def _to_pair(self, example: dict) -> tuple[tf.Tensor, tf.Tensor]:
        image = decode(example["image"])
        if self.view_seed is not None:
            # By its name, so that neither the order nor the company of an image matters.
            number = tf.strings.to_hash_bucket_fast(example["name"], 2**31 - 1)
            image = random_view(image, tf.stack([tf.cast(self.view_seed, tf.int64), number]))
        return self.preprocess(image), example["label"]

    def __iter__(self) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
        try:
            yield from self.dataset()
        except tf.errors.InvalidArgumentError as error:
            unreadable = find_unreadable(self.split)
            if not unreadable:
                raise
            more = f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
            raise ValueError(
                f"{len(unreadable)} of {len(self.split)} images cannot be decoded: "
                f"{', '.join(unreadable[:5])}{more}; repair or remove them "
                "(expected JPEG, PNG, GIF or BMP)"
            ) from error


def shuffled(num_examples: int, seed: int) -> np.ndarray:
    """Positions in a random order, int64 ``[num_examples]``: that of ``Split.batches`` with this
    seed, for up to ``SHUFFLE_BUFFER`` images."""
    positions = tf.data.Dataset.range(num_examples).shuffle(num_examples, seed=seed)
    return positions.batch(num_examples).get_single_element().numpy()


def find_unreadable(split: Split) -> list[str]:
    """Names of the images of a split that do not decode."""
    unreadable = []
    for example in split.encoded():
        try:
            decode(example["image"])
        except tf.errors.InvalidArgumentError:
            unreadable.append(example["name"].numpy().decode())
    return unreadable


def train_and_eval_splits(
    source: Source, train_split: str = _AUTO, eval_split: str = _AUTO
) -> tuple[Split, Split]:
    """The two splits to train and to evaluate on, which never share an image.

    ``auto`` takes ``train`` and the first there is of validation and test. Where there is none, 20
    % of each class is held out of the training split, always the same images.

    Raises:
        ValueError: if a split is unknown or empty, or the two overlap.
    """
    train = source.split(_first(source, TRAIN_SPLITS) if train_split == _AUTO else train_split)
    candidates = [name for name in EVAL_SPLITS if name in source.split_names]
    if eval_split != _AUTO:
        evaluation = source.split(eval_split)
    elif candidates:
        evaluation = source.split(candidates[0])
    else:
        evaluation = train.where(stratified_holdout(train.labels, train.names, HELD_OUT_SHARE))
        if not len(evaluation):
            raise ValueError(
                f"{source.name!r} has too few images to hold some out for evaluation: "
                f"{len(train)} in {len(source.class_names)} classes"
            )
        return train.without(evaluation), evaluation
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


def whole_eval_split(source: Source) -> Split:
    """What to evaluate a finished classifier on: validation or test, else all there is."""
    return source.split(_first(source, EVAL_SPLITS + TRAIN_SPLITS))


def stratified_holdout(labels: np.ndarray, names: Sequence[str], share: float) -> np.ndarray:
    """Boolean ``[len(labels)]``: true for ``share`` of each class.

    Which ones follows from a hash of their names, so that a few images more or less change little.
    At least one example of each class that has two or more, none of a class that has only one.
    """
    digests = np.array([hashlib.sha256(name.encode()).hexdigest() for name in names])
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(digests[members])]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held_out[members[:count]] = True
    return held_out


def few_shot(split: Split, shots_per_class: int, seed: int) -> Split:
    """``shots_per_class`` examples of each class, chosen by the seed.

    Raises:
        ValueError: if a class has fewer, or none are asked for.
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
    """No image is to count twice."""
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
