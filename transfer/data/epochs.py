"""Batches of successive epochs, without a pause between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

Batches = Callable[[int, int], Iterable[Any]]
"""Maps the number of an epoch and of its first batch to the batches from there on."""


class Epochs:
    """Starts the batches of the next epoch, in a thread, when the last batch of an epoch is taken.

    Building a pipeline, shuffling and decoding the first batch take seconds; they overlap with the
    last step and the validation. The batches are the same as without.

    Args:
        batches: see ``Batches``.
        num_batches: batches per epoch.
        num_epochs: number of the epoch before which to stop; no images are read for it.
    """

    def __init__(self, batches: Batches, num_batches: int, num_epochs: int):
        self._batches, self._num_batches, self._num_epochs = batches, num_batches, num_epochs
        self._thread = ThreadPoolExecutor(1, "next-epoch")
        self._started: dict[int, Future[Iterator[Any]]] = {}

    def __call__(self, epoch: int, first_batch: int = 0) -> Iterator[Any]:
        """The batches of an epoch. Raises what reading them raises."""
        started = self._started.pop(epoch, None)
        self._started.clear()
        if started is None or first_batch:
            batches = iter(self._batches(epoch, first_batch))
        else:
            batches = started.result()
        for number, batch in enumerate(batches, first_batch + 1):
            if number == self._num_batches and epoch + 1 < self._num_epochs:
                self._started[epoch + 1] = self._thread.submit(self._start, epoch + 1)
            yield batch

    def _start(self, epoch: int) -> Iterator[Any]:
        batches = iter(self._batches(epoch, 0))
        first = list(itertools.islice(batches, 1))  # tf.data begins to read with the first request
        return itertools.chain(first, batches)
