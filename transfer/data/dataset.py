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
from transfer.data.near_duplicates import FINGERPRINT, fingerprints, near_duplicates
from transfer.data.tfds import tfds
from transfer.images.augment import random_view
from transfer.images.decoding import decode, read_image, reason
from transfer.images.image_files import PassedOver
from transfer.images.preprocess import Preprocess

logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.2  # of a dataset that comes with nothing but a training split
TRAIN_SPLITS = ("train", "training")
EVAL_SPLITS = ("validation", "val", "valid", "dev", "test", "testing")
_READERS = 4  # threads; decoding lets go of Python's lock
MAX_COMPARED = 10_000
"""Images up to which the automatic hold-out looks for near-duplicates: it decodes all of them."""
_AUTO = "auto"


@dataclass(frozen=True)
class Source:
    """One dataset.

    Args:
        name: for people.
        class_names: in the order of the labels.
        sizes: split's name to the number of its examples.
        examples: split's name and positions in its fixed order, int64 ``[n]`` in any order, to
            these examples: ``{"image": encoded bytes, "label": int64, "name": bytes}``. Reads no
            other image.
        labels: split's name to int64, one per example, in that order.
        names: split's name to the names of its examples, in that order, without reading an image.
        ids: split's name to what tells its examples from all others, bytes ``[16]`` each, in that
            order: another id where an image has changed. What is computed of an image is kept
            under it.
        passed_over: the files of a folder that are not among the examples.
        origin: the arguments of ``open_source`` that open it again.
        refused: names of examples that must not be read (pipes, devices), with the reasons; their
            bytes are empty, which makes them unreadable images.
        fingerprints: id to ``near_duplicates.FINGERPRINT``, of the images that were looked at.
        unreadable: name to the reason, of the images that ``Split.readable`` left out.

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
    fingerprints: dict[bytes, np.ndarray] = field(default_factory=dict, repr=False)
    unreadable: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.class_names) < 2:
            raise ValueError(
                f"dataset {self.name!r} has {len(self.class_names)} class {self.class_names}; "
                "a classifier needs at least 2"
            )

    @property
    def split_names(self) -> list[str]:
        """Names of the splits that the source comes with."""
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
        self, train_split: str = _AUTO, eval_split: str = _AUTO, *, skip_unreadable: int = 0
    ) -> tuple[Split, Split]:
        """Training and held-out images, see ``train_and_eval_splits``."""
        return train_and_eval_splits(self, train_split, eval_split, skip_unreadable=skip_unreadable)


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

    def fingerprints(self, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> np.ndarray:
        """``near_duplicates.FINGERPRINT`` ``[len(self)]``; reads and decodes the images whose
        fingerprints the source does not have yet."""
        known = self.source.fingerprints
        rest = self.where(np.array([id_ not in known for id_ in self.ids], bool))
        if len(rest):
            known.update(zip(rest.ids, fingerprints(rest, progress), strict=True))
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
        """The examples whose images can be decoded; all are decoded once. The others are listed in
        ``source.unreadable``.

        Raises:
            UnreadableImageError: if the source has more than ``limit`` of them.
            ValueError: if none is left.
        """
        found, unreadable = find_unreadable(self, progress), self.source.unreadable
        unreadable |= found
        if len(unreadable) > limit:
            raise UnreadableImageError(unreadable)
        for name, why in found.items():
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
        """The same at positions in the split, int64 ``[n]``, in any order; reads no others."""
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
        piece: tuple[int, int] = (0, 1),
    ) -> Batches:
        """Decoded, preprocessed batches; the last one may be smaller, none is left out.

        Args:
            preprocess: applied to every image.
            batch_size: images per batch.
            shuffle_seed: gives the order; ``None`` keeps the split's.
            view_seed: gives a random view (shift, flip) of each image, the same in any order;
                ``None`` shows the images as they are.
            first_batch: where to begin, from 0; images of earlier batches are not read.
            piece: number and count of the processes that share each batch; this one gets, and
                reads, its piece. See ``distribution``.
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
        examples, rows = self._examples()
        return (
            examples.map(self._to_pair, num_parallel_calls=tf.data.AUTOTUNE)
            .batch(rows)
            .apply(tf.data.experimental.assert_cardinality(len(self)))
            .prefetch(tf.data.AUTOTUNE)
        )

    def _examples(self) -> tuple[tf.data.Dataset, int]:
        """The examples of this process from the first batch on, still encoded, and how many a
        batch has of them."""
        order = np.arange(len(self.split))
        if self.shuffle_seed is not None:
            order = shuffled(len(self.split), self.shuffle_seed)
        return self._of_piece(order[self.first_batch * self.batch_size :])

    def _of_piece(self, order: np.ndarray) -> tuple[tf.data.Dataset, int]:
        """Of the examples at these positions, those of this process, and how many of them a batch
        has."""
        if self.piece == (0, 1):
            return self.split.examples(order), self.batch_size
        is_read, stands_in = shards_of_batches(len(order), self.batch_size, *self.piece)
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
            # By its name, so that neither the order nor the company of an image matters.
            number = tf.strings.to_hash_bucket_fast(example["name"], 2**31 - 1)
            image = random_view(image, tf.stack([tf.cast(self.view_seed, tf.int64), number]))
        return self.preprocess(image), example["label"]

    def __iter__(self) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
        """Raises:
        UnreadableImageError: names the images of a batch that cannot be read."""
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
        """The images of a batch, by its number, that cannot be read, with the reasons."""
        batches = replace(self, first_batch=self.first_batch + number)
        examples, rows = batches._examples()
        examples = examples.take(rows).as_numpy_iterator()
        try:
            found = dict(filter(None, map(_look, examples)))
            return {name: self.split.source.refused.get(name, why) for name, why in found.items()}
        except tf.errors.OpError as error:  # a file is gone, a shard is damaged
            raise ValueError(f"an image cannot be read ({reason(error)})") from error


