"""Run a frozen part of a network once over a dataset and keep what comes out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from transfer.core.distribution import NO_LABEL, Replicas
from transfer.data.dataset import shuffled
from transfer.graph.network_function import compiled_per_rank

EXTRACTION_BATCH = 32
"""Images per batch wherever something is computed to be kept or evaluated. One size, and the same
images together: results depend on both, in the last bit."""


class Rows(Protocol):
    """An array, or what is on disk and acts like one."""

    def __getitem__(self, positions: Any) -> np.ndarray: ...


@dataclass(frozen=True)
class Activations:
    """What a frozen prefix makes of every image of a split, in the split's order.

    ``views`` hold ``[num_examples, ...]`` each, as the prefix gives them: one for the images as
    they are, or one for each random view of them. ``labels`` are int64 ``[num_examples]``.

    Where several processes share the work, ``here`` is boolean ``[num_examples]``, and views hold
    the rows of those examples only at which it is true.
    """

    views: Sequence[Rows]
    labels: np.ndarray
    here: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        batch_size: int,
        shuffle_seed: int | None = None,
        epoch: int = 0,
        first_batch: int = 0,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """``(inputs, labels)``, float32 and int64; the last batch may be smaller.

        Each image is shown once, and another view of it in the next epoch. Of each batch, the
        examples that are here; a row of zeros without a label where there is none.

        Args:
            batch_size: examples per batch.
            shuffle_seed: gives a perfect shuffle, the same as that of images; ``None`` keeps the
                order.
            epoch: from 0; only of consequence where there are several views.
            first_batch: where to begin, from 0.
        """
        order = np.arange(len(self))
        if shuffle_seed is not None:
            order = shuffled(len(self), shuffle_seed)
        for start in range(first_batch * batch_size, len(order), batch_size):
            chosen = order[start : start + batch_size]
            if self.here is not None:
                chosen = chosen[self.here[chosen]]
            if not len(chosen):
                shape = self.views[0][:0].shape[1:]
                yield np.zeros((1, *shape), np.float32), np.full(1, NO_LABEL)
                continue
            rows = chosen if self._rows is None else self._rows[chosen]
            yield self._gather(rows, (chosen + epoch) % len(self.views)), self.labels[chosen]

    @functools.cached_property
    def _rows(self) -> np.ndarray | None:
        """Example to its row, where not all are here."""
        return None if self.here is None else np.cumsum(self.here) - 1

    def _gather(self, chosen: np.ndarray, view_of_each: np.ndarray) -> np.ndarray:
        if len(self.views) == 1:
            return np.asarray(self.views[0][chosen], np.float32)
        masks = [view_of_each == number for number in range(len(self.views))]
        parts = [
            (mask, view[chosen[mask]])
            for mask, view in zip(masks, self.views, strict=True)
            if mask.any()
        ]
        inputs = np.empty((len(chosen), *parts[0][1].shape[1:]), np.float32)
        for mask, rows in parts:
            inputs[mask] = rows
        return inputs


def extract(
    prefix: Callable[[Any], Any],
    batches: Iterable[tuple[Any, Any]],
    num_examples: int,
    dtype: str = "float32",
) -> np.ndarray:
    """Run a prefix over all batches, in inference mode.

    Args:
        prefix: preprocessed images to activations, e.g. a ``Compiled``.
        batches: ``(images, labels)``.
        num_examples: in all batches together.
        dtype: to keep them in.

    Returns:
        ``[num_examples, ...]``, in memory.

    Raises:
        ValueError: if the batches hold another number of examples.
    """
    inputs: np.ndarray = np.zeros(0, dtype)
    done = 0
    for outputs, _ in stream(prefix, batches):
        if not done:
            inputs = np.empty((num_examples, *outputs.shape[1:]), dtype)
        if done + len(outputs) > num_examples:
            raise ValueError(f"expected {num_examples} examples, the dataset gave more")
        inputs[done : done + len(outputs)] = outputs
        done += len(outputs)
    if done != num_examples:
        raise ValueError(f"expected {num_examples} examples, the dataset gave {done}")
    return inputs


def stream(
    prefix: Callable[[Any], Any], batches: Iterable[tuple[Any, Any]]
) -> Iterator[tuple[np.ndarray, Any]]:
    """``(activations, labels)`` of each batch, keeping none: the same values that ``extract``
    keeps."""
    if isinstance(prefix, Compiled) and prefix.replicas.num_local > 1:
        yield from prefix.on_replicas(batches)
        return
    for images, labels in batches:
        yield np.asarray(prefix(images)), labels


def whole_batches(missing: np.ndarray, batch_size: int = EXTRACTION_BATCH) -> np.ndarray:
    """Of a boolean ``[num_examples]``, the same with all examples of a batch where it has one."""
    if not len(missing):
        return missing
    starts = np.arange(0, len(missing), batch_size)
    return np.repeat(np.logical_or.reduceat(missing, starts), batch_size)[: len(missing)]


class Compiled:
    """A layer in inference mode as one ``tf.function``; make it once, call it for every batch.

    Args:
        layer: inputs to outputs.
        replicas: those of this process get a batch each, in ``stream``.
    """

    def __init__(self, layer: Callable[[Any], Any], replicas: Replicas | None = None):
        self.replicas = Replicas() if replicas is None else replicas
        self._function = compiled_per_rank(lambda inputs: layer(inputs))
        self._on_each = tf.function(
            lambda inputs: self.replicas.strategy.run(layer, (inputs,)),
            autograph=False,
            reduce_retracing=True,
        )

    def __call__(self, inputs: Any) -> tf.Tensor:
        return self._function(inputs)

    def on_replicas(self, batches: Iterable[tuple[Any, Any]]) -> Iterator[tuple[np.ndarray, Any]]:
        """``(outputs, labels)`` of each batch, in order; as many at once as there are replicas."""
        count = self.replicas.num_local
        remaining = iter(batches)
        while group := list(itertools.islice(remaining, count)):
            # Where there are fewer batches than replicas, the others repeat one.
            inputs = [group[min(number, len(group) - 1)][0] for number in range(count)]
            outputs = self._on_each(self.replicas.each(inputs))
            outputs = self.replicas.strategy.experimental_local_results(outputs)
            for (_, labels), found in zip(group, outputs, strict=False):
                yield np.asarray(found), labels
