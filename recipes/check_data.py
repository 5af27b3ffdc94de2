"""Look for what is wrong with a dataset before training on it.

    vgg-transfer check-data --image-folder photos
    vgg-transfer check-data --dataset tf_flowers --data-dir data --json

Unreadable images, the same picture twice (above all in both splits: then evaluation flatters),
labels that look wrong, rare and missing classes.
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
    """Where tfds datasets are, or the directory of one. [default: ~/tensorflow_datasets]"""
    image_folder: str | None = None
    """A folder of images per class, or of splits with such folders, instead of a dataset."""
    train_split: str = "auto"
    """Split to train on."""
    eval_split: str = "auto"
    """Split to evaluate on, as of finetune."""
    model: str = "embedded"
    """Whose features labels are judged by; 'none' leaves labels alone."""
    preprocess: str | None = None
    """What the weights expect. [default: the card's]"""
    show: int = 20
    """Findings of each kind to list; --json has all."""
    json: Annotated[bool, Parameter(negative=())] = False
    """Print JSON, for programs."""
    strict: Annotated[bool, Parameter(negative=())] = False
    """Exit with status 1 if an image is unreadable, or in both splits."""


def check_data(config: CheckDataConfig = CheckDataConfig()) -> int:
    """List unreadable, duplicate and mislabelled-looking images, and rare classes."""
    with job():
        from recipes.check_data_job import run

        text, is_sound = run(config)
    print(text)
    return 1 if config.strict and not is_sound else 0
