"""Feature extraction: runs the frozen part of a network once over a dataset."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import itertools
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from transfer.core.distribution import NO_LABEL, Replicas
from transfer.core.npy_files import Rows
from transfer.core.private_api import is_onednn_on
from transfer.data.batches import shuffled
from transfer.graph.network_function import compiled_per_rank

EXTRACTION_BATCH = 32
"""Images per batch in extraction and evaluation. Fixed, because activations depend on the batch
they are computed in, at float precision."""


def versions() -> dict[str, dict[str, str]]:
    """The field of a cache key for the packages that decode images and compute activations."""
    packages = ["vgg-transfer", "tensorflow", "pillow"]
    if importlib.util.find_spec("pillow_heif") is not None:
        packages.append("pillow-heif")
    return {"versions": {name: importlib.metadata.version(name) for name in packages}}


def kernels() -> dict[str, str]:
    """The field of a cache key for the kernels that compute activations, which differ at float
    precision. Without a field: oneDNN on a CPU, as the command turns it on, and CPUs other than
    x86, which have one kind of kernels."""
    if tf.config.list_logical_devices("GPU"):
        return {"kernels": "gpu"}
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {"kernels": "eigen"} if is_x86 and not is_onednn_on() else {}


class JoinedRows:
    """Acts as the concatenation of arrays of rows, without reading them.

    Args:
        parts: arrays ``[length, *row_shape]`` with the same shape and dtype of a row.
        lengths: their lengths.
    """

    def __init__(self, parts: Sequence[Rows], lengths: Sequence[int]):
        self._parts = parts
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, positions: Any) -> np.ndarray:
        chosen = np.asarray(positions)
        if chosen.dtype.kind != "i" or chosen.ndim != 1 or (chosen < 0).any():
            chosen = np.arange(len(self))[positions]
        part_of = np.searchsorted(self._ends, chosen, side="right")
        nothing = self._parts[0][:0]
        rows = np.empty((*chosen.shape, *nothing.shape[1:]), nothing.dtype)
        for number in np.unique(part_of):
            is_here = part_of == number
            start = self._ends[number - 1] if number else 0
            rows[is_here] = self._parts[number][chosen[is_here] - start]
        return rows


@dataclass(frozen=True)
class Activations:
    """Activations of the frozen part of a network for every image of a split, in its order.

    ``views`` hold ``[num_examples, ...]`` each: one for the original images, or one for each random
    view of them. ``labels`` are int64 ``[num_examples]``.

    With several processes, ``here`` is boolean ``[num_examples]``, and the views hold only the rows
    of examples for which it is true.
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
        """Batches of ``(inputs, labels)``, float32 and int64; the last batch may be smaller.

        Each image occurs once, with a different view in the next epoch. A batch has only the
        examples of this process; if it has none, one row of zeros without a label.

        Args:
            batch_size: examples per batch.
            shuffle_seed: seed of a full shuffle, the same order as for images; ``None`` keeps the
                order.
            epoch: number of the epoch, from 0; selects the views if there are several.
            first_batch: number of the first batch, from 0.
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

    def in_order(
        self, batch_size: int, lengths: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """``batches`` in the order of the examples, of which the first ``lengths[0]``, the next
        ``lengths[1]`` and so on are apart, as in ``Split.in_order``."""
        start = 0
        for length in lengths:
            chosen = np.arange(start, start + length)
            for first in range(0, length, batch_size):
                rows = chosen[first : first + batch_size]
                yield self._gather(rows, np.zeros_like(rows)), self.labels[rows]
            start += length

    @functools.cached_property
    def _rows(self) -> np.ndarray | None:
        """Row number of each example; ``None`` if this process has all examples."""
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
    *,
    fill: bool = False,
) -> np.ndarray:
    """Run the frozen part of a network over all batches, in inference mode.

    Args:
        prefix: maps preprocessed images to activations, e.g. a ``Compiled``.
        batches: ``(images, labels)``.
        num_examples: total number of examples in the batches.
        dtype: dtype of the result.
        fill: see ``stream``.

    Returns:
        Activations ``[num_examples, ...]``, in memory.

    Raises:
        ValueError: if the batches hold a different number of examples.
    """
    inputs: np.ndarray = np.zeros(0, dtype)
    done = 0
    for outputs, _ in stream(prefix, batches, fill=fill):
        if not done:
            inputs = np.empty((num_examples, *outputs.shape[1:]), dtype)
        if done + len(outputs) > num_examples:
            raise ValueError(f"expected {num_examples} examples, the dataset gave more")
        inputs[done : done + len(outputs)] = in_dtype(outputs, dtype)
        done += len(outputs)
    if done != num_examples:
        raise ValueError(f"expected {num_examples} examples, the dataset gave {done}")
    return inputs


def in_dtype(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Activations in the dtype of a cache, ``float32`` or ``float16``.

    Raises:
        ValueError: if some are too large for it.
    """
    with np.errstate(over="ignore"):
        converted = rows.astype(dtype, copy=False)
    if dtype == "float16" and np.isinf(converted).any() and np.isfinite(rows).all():
        raise ValueError(
            f"activations of up to {np.abs(rows).max():.3g} do not fit in float16, whose largest "
            f"value is {np.finfo(np.float16).max:g}; use cache_dtype=float32"
        )
    return converted


def stream(
    prefix: Callable[[Any], Any], batches: Iterable[tuple[Any, Any]], *, fill: bool = False
) -> Iterator[tuple[np.ndarray, Any]]:
    """Yield ``(activations, labels)`` of each batch, with the same values as ``extract``.

    Args:
        prefix: maps preprocessed images to activations.
        batches: ``(images, labels)``.
        fill: compute a batch of fewer than ``EXTRACTION_BATCH`` images as one of that size, so that
            activations do not depend on the number of images. A batch of one image is computed by
            other kernels than a larger one, which differ at float precision.
    """
    if fill:
        batches = ((_filled(images), labels) for images, labels in batches)
    if isinstance(prefix, Compiled) and prefix.replicas.num_local > 1:
        outputs = prefix.on_replicas(batches)
    else:
        outputs = ((np.asarray(prefix(images)), labels) for images, labels in batches)
    for rows, labels in outputs:
        yield (rows[: len(labels)] if fill else rows), labels


def _filled(images: Any) -> Any:
    missing = EXTRACTION_BATCH - len(images)
    return np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)]) if missing > 0 else images


def whole_batches(missing: np.ndarray, batch_size: int = EXTRACTION_BATCH) -> np.ndarray:
    """Extend a mask, bool ``[num_examples]``, to all examples of each batch that has a true one."""
    if not len(missing):
        return missing
    starts = np.arange(0, len(missing), batch_size)
    return np.repeat(np.logical_or.reduceat(missing, starts), batch_size)[: len(missing)]


class Compiled:
    """A layer in inference mode as a ``tf.function``; create it once, call it for every batch.

    Args:
        layer: maps inputs to outputs.
        replicas: in ``stream``, each replica of this process gets one batch at a time.
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
        """Yield ``(outputs, labels)`` of each batch, in order; one batch per replica at a time."""
        count = self.replicas.num_local
        remaining = iter(batches)
        while group := list(itertools.islice(remaining, count)):
            # If there are fewer batches than replicas, the remaining replicas repeat the last one.
            inputs = [group[min(number, len(group) - 1)][0] for number in range(count)]
            outputs = self._on_each(self.replicas.each(inputs))
            outputs = self.replicas.strategy.experimental_local_results(outputs)
            for (_, labels), output in zip(group, outputs, strict=False):
                yield np.asarray(output), labels
