"""Check a dataset for errors before training on it.

    vgg-transfer check-data --image-folder photos
    vgg-transfer check-data --dataset tf_flowers --data-dir data --json

Reports unreadable images, duplicates and near-duplicates (leakage between the two splits makes the
accuracy too high), probably wrong labels, rare and missing classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from recipes.startup import job


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


def check_data(config: CheckDataConfig = CheckDataConfig()) -> int:
    """Find unreadable, duplicate and probably mislabelled images, and rare classes."""
    with job():
        from recipes.check_data_job import run

        text, is_sound = run(config)
    print(text)
    return 1 if config.strict and not is_sound else 0
