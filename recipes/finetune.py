"""The main job: from a pretrained network and labelled images to a fine-tuned classifier.

    vgg-transfer finetune
    vgg-transfer finetune --model vgg16 --preprocess caffe --image-folder photos
    vgg-transfer finetune --dataset tf_flowers --freeze-until none

The first fine-tunes the embedded model on the embedded digits. The README says what to expect.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from recipes import measure
from recipes.startup import job

EMBEDDED = "embedded"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Flags of ``vgg-transfer finetune``, with their defaults."""

    model: str = EMBEDDED
    """Meta graph: prefix, .meta, .index or .data file, V1 checkpoint, or a folder with one; or a
    frozen .pb, or a SavedModel. 'embedded' is the small VGG that comes with the project."""
    tap: str | None = None
    """Tensor with the features; a short name will do. [default: the card's, else fc7]"""
    input: str | None = None
    """Tensor that takes the images. [default: the card's, else the one that fits]"""
    feed: tuple[str, ...] = ()
    """NAME=VALUE for any other placeholder, e.g. Placeholder_2:0=1.0; those for dropout and
    training are found and set. May be given several times."""
    keep_dropout: bool = False
    """Leave dropout on that the graph has always on. By default it is on in training only."""
    use_ema: bool = False
    """Start from the moving averages of the weights."""
    random_weights: bool = False
    """Start from random weights instead of the pretrained ones, to see what these are worth."""
    dataset: str | None = None
    """Name of a tfds dataset. [default: digits, which is embedded]"""
    data_dir: str | None = None
    """Where tfds datasets are, or the directory of one. [default: ~/tensorflow_datasets]"""
    image_folder: str | None = None
    """A folder of images per class, or of splits with such folders, instead of a dataset."""
    train_split: str = "auto"
    """Split to train on, e.g. train[:80%]."""
    eval_split: str = "auto"
    """Split to evaluate on. auto: validation or test, else 20 % of each class, held out of
    train."""
    shots_per_class: int | None = None
    """Train on so many images of each class only."""
    freeze_until: str = "tap"
    """Everything up to this tensor stays as it is: 'tap' (a new head on frozen features), any
    tensor between input and tap such as pool4, or 'none' (all is trained)."""
    epochs: int | None = None
    """Passes over the training images. [default: 50 where only the head is trained, else 10]"""
    batch_size: int = 32
    """Images per step."""
    image_size: int | None = None
    """Height and width in pixels. [default: what the model takes]"""
    preprocess: str | None = None
    """What the weights expect: caffe, slim, torch, tf, unit or none. [default: the card's]"""
    learning_rate: float | None = None
    """Of the head. [default: 0.0001; where only the head is trained, 0.006 for
    features with a root mean square of 1, more for smaller ones]"""
    backbone_lr_scale: float = 1.0
    """Learning rate of the backbone, as a share of the head's."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """sgd has momentum 0.9."""
    hidden: tuple[int, ...] = ()
    """Widths of hidden layers in the head. May be given several times."""
    dropout: float = 0.0
    """Share of the features dropped while training."""
    augment: bool = False
    """Train on random shifts and flips. Frozen features are then computed anew in each epoch."""
    max_to_keep: int = 0
    """Write the model after each epoch, too, as model-STEP, and keep so many of these."""
    keep_checkpoint_every_n_hours: float | None = None
    """With --max-to-keep: of those that would go, keep one for so many hours."""
    seed: int = 0
    """Seed of the head, the order, the few shots and the augmentation."""
    out: Path | None = None
    """Run folder. [default: runs/DATE-TIME-DATASET-CUT]"""
    resume: bool = False
    """Continue the run in --out after its last complete epoch."""


def cut_of(freeze_until: str) -> str | None:
    """The tensor to cut at; ``None`` where nothing is frozen."""
    return None if freeze_until == "none" else freeze_until


def finetune(config: FinetuneConfig = FinetuneConfig()) -> int:
    """Fine-tune a pretrained network on labelled images, and evaluate it."""
    with job():
        from recipes.finetune_job import run

        metrics, out = run(config)
    print(measure.describe_accuracy(metrics["eval"], "held-out images"))
    print(out)
    return 0


if __name__ == "__main__":
    from recipes.cli import main

    sys.exit(main(["finetune", *sys.argv[1:]]))
