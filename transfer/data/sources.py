"""Sources of labelled images: tfds datasets, prepared directories, image folders, manifests."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transfer.data.dataset import Source
from transfer.data.groups import groups_by_pattern
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
    dataset: str = "",
    *,
    data_dir: str | Path | None = None,
    image_folder: str | Path | None = None,
    csv: str | Path | None = None,
    group_by: str | None = None,
    min_classes: int = 2,
) -> Source:
    r"""Open a dataset, and prepare it with tfds if necessary. Logs which files of a folder are
    ignored.

    Args:
        dataset: a tfds name such as ``tf_flowers`` or ``cmaterdb/telugu:1.0.0``, or ``digits``
            (embedded, needs no network). Optional if ``data_dir`` holds a single dataset.
        data_dir: directory of tfds datasets, prepared or to be prepared; or the directory of one
            prepared dataset. Default: that of tfds, ``~/tensorflow_datasets``.
        image_folder: a folder with one subfolder of images per class, or with split folders
            (``train``, ``test``, ...) that contain such subfolders. Excludes ``dataset``.
        csv: a manifest: a CSV, JSON Lines (``.jsonl``) or Parquet (``.parquet``) file with the
            columns ``path``, relative to the file, and ``label``, and optionally ``split``
            (``train``, ``test``, ...) and ``group``. The manifest and the images may be fsspec
            URLs, such as ``s3://bucket/labels.csv``. Excludes ``dataset`` and ``image_folder``.
        group_by: what groups the images, e.g. by patient, camera or video: the name of a column of
            the manifest (default: ``group``, if it has one), or for an image folder a regular
            expression that is searched for in the paths, such as ``patient(\d+)``. The images of a
            group stay on one side of the automatic hold-out and in one fold of cross-validations,
            and confidence intervals take groups as the units that are independent.
        min_classes: minimum number of classes; 1 opens the images of one class, which ``grow`` adds
            to those of a run.

    Raises:
        ValueError, FileNotFoundError: if it cannot be found, is not an image classification
            dataset, or is neither prepared nor can be downloaded; or if a manifest has errors.

    Example:
        >>> from transfer import open_source
        >>> source = open_source("digits")
        >>> source.class_names[:3]
        ['0', '1', '2']
        >>> train, held_out = source.train_and_eval_splits()
        >>> len(train), len(held_out)
        (1438, 359)
    """
    given: dict[str, str | Path | None] = {
        "dataset": dataset or None,
        "data_dir": data_dir,
        "image_folder": image_folder,
        "csv": csv,
    }
    _check_one(given)
    if group_by and csv is None and image_folder is None:
        raise ValueError(f"group_by={group_by} needs csv or image_folder")
    if csv is not None:
        from transfer.data.manifest import open_manifest  # half a second, for pyarrow

        location = manifest_location(csv)
        given["csv"] = location
        source = open_manifest(location, group_by)
    elif image_folder is not None:
        source = open_image_folder(Path(image_folder).expanduser(), min_classes)
        if group_by:
            names = {split: source.names(split) for split in source.sizes}
            groups = groups_by_pattern(group_by, names)
            source = replace(source, groups=groups.__getitem__)
    else:
        source = _open_dataset(dataset, data_dir)
        given["dataset"] = dataset or (None if data_dir else "digits")
    origin = given | {
        "data_dir": _absolute(data_dir),
        "image_folder": _absolute(image_folder),
        "group_by": group_by or source.origin.get("group_by"),
    }
    source.check_classes(min_classes)
    for line in source.passed_over.describe():
        logger.warning(line)
    return replace(source, origin=origin)


def manifest_location(csv: str | Path) -> str:
    """The absolute path of a manifest, or its URL if it is not a local file."""
    given = os.fspath(csv)
    local = given.removeprefix("file://")
    if "://" in local:
        return given
    path = Path(local).expanduser()
    return str(path.parent.resolve() / path.name)


def _check_one(given: Mapping[str, str | Path | None]) -> None:
    """Refuse more than one of image folder, manifest, and dataset with its data dir."""
    kinds = [name for name in ("image_folder", "csv") if given[name] is not None]
    kinds += [name for name in ("dataset", "data_dir") if given[name] is not None][:1]
    if len(kinds) > 1:
        both = " and ".join(f"{name}={given[name]}" for name in kinds)
        raise ValueError(f"{both} exclude each other: images come from one place; give one of them")


def _absolute(path: str | Path | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def _open_dataset(dataset: str, data_dir: str | Path | None) -> Source:
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
