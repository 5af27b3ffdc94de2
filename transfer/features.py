"""Run a frozen part of a network once over a dataset and keep what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf


@dataclass(frozen=True)
class Activations:
    """What a frozen prefix makes of every image of a split, in the split's order.

    ``inputs`` ``[num_examples, ...]`` as the prefix gives them, ``labels`` int64
    ``[num_examples]``.
    """

    inputs: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, batch_size: int, shuffle_seed: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """``(inputs, labels)``; the last batch may be smaller.

        Args:
            batch_size: examples per batch.
            shuffle_seed: gives a perfect shuffle; ``None`` keeps the order.
        """
        order = np.arange(len(self))
        if shuffle_seed is not None:
            np.random.default_rng(shuffle_seed).shuffle(order)
        for start in range(0, len(order), batch_size):
            rows = slice(start, start + batch_size)
            chosen = rows if shuffle_seed is None else order[rows]  # a slice copies nothing
            yield self.inputs[chosen], self.labels[chosen]


def extract(
    prefix: Callable[[Any], Any], batches: Iterable[tuple[Any, Any]], num_examples: int
) -> Activations:
    """Run a prefix over all batches, in inference mode.

    Args:
        prefix: preprocessed images to activations, e.g. from ``compiled``.
        batches: ``(images, labels)``.
        num_examples: in all batches together.

    Returns:
        The activations, in memory: ``num_examples`` times the size of one.

    Raises:
        ValueError: if the batches hold another number of examples.
    """
    inputs = np.zeros(0)
    labels = np.zeros(num_examples, np.int64)
    done = 0
    for outputs, batch_labels in stream(prefix, batches):
        if not done:
            inputs = np.empty((num_examples, *outputs.shape[1:]), outputs.dtype)
        if done + len(outputs) > num_examples:
            raise ValueError(f"expected {num_examples} examples, the dataset gave more")
        inputs[done : done + len(outputs)] = outputs
        labels[done : done + len(outputs)] = batch_labels
        done += len(outputs)
    if done != num_examples:
        raise ValueError(f"expected {num_examples} examples, the dataset gave {done}")
    return Activations(inputs, labels)


def stream(
    prefix: Callable[[Any], Any], batches: Iterable[tuple[Any, Any]]
) -> Iterator[tuple[np.ndarray, Any]]:
    """``(activations, labels)`` of each batch, keeping none: the same values that ``extract``
    keeps."""
    for images, labels in batches:
        yield np.asarray(prefix(images)), labels


def compiled(layer: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A layer in inference mode as one ``tf.function``; make it once, call it for every batch."""
    return tf.function(lambda inputs: layer(inputs), autograph=False, reduce_retracing=True)
