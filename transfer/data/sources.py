"""Sources of labelled images: tfds datasets, prepared tfds directories, image folders."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from transfer.data.dataset import Source
from transfer.data.image_folder import open_image_folder
from transfer.data.tfds import tfds
from transfer.data.tfds_dataset import (
    from_builder,
    only_dataset_in,
    open_tfds,
    prepared_directory,
)

logger = logging.getLogger(__name__)


def open_source(
    dataset: str = "", *, data_dir: str | None = None, image_folder: str | None = None
) -> Source:
    """Open a dataset, and prepare it with tfds if necessary. Logs which files of a folder are
    ignored.

    Args:
        dataset: a tfds name such as ``tf_flowers`` or ``cmaterdb/telugu:1.0.0``, or ``digits``
            (embedded, needs no network). Optional if ``data_dir`` holds a single dataset.
        data_dir: directory of tfds datasets, prepared or to be prepared; or the directory of one
            prepared dataset. Default: that of tfds, ``~/tensorflow_datasets``.
        image_folder: a folder with one subfolder of images per class, or with split folders
            (``train``, ``test``, ...) that contain such subfolders. Excludes ``dataset``.

    Raises:
        ValueError, FileNotFoundError: if it cannot be found, is not an image classification
            dataset, or is neither prepared nor can be downloaded.

    Example:
        >>> from transfer import open_source
        >>> source = open_source("digits")
        >>> source.class_names[:3]
        ['0', '1', '2']
        >>> train, held_out = source.train_and_eval_splits()
        >>> len(train), len(held_out)
        (1438, 359)
    """
    source = _open(dataset, data_dir, image_folder)
    origin = {
        "dataset": dataset or (None if image_folder or data_dir else "digits"),
        "data_dir": _absolute(data_dir),
        "image_folder": _absolute(image_folder),
    }
    for line in source.passed_over.describe():
        logger.warning(line)
    return replace(source, origin=origin)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def _open(dataset: str, data_dir: str | None, image_folder: str | None) -> Source:
    if image_folder is not None:
        if dataset or data_dir:
            raise ValueError("give either an image folder or a dataset with its data dir, not both")
        return open_image_folder(Path(image_folder).expanduser())
    if data_dir is not None:
        directory = Path(data_dir).expanduser()
        if not directory.is_dir() and dataset != "digits":
            raise FileNotFoundError(f"data dir {str(directory)!r} does not exist")
        if prepared := prepared_directory(directory):
            builder = tfds.builder_from_directory(prepared)
            if dataset.split("/")[0].split(":")[0] not in ("", builder.name):
                raise ValueError(
                    f"data dir {str(directory)!r} is that of the dataset {builder.name!r}, "
                    f"not of {dataset!r}"
                )
            return from_builder(builder, dataset or builder.name)
        data_dir = str(directory)
        dataset = dataset or only_dataset_in(directory)
    return open_tfds(dataset or "digits", data_dir)
