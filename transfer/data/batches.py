"""Batches of decoded images in a fixed or shuffled order, from any position on."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from transfer.core import measurement
from transfer.core.distribution import NO_LABEL, shards_of_batches
from transfer.data.unreadable import UnreadableImageError, check_readable
from transfer.images.augment import random_view
from transfer.images.decoding import decode, reason
from transfer.images.preprocess import Preprocess

_MAX_AS_TF_DATA = 2**24
_READ_AHEAD = 2  # batches


class Examples(Protocol):
    """Interface of ``transfer.data.dataset.Split``."""

    @property
    def source(self) -> Any: ...

    def __len__(self) -> int: ...

    def examples(self, positions: np.ndarray) -> tf.data.Dataset: ...


@dataclass(frozen=True)
class Batches:
    """Iterates over ``(images, labels)``; see ``Split.batches``."""

    split: Examples
    preprocess: Preprocess
    batch_size: int
    shuffle_seed: int | None
    view_seed: int | np.ndarray | None
    first_batch: int = 0
    shard: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        return max(0, -(-len(self.split) // self.batch_size) - self.first_batch)

    def dataset(self) -> tf.data.Dataset:
        """The batches as a ``tf.data.Dataset``; unreadable images raise TensorFlow errors."""
        examples, rows = self._examples()
        # Converting Keras' and this project's functions would take most of the time before the
        # first batch, and they need no conversion.
        to_pair = tf.autograph.experimental.do_not_convert(self._to_pair)
        return (
            examples.map(to_pair, num_parallel_calls=measurement.num_cpus())
            .batch(rows)
            .apply(tf.data.experimental.assert_cardinality(len(self)))
            .prefetch(_READ_AHEAD)
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
            return self._read(order), self.batch_size
        is_read, stands_in = shards_of_batches(len(order), self.batch_size, *self.shard)
        rows = int(is_read[: self.batch_size].sum())

        def labelled(example: dict[str, Any], without_label: tf.Tensor) -> dict[str, Any]:
            label = tf.where(without_label, tf.cast(NO_LABEL, tf.int64), example["label"])
            return example | {"label": label}

        stand_ins = tf.data.Dataset.from_tensor_slices(stands_in[is_read])
        mine = tf.data.Dataset.zip(self._read(order[is_read]), stand_ins).map(labelled)
        return mine, max(1, rows)

    def _read(self, positions: np.ndarray) -> tf.data.Dataset:
        """The encoded examples at these positions, with the seed of their view if each has its
        own."""
        examples = self.split.examples(positions)
        if not isinstance(self.view_seed, np.ndarray):
            return examples
        seeds = tf.data.Dataset.from_tensor_slices(self.view_seed[positions])
        return tf.data.Dataset.zip(examples, seeds).map(
            lambda example, seed: example | {"view_seed": seed}
        )

    def _to_pair(self, example: dict[str, Any]) -> tuple[tf.Tensor, tf.Tensor]:
        seed = tf.zeros([2], tf.int64)
        if self.view_seed is not None:
            # Seeded by its name, so that a view does not depend on the order or the batch; of a
            # joined source, by the name in its own source, under which views are cached.
            name = example.get("own_name", example["name"])
            number = tf.strings.to_hash_bucket_fast(name, 2**31 - 1)
            seed = tf.stack([tf.cast(example.get("view_seed", self.view_seed), tf.int64), number])
        to_input = _to_input(self.preprocess, self.view_seed is not None)
        return to_input(example["image"], seed), example["label"]

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
            reasons = dict(filter(None, map(check_readable, examples)))
            return {name: self.split.source.refused.get(name, why) for name, why in reasons.items()}
        except tf.errors.OpError as error:  # a missing file, a damaged shard
            raise ValueError(f"an image cannot be read ({reason(error)})") from error


def _to_input(preprocess: Preprocess, is_view: bool) -> Callable[..., tf.Tensor]:
    """A function of an encoded image and the seed of its view that decodes and preprocesses it."""
    if type(preprocess) is Preprocess:
        return _traced(json.dumps(preprocess.settings()), is_view)
    return _untraced(preprocess, is_view)  # a subclass may compute anything


def _untraced(preprocess: Preprocess, is_view: bool) -> Callable[..., tf.Tensor]:
    def compute(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        image = decode(encoded)
        return preprocess(random_view(image, seed) if is_view else image)

    return compute


@functools.lru_cache(maxsize=64)
def _traced(settings: str, is_view: bool) -> Callable[..., tf.Tensor]:
    """The function for these settings, traced once for all pipelines: it would otherwise take most
    of the time before the first batch."""
    # The name, as naming it by number would change the names of other layers.
    preprocess = Preprocess(**json.loads(settings), name="preprocess")
    compute = _untraced(preprocess, is_view)
    specs = [tf.TensorSpec([], tf.string), tf.TensorSpec([2], tf.int64)]
    return tf.function(compute, input_signature=specs, autograph=False)


@dataclass(frozen=True)
class Chained:
    """The batches of several splits, one split after the other."""

    parts: Sequence[Batches]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
        return itertools.chain.from_iterable(self.parts)


def shuffled(num_examples: int, seed: int) -> np.ndarray:
    """A random permutation of positions, int64 ``[num_examples]``: the order of ``Split.batches``
    and of ``Activations.batches`` with this seed. As with all TensorFlow op seeds, the result also
    depends on the global seed (``tf.random.set_seed``), which a run sets.

    Up to 16.7 million examples it is the order of ``tf.data.Dataset.range(n).shuffle(n, seed)``,
    computed here in a sixth of the time and a third of the memory; beyond that, of NumPy's
    ``Generator.permutation``.
    """
    # As tf.data does: from the global seed and the seed of the operation.
    first, second = (value % 2**64 for value in tf.compat.v1.random.get_seed(seed))
    if num_examples > _MAX_AS_TF_DATA:
        return np.random.default_rng([first, second]).permutation(num_examples)
    # The first two numbers are the seeds of the first iteration over the dataset.
    key, counter = _philox(first, second, 2).tolist()
    numbers = _philox(key, counter, num_examples)
    positions = np.arange(num_examples)
    return _swapped(positions + numbers % (num_examples - positions))


def _swapped(chosen: np.ndarray) -> np.ndarray:
    """``range(n)`` after swapping the elements ``i`` and ``chosen[i] >= i`` for each ``i`` in turn:
    a Fisher-Yates shuffle, without a loop over the elements."""
    positions = np.arange(len(chosen))
    steps = np.argsort(chosen, kind="stable")  # grouped by the chosen position
    places = chosen[steps]
    repeats = places[1:] == places[:-1]
    previous = np.full(len(chosen), -1)  # the step before that chose the same position
    previous[steps[1:][repeats]] = steps[:-1][repeats]
    # Before step i, position i holds what the last earlier step k that chose it put there: what
    # position k held before step k, and so on.
    is_last = np.append(~repeats, True)[: len(chosen)]
    places, last = places[is_last], steps[is_last]
    earlier = np.where(previous[places] >= 0, previous[places], places)
    origin = positions.copy()
    origin[places] = np.where(last < places, last, earlier)
    while ((further := origin[origin]) != origin).any():
        origin = further
    return np.where(previous >= 0, origin[previous], chosen)


def _philox(key: int, counter: int, count: int) -> np.ndarray:
    """The first random numbers of TensorFlow's kernels with two seeds, uint32 ``[count]``."""
    with tf.device("CPU"):
        return tf.raw_ops.StatelessRandomUniformFullIntV2(
            shape=[count],
            key=tf.constant([key], tf.uint64),
            counter=tf.constant([0, counter], tf.uint64),
            alg=1,
            dtype=tf.uint32,
        ).numpy()
