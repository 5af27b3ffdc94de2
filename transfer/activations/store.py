"""Computes the activations at a cut once and caches them on disk or in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from transfer.activations.cache import Cache, default_directory
from transfer.activations.entry import Entry
from transfer.activations.extraction import (
    EXTRACTION_BATCH,
    Compiled,
    JoinedRows,
    extract,
    in_dtype,
    kernels,
    stream,
    versions,
    whole_batches,
)
from transfer.core import measurement
from transfer.core.distribution import Replicas
from transfer.core.npy_files import Rows
from transfer.data import labelled_files
from transfer.data.batches import Batches
from transfer.data.dataset import Split
from transfer.images.preprocess import Preprocess
from transfer.layers.graph_layer import GraphLayer

logger = logging.getLogger(__name__)

TRAINING, HELD_OUT = "training", "held-out"
"""Roles of images."""


@dataclass(frozen=True)
class ExtractionRequest:
    """Images whose activations are needed.

    Args:
        role: ``TRAINING`` or ``HELD_OUT``.
        split: the images.
        view_seed: seed of their random views; ``None`` does not augment.
        here: boolean ``[len(split)]``, the images that this process needs, in whole batches of
            ``EXTRACTION_BATCH``; ``None`` for all.
    """

    role: str
    split: Split
    view_seed: int | None
    here: np.ndarray | None = None

    @functools.cached_property
    def needed(self) -> Split:
        """The images that this process needs."""
        return self.split if self.here is None else self.split.where(self.here)

    @functools.cached_property
    def row_ids(self) -> np.ndarray:
        """Ids of the rows of the needed images, ``S16`` ``[len(needed)]``: those of the images, and
        for random views, which their names seed, of image and name."""
        ids = self.needed.ids
        if self.view_seed is None:
            return ids
        pairs = zip(ids.tolist(), self.needed.names, strict=True)
        return labelled_files.joined(labelled_files.digest(*pair) for pair in pairs)

    def of_members(self) -> list[ExtractionRequest]:
        """The same images in the same order as requests to the sources that they come from, which
        are those that a run on this source alone would make."""
        if not self.split.source.members or not len(self.split):
            return [self]
        splits = self.split.of_members()
        ends = np.cumsum([len(split) for split in splits])[:-1]
        here: list[np.ndarray | None] = [None] * len(splits)
        if self.here is not None:
            here = [*np.split(self.here, ends)]
        return [
            dataclasses.replace(self, split=split, here=mask)
            for split, mask in zip(splits, here, strict=True)
        ]


@dataclass(frozen=True)
class CachePolicy:
    """Where activations are cached.

    Args:
        mode: ``disk`` keeps them for later runs, ``memory`` for this process, ``off`` not at all.
        directory: directory of the cache on disk; ``None`` is ``default_directory()``.
        limit_gb: largest size of that directory, in units of 1e9 bytes.
        dtype: of the rows of training images: float16 halves the size and keeps about three
            significant digits. Held-out images have float32, so that metrics are those of the
            classifier.
    """

    mode: Literal["disk", "memory", "off"] = "disk"
    directory: Path | None = None
    limit_gb: float = 20.0
    dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        if not 0 < self.limit_gb < math.inf:
            raise ValueError(f"cache_limit must be a number above 0, got {self.limit_gb}")


class ActivationStore:
    """Provides the activations of a layer, computing those that are missing.

    Args:
        layer: maps preprocessed images to the activations.
        preprocess: applied to every image.
        cut: name of the output tensor of the layer.
        model: name of the model.
        policy: where to cache activations.
        compiled: the layer as a function, called for each batch; a ``Compiled`` by default.
        precision: what the results of ``compiled`` depend on beside the layer, if they are not
            those of float32; part of the key of the cache.
        replicas: devices and processes that share the work.
        progress: wraps the batches, given a description.

    ``num_extracted`` images were computed, ``num_found`` were in the cache.
    """

    def __init__(
        self,
        layer: GraphLayer[Any],
        preprocess: Preprocess,
        *,
        cut: str,
        model: str,
        policy: CachePolicy,
        compiled: Callable[[Any], Any] | None = None,
        precision: Mapping[str, Any] | None = None,
        replicas: Replicas | None = None,
        progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda batches, _: batches,
    ):
        self._layer = layer
        self._preprocess = preprocess
        self._cut = cut
        self._model = model
        self._policy = policy
        self._replicas = replicas or Replicas()
        self._compiled = compiled or Compiled(layer, self._replicas)
        self._precision = precision or {}
        self._progress = progress
        self.num_extracted = self.num_found = 0

    def rows(self, requests: Sequence[ExtractionRequest]) -> list[Rows] | None:
        """The activations of each request, in the order of its needed images; ``None`` if they do
        not fit in memory, or the policy is ``off``."""
        parts = [request.of_members() for request in requests]
        rows = self._rows([part for members in parts for part in members])
        if rows is None:
            return None
        remaining = iter(rows)
        return [
            next(remaining)
            if len(members) == 1
            else JoinedRows([next(remaining) for _ in members], [len(m.needed) for m in members])
            for members in parts
        ]

    def num_missing(self, requests: Sequence[ExtractionRequest]) -> int:
        """How many images ``rows`` would compute, as they are not in the cache. Writes nothing."""
        parts = [part for request in requests for part in request.of_members()]
        if self._is_on_disk:
            cache = self._cache(self._policy.directory or default_directory())
            with contextlib.suppress(OSError):  # a folder that cannot be used
                entries = self._entries(cache, self._layer.digest(), parts, begin=False)
                return sum(
                    int(whole_batches(entry.missing(part.row_ids)).sum())
                    for entry, part in zip(entries, parts, strict=True)
                )
        return sum(len(part.needed) for part in parts)

    def _rows(self, requests: Sequence[ExtractionRequest]) -> list[Rows] | None:
        if self._policy.mode == "off":
            return None
        if self._is_on_disk:
            try:
                return self._on_disk(requests)
            except OSError as error:
                logger.warning(f"{error}; keeping the activations in memory instead")
        num_images = sum(len(item.needed) for item in requests)
        num_bytes = sum(len(item.needed) * self._row_bytes(item) for item in requests)
        needed, free = num_bytes / 1e6, measurement.available_memory_mb()
        if needed > free / 2:
            logger.info(
                f"the activations at {self._cut} would take {needed:,.0f} MB and {free:,.0f} MB of "
                "memory are free: they are recomputed in each epoch; a later freeze_until or "
                "cache_dtype=float16 needs less"
            )
            return None
        self.num_found = 0
        self.num_extracted = num_images
        return [
            self._extracted(item, self._images(item, item.needed), len(item.needed))
            if len(item.needed)
            else np.zeros((0, *self._row_shape), self._dtype(item))
            for item in requests
        ]

    @property
    def _is_on_disk(self) -> bool:
        # The key has the settings of a ``Preprocess``; a subclass may compute anything from them.
        return self._policy.mode == "disk" and type(self._preprocess) is Preprocess

    def _on_disk(self, requests: Sequence[ExtractionRequest]) -> list[Rows]:
        directory = self._policy.directory or default_directory()
        cache = self._cache(directory)
        digest = self._layer.digest()
        entries = self._entries(cache, digest, requests)
        by_folder = {entry.folder: entry for entry in entries}  # parts of one split have one entry
        entries = [by_folder[entry.folder] for entry in entries]
        with contextlib.ExitStack() as locks:
            # Lock in the same order in all processes, to avoid deadlocks.
            for _, entry in sorted(by_folder.items()):
                locks.enter_context(entry.lock(self._say_waiting))
            missing = [
                entry.missing(item.row_ids) for entry, item in zip(entries, requests, strict=True)
            ]
            needed = sum(
                int(mask.sum()) * self._row_bytes(item)
                for item, mask in zip(requests, missing, strict=True)
            )
            if needed:
                cache.make_room(needed, keep=entries)
            self.num_extracted = sum(int(whole_batches(mask).sum()) for mask in missing)
            self.num_found = sum(map(len, missing)) - self.num_extracted
            logger.info(
                f"activations at {self._cut}: {self.num_found} images found, {self.num_extracted} "
                f"to compute, {needed / 1e6:,.0f} MB, in {directory}"
            )
            for entry, item, mask in zip(entries, requests, missing, strict=True):
                if mask.any():
                    self._compute(entry, item, mask)
            return [
                entry.read(item.row_ids, functools.partial(self._restore, entry, item, digest))
                for entry, item in zip(entries, requests, strict=True)
            ]

    def _cache(self, directory: Path) -> Cache:
        worker = self._replicas.worker, self._replicas.num_workers
        return Cache(directory, int(self._policy.limit_gb * 1e9), worker)

    def _entries(
        self,
        cache: Cache,
        digest: str,
        requests: Sequence[ExtractionRequest],
        *,
        begin: bool = True,
    ) -> list[Entry]:
        shape = self._row_shape
        return [
            cache.entry(self._key(request, digest), shape, self._dtype(request), begin=begin)
            for request in requests
        ]

    def _compute(self, entry: Entry, request: ExtractionRequest, missing: np.ndarray) -> None:
        """Compute the batches that have missing rows, and append these rows."""
        computed = whole_batches(missing)
        split, is_new = request.needed.where(computed), missing[computed]
        ids, done = request.row_ids[computed], 0
        for rows, _ in stream(
            self._compiled, self._images(request, split), fill=request.role == TRAINING
        ):
            batch = slice(done, done + len(rows))
            new = in_dtype(rows[is_new[batch]], self._dtype(request))
            entry.append(ids[batch][is_new[batch]], new)
            done += len(rows)

    def _restore(
        self, entry: Entry, request: ExtractionRequest, digest: str, positions: np.ndarray
    ) -> np.ndarray:
        """Compute the rows of examples again, in the same batches as before, because the cached
        ones turned out to be damaged.

        Raises:
            OSError: if that is not possible; says what to do.
        """
        damage = f"{len(positions)} of the activations at {self._cut} in {entry.folder} are damaged"
        if self._layer.digest() != digest:
            raise OSError(
                f"{damage}, and the weights before the cut have changed since; start a new run"
            )
        logger.warning(f"{damage}; computing them again")
        is_lost = np.zeros(len(request.needed), bool)
        is_lost[positions] = True
        computed = whole_batches(is_lost)
        split = request.needed.where(computed)
        batches = split.batches(self._preprocess, EXTRACTION_BATCH, view_seed=request.view_seed)
        try:
            rows = self._extracted(request, batches, len(split))
        except (OSError, ValueError) as error:
            raise OSError(
                f"{damage}, and cannot be computed again: {error}; then continue with resume=True, "
                "the completed epochs are kept"
            ) from error
        rows = rows[is_lost[computed]]
        try:
            entry.append(request.row_ids[positions], rows)
        except OSError as error:
            logger.warning(f"{error}")
        return rows

    def _extracted(
        self, request: ExtractionRequest, batches: Iterable[Any], num_images: int
    ) -> np.ndarray:
        fill, dtype = request.role == TRAINING, self._dtype(request)
        return extract(self._compiled, batches, num_images, dtype, fill=fill)

    def _images(self, request: ExtractionRequest, split: Split) -> Iterable[Any]:
        batches: Batches = split.batches(
            self._preprocess, EXTRACTION_BATCH, view_seed=request.view_seed
        )
        return self._progress(batches, f"features of the {request.role} images")

    @property
    def _row_shape(self) -> tuple[int, ...]:
        images = keras.KerasTensor((EXTRACTION_BATCH, *self._preprocess.shape), "float32")
        return tuple(self._layer.compute_output_spec(images).shape[1:])

    def _dtype(self, request: ExtractionRequest) -> str:
        return "float32" if request.role == HELD_OUT else self._policy.dtype

    def _row_bytes(self, request: ExtractionRequest) -> int:
        return int(np.prod(self._row_shape)) * np.dtype(self._dtype(request)).itemsize

    def _key(self, request: ExtractionRequest, digest: str) -> dict[str, Any]:
        """Cache key: everything that a row depends on except the image, and display names."""
        split = request.split
        key: dict[str, Any] = {
            "model": self._model,
            "cut": self._cut,
            "sha256": digest,
            "preprocess": self._preprocess.mode,
            "image_size": self._preprocess.plain_size,
            "channels": self._preprocess.channels,
            "dataset": split.source.name,
            "splits": [part for part, indices in split.parts if len(indices)],
            "view_seed": request.view_seed,
            **versions(),
        }
        if self._layer.mixed_precision is not None:
            key["precision"] = self._layer.mixed_precision
        key |= {**self._precision, **kernels()}
        if request.role == HELD_OUT:
            # Activations depend on the batch they are computed in, at float precision. An
            # evaluation must be bit-identical whatever was cached before. Workers compute whole
            # batches, so that their number makes no difference.
            key["examples"] = hashlib.sha256(split.ids.tobytes()).hexdigest()
        return key

    def _say_waiting(self) -> None:
        logger.info(f"waiting for another process that computes the activations at {self._cut}")