class UnreadableImageError(ValueError):
    """Images that cannot be decoded: ``reasons`` by name."""

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
    and of ``Activations.batches`` with this seed. As with all of TensorFlow's seeds, the global one
    (``tf.random.set_seed``) has a part in it; a run sets that to its own."""
    positions = tf.data.Dataset.range(num_examples).shuffle(num_examples, seed=seed)
    return positions.batch(num_examples).get_single_element().numpy()


def find_unreadable(
    split: Split, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> dict[str, str]:
    """Decode every image once, on several threads: those that cannot be read, with the reasons."""
    examples = iter(progress(split.encoded().prefetch(_READERS).as_numpy_iterator()))
    unreadable: dict[str, str] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        while chunk := list(itertools.islice(examples, 8 * _READERS)):
            unreadable.update(filter(None, pool.map(_look, chunk)))
    return {name: split.source.refused.get(name, why) for name, why in unreadable.items()}


def _look(example: dict[str, Any]) -> tuple[str, str] | None:
    """The name of an image that cannot be read, and the reason."""
    try:
        read_image(example["image"])
    except ValueError as error:
        return os.fsdecode(example["name"]), str(error)
    return None


def training_split(source: Source, train_split: str = _AUTO) -> Split:
    """The split to take training images from; held-out images are still in it.

    Raises:
        ValueError: if it is unknown or empty.
    """
    return source.split(_first(source, TRAIN_SPLITS) if train_split == _AUTO else train_split)


def is_automatic(source: Source, eval_split: str = _AUTO) -> bool:
    """Whether images to evaluate on are held out of the training split."""
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
    """The two splits to train and to evaluate on, which never share an image.

    ``auto`` takes ``train`` and the first of validation and test that exists. Where neither does,
    20 % of each class is held out of the training split, always the same images, with
    near-duplicates on the same side.

    Args:
        source: where the images are.
        train_split: a split expression, or ``auto``.
        eval_split: likewise.
        skip_unreadable: leave out up to so many images that cannot be decoded, before any are held
            out; see ``Split.readable``. 0 decodes none here.
        max_compared: near-duplicates are looked for among at most this many training images.
        progress: wraps the images that are decoded.

    Raises:
        ValueError: if a split is unknown or empty, or the two overlap.
        UnreadableImageError: if there are more unreadable images than may be left out.
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
    if not held_out.any():  # every class is one picture
        held_out = stratified_holdout(train.labels, train.names, HELD_OUT_SHARE)
    if not held_out.any():
        raise ValueError(
            f"{train.source.name!r} has too few images to hold some out for evaluation: "
            f"{len(train)} in {len(train.source.class_names)} classes"
        )
    return train.where(held_out)


def whole_eval_split(source: Source) -> Split:
    """What to evaluate a finished classifier on: validation or test, else all there is."""
    return source.split(_first(source, EVAL_SPLITS + TRAIN_SPLITS))


def stratified_holdout(
    labels: np.ndarray, names: Sequence[str], share: float, groups: Sequence[Sequence[int]] = ()
) -> np.ndarray:
    """Boolean ``[len(labels)]``: true for ``share`` of each class.

    Which ones follows from a hash of their names, so that a few images more or less change little.
    At least one example of each class that has two or more, none of a class that has only one.

    Args:
        labels: int ``[num_examples]``.
        names: one per example.
        share: of each class, 0 to 1.
        groups: positions that stay on one side, such as near-duplicates, whatever their classes. A
            group goes by the hash of its first name, and is trained on where it is too large for
            what is held out. A class that is a single group has nothing held out.
    """
    digests = [hashlib.sha256(os.fsencode(name)).hexdigest() for name in names]
    grouped = {min(group, key=names.__getitem__): [*group] for group in groups}
    others = {position for group in groups for position in group} - grouped.keys()
    firsts = sorted({*range(len(names))} - others, key=digests.__getitem__)
    sizes = Counter(labels.tolist())
    wanted = {label: min(max(1, round(share * n)), n - 1) for label, n in sizes.items()}
    held_out = np.zeros(len(labels), bool)
    taken: Counter[int] = Counter()

    def take(members: list[int], limits: Mapping[int, int]) -> None:
        """Hold a group out, if it fits the limits of all its classes."""
        counts = Counter(labels[members].tolist())
        if all(taken[label] + n <= limits[label] for label, n in counts.items()):
            held_out[members] = True
            taken.update(counts)

    for first, label in zip(firsts, labels[firsts].tolist(), strict=True):
        if first in grouped:
            take(grouped[first], wanted)
        elif taken[label] < wanted[label]:
            held_out[first] = True
            taken[label] += 1
    # Where all groups of a class are larger than what is wanted, the smallest one.
    most = {label: n - 1 for label, n in sizes.items()}
    smallest_first = sorted((grouped[first] for first in firsts if first in grouped), key=len)
    for label in sorted(sizes):
        for members in smallest_first if wanted[label] else ():
            if not taken[label] and label in labels[members]:
                take(members, most)
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
