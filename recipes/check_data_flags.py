"""Flags of ``vgg-transfer check-data``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CheckDataConfig:
    """Flags of ``vgg-transfer check-data``, with their defaults."""

    dataset: str | None = None
    """Name of a tfds dataset. [default: digits, which is embedded]"""
    data_dir: str | None = None
    """Directory of tfds datasets, or of one prepared dataset. [default: ~/tensorflow_datasets]"""
    image_folder: str | None = None
    """Folder with one subfolder of images per class, or with split folders that contain them;
    replaces --dataset."""
    csv: str | None = None
    """Manifest: a CSV, JSONL or Parquet file with the columns path and label, and optionally split
    and group; a file or an fsspec URL. Replaces --dataset."""
    group_by: str | None = None
    """What groups the images, e.g. by patient, camera or video: a column of the manifest, or a
    regular expression on the paths of an image folder, e.g. 'patient(\\d+)'. A group is either
    trained on or evaluated on. [default: the column group, if the manifest has one]"""
    train_split: str = "auto"
    """Split to train on."""
    eval_split: str = "auto"
    """Split to evaluate on; auto as in finetune."""
    model: str = "embedded"
    """Model whose features are used to find wrong labels; 'none' skips this check."""
    preprocess: str | None = None
    """Preprocessing that the weights expect. [default: the card's]"""
    show: int = 20
    """Findings of each kind to list; --json lists all."""
    json: Annotated[bool, Parameter(negative=())] = False
    """Print JSON."""
    strict: Annotated[bool, Parameter(negative=())] = False
    """Exit with status 1 if an image is unreadable, or in both splits."""


DEFAULTS = CheckDataConfig()
