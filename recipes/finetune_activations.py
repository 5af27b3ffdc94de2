"""Compute the activations at a cut once, and keep them: on disk, in memory, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import tensorflow as tf

from recipes import measure, terminal
from recipes.cache import default_directory
from recipes.finetune_setup import Job
from transfer.backbone import GraphLayer
from transfer.cache import Cache, Entry
from transfer.data import Batches, Split
from transfer.features import (
    EXTRACTION_BATCH,
    Compiled,
    Rows,
    extract,
    stream,
    whole_batches,
)


@dataclass(frozen=True)
class Wanted:
    """Images whose activations are wanted; ``what`` is ``training`` or ``held-out``."""

    what: str
    split: Split
    view_seed: int | None


class Keeper:
    """Gives activations, computing those that are not there.

    Args:
        job: its config says where to keep them, and how much.
        cut: name of the tensor, for people.
        layer: from images to the cut.
        compiled: the same, to be called for each batch.

    ``num_extracted`` images were computed, ``num_found`` were there already.
    """

    def __init__(
        self,
        job: Job,
        cut: str,
        layer: GraphLayer,
        compiled: Compiled,
    ):
        self._config = job.config
        self._preprocess = job.classifier.preprocess
        self._replicas = job.replicas
        self._cut = cut
        self._layer = layer
        self._compiled = compiled
        self.num_extracted = self.num_found = 0

    def keep(self, wanted: Sequence[Wanted]) -> list[Rows] | None:
        """The rows of each, in the order of its split; ``None`` if there is no room for them."""
        if self._config.cache == "off":
            return None
        if self._config.cache == "disk":
            try:
                return self._on_disk(wanted)
            except OSError as error:
                terminal.say(f"{error}; trying memory")
        num_images = sum(len(item.split) for item in wanted)
        needed, free = num_images * self._row_bytes / 1e6, measure.available_memory_mb()
        if needed > free / 2:
            terminal.say(
                f"the activations at {self._cut} would take {needed:,.0f} MB and {free:,.0f} MB of "
                "memory are free: they are computed anew in each epoch; a later --freeze-until or "
                "--cache-dtype float16 needs less"
            )
            return None
        self.num_found = 0
        self.num_extracted = num_images
        dtype = self._config.cache_dtype
        return [
            extract(self._compiled, self._images(item), len(item.split), dtype)
            if len(item.split)
            else np.zeros((0, *self._row_shape), dtype)
            for item in wanted
        ]

    def _on_disk(self, wanted: Sequence[Wanted]) -> list[Rows]:
        directory = self._config.cache_dir or default_directory()
        cache = Cache(directory, limit_bytes=int(self._config.cache_limit * 1e9))
        digest, shape = self._layer.digest(), self._row_shape
        entries = [
            cache.entry(self._key(item, digest), shape, self._config.cache_dtype) for item in wanted
        ]
        with contextlib.ExitStack() as locks:
            # In one order everywhere, so that no two processes wait for each other.
            for entry in sorted(entries, key=lambda entry: entry.folder):
                locks.enter_context(entry.lock(self._say_waiting))
            missing = [
                whole_batches(entry.missing(item.split.ids))
                for entry, item in zip(entries, wanted, strict=True)
            ]
            num_missing = sum(int(mask.sum()) for mask in missing)
            needed = num_missing * self._row_bytes
            cache.make_room(needed, keep=entries)
            self.num_extracted = num_missing
            self.num_found = sum(map(len, missing)) - num_missing
            terminal.say(
                f"activations at {self._cut}: {self.num_found} images found, {num_missing} to "
                f"compute, {needed / 1e6:,.0f} MB, in {directory}"
            )
            for entry, item, mask in zip(entries, wanted, missing, strict=True):
                if mask.any():
                    self._compute(entry, item, mask)
            return [entry.read(item.split.ids) for entry, item in zip(entries, wanted, strict=True)]

    def _compute(self, entry: Entry, wanted: Wanted, missing: np.ndarray) -> None:
        rest = Wanted(wanted.what, wanted.split.where(missing), wanted.view_seed)
        ids, done = rest.split.ids, 0
        for rows, _ in stream(self._compiled, self._images(rest)):
            entry.append(ids[done : done + len(rows)], rows)
            done += len(rows)

    def _images(self, wanted: Wanted) -> Iterable:
        batches: Batches = wanted.split.batches(
            self._preprocess, EXTRACTION_BATCH, view_seed=wanted.view_seed
        )
        return measure.progress(batches, f"features of the {wanted.what} images")

    @property
    def _row_shape(self) -> tuple[int, ...]:
        size, channels = self._preprocess.size, self._preprocess.channels
        images = tf.TensorSpec([EXTRACTION_BATCH, size, size, channels], tf.float32)
        return tuple(self._compiled.function.get_concrete_function(images).outputs[0].shape[1:])

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self._row_shape)) * np.dtype(self._config.cache_dtype).itemsize

    def _key(self, wanted: Wanted, digest: str) -> dict[str, Any]:
        """All that a row depends on, but for the image; and names, for people."""
        split = wanted.split
        key = {
            "model": self._config.model,
            "cut": self._cut,
            "sha256": digest,
            "preprocess": self._preprocess.mode,
            "image_size": self._preprocess.size,
            "channels": self._preprocess.channels,
            "dataset": split.source.name,
            "splits": [part for part, indices in split.parts if len(indices)],
            "view_seed": wanted.view_seed,
            "versions": {package: version(package) for package in ("vgg-transfer", "tensorflow")},
        }
        if self._replicas.num_workers > 1:
            # No two workers write to the same file.
            key["worker"] = [self._replicas.worker, self._replicas.num_workers]
        if wanted.what == "held-out":
            # Rows depend on their company, in the last bit. An evaluation is to be the same to
            # that bit, whatever was computed before.
            key["examples"] = hashlib.sha256(b"".join(split.ids)).hexdigest()
        return key

    def _say_waiting(self) -> None:
        terminal.say(f"another process computes the activations at {self._cut}: waiting for it")
