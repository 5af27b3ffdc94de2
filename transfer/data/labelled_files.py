"""Labelled image files as a ``Source``."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf

from transfer.core import measurement
from transfer.data.dataset import Source
from transfer.data.names import Names
from transfer.images.image_files import PassedOver


def labelled_files(
    name: str,
    class_names: list[str],
    root: Path,
    files: Mapping[str, Names],
    labels: Mapping[str, np.ndarray],
    *,
    passed_over: PassedOver | None = None,
    refused: Mapping[str, str] | None = None,
) -> Source:
    """A ``Source`` of image files. Opens none of them.

    Args:
        name: display name.
        class_names: names in the order of the labels.
        root: an absolute path.
        files: maps the name of a split to its files, relative to ``root`` or absolute, in a fixed
            order. They are the names of the examples.
        labels: maps the name of a split to its labels, int64, in the order of its files.
        passed_over: see ``Source``.
        refused: maps names of files that must not be read to the reasons; see ``Source``.
    """
    refused = refused or {}

    @functools.cache
    def readable(split_name: str) -> np.ndarray | None:
        """Whether each file may be read; ``None`` if all may."""
        if not refused:
            return None
        return np.array([file not in refused for file in files[split_name]], bool)

    @functools.cache
    def data(split_name: str) -> tf.Tensor:
        return tf.constant(files[split_name].data, tf.string)

    def examples(split_name: str, positions: np.ndarray) -> tf.data.Dataset:
        names, may_read = files[split_name], readable(split_name)
        all_names, folder = data(split_name), os.fsencode(root)

        def read(
            start: tf.Tensor, length: tf.Tensor, label: tf.Tensor, *is_readable: tf.Tensor
        ) -> dict[str, tf.Tensor]:
            name = tf.strings.substr(all_names, start, length)
            is_absolute = tf.strings.substr(name, 0, 1) == os.sep
            path = tf.where(is_absolute, name, tf.strings.join([folder, name], os.sep))
            if is_readable:
                path = tf.where(is_readable[0], path, os.devnull)
            return {"image": tf.io.read_file(path), "label": label, "name": name}

        # Offsets instead of paths save memory: a path takes a hundred bytes per image and epoch.
        columns = [names.starts, names.lengths, labels[split_name]]
        if may_read is not None:
            columns.append(may_read)
        return tf.data.Dataset.from_tensor_slices(tuple(c[positions] for c in columns)).map(
            read, num_parallel_calls=measurement.num_cpus()
        )

    def ids(split_name: str) -> np.ndarray:
        paths = (os.path.join(root, file) for file in files[split_name])
        return joined(digest(path, *state_of(path)) for path in paths)

    return Source(
        name,
        class_names,
        {split_name: len(names) for split_name, names in files.items()},
        examples,
        labels.__getitem__,
        files.__getitem__,
        ids,
        passed_over=passed_over or PassedOver(),
        refused=refused,
    )


def state_of(path: str | Path) -> tuple[int, ...]:
    """File size and times, which change with the content, without reading the file."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def digest(*words: object) -> bytes:
    """A hash of the words, bytes ``[16]``."""
    return hashlib.blake2b(repr(words).encode(), digest_size=16).digest()


def joined(ids: Iterable[bytes]) -> np.ndarray:
    """Ids of 16 bytes each, as ``S16`` ``[n]``."""
    return np.frombuffer(b"".join(ids), "S16")
