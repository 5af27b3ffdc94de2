"""Labelled images at URLs as a ``Source``: like ``labelled_files``, but read through fsspec."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from transfer.data import remote_files
from transfer.data.dataset import Source
from transfer.data.labelled_files import digest, joined, state_of
from transfer.data.names import Names
from transfer.images import image_files

_TOGETHER = 32  # images that are requested at the same time


def labelled_urls(
    name: str,
    class_names: list[str],
    root: str,
    files: Mapping[str, Names],
    labels: Mapping[str, np.ndarray],
    *,
    refused: Mapping[str, str] | None = None,
) -> Source:
    """A ``Source`` of images at URLs, some of which may be local files. Opens none of them.

    An image that cannot be read is an unreadable image, with the reason.

    Args:
        name: display name.
        class_names: names in the order of the labels.
        root: the URL or path of the folder of relative names.
        files: maps the name of a split to URLs or paths, in a fixed order. They are the names of
            the examples.
        labels: maps the name of a split to its labels, int64, in the order of its files.
        refused: maps names of files that must not be read to the reasons; see ``Source``.
    """
    unread = dict(refused or {})

    def place(file: str) -> str:
        return file if remote_files.is_url(file) or os.path.isabs(file) else f"{root}/{file}"

    def image(file: str) -> bytes:
        """The bytes of a file, none if it cannot be read."""
        if refused and file in refused:
            return b""
        try:
            path = place(file)
            return remote_files.read(path) if remote_files.is_url(path) else _read_local(path)
        except Exception as error:  # stores raise errors of their own
            unread[file] = f"it cannot be read ({type(error).__name__}: {error})"
            return b""

    def examples(split_name: str, positions: np.ndarray) -> tf.data.Dataset:
        def read(at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            chosen = files[split_name][at]
            images = remote_files.in_parallel(image, chosen)
            # Arrays of objects: those of bytes drop zeros at the end.
            return (
                np.array(images, object),
                labels[split_name][at],
                np.array([*chosen.encoded()], object),
            )

        def example(at: tf.Tensor) -> dict[str, tf.Tensor]:
            parts = tf.numpy_function(read, [at], [tf.string, tf.int64, tf.string])
            for part in parts:
                part.set_shape([None])
            return dict(zip(("image", "label", "name"), parts, strict=True))

        return (
            tf.data.Dataset.from_tensor_slices(positions)
            .batch(_TOGETHER)
            .map(example, num_parallel_calls=2)  # requests go on while images are decoded
            .unbatch()
            .apply(tf.data.experimental.assert_cardinality(len(positions)))
        )

    @functools.cache
    def ids(split_name: str) -> np.ndarray:
        places = [place(file) for file in files[split_name]]
        urls = [path for path in places if remote_files.is_url(path)]
        states: dict[str, tuple[Any, ...]] = dict(zip(urls, remote_files.states(urls), strict=True))
        return joined(digest(path, *(states.get(path) or state_of(path))) for path in places)

    return Source(
        name,
        class_names,
        {split_name: len(names) for split_name, names in files.items()},
        examples,
        labels.__getitem__,
        files.__getitem__,
        ids,
        refused=unread,
    )


def _read_local(path: str) -> bytes:
    return image_files.read(Path(path))
