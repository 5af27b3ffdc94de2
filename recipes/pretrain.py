"""Train a VGG from scratch and save it as a meta graph with its checkpoint and card.

The embedded model was made with

    vgg-transfer pretrain --dataset tiny_imagenet --data-dir DIR --licence MIT \
        --epochs 27 --small-epochs 14 --small-size 44 --fc-epochs 5

which takes about two hours on two cores. Its card says what it reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cyclopts import Parameter

from recipes import console
from recipes.startup import job


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Flags of ``vgg-transfer pretrain``, with their defaults."""

    arch: str = "vgg_small"
    """Architecture: vgg_small (64 px), vgg11, vgg13, vgg16 or vgg19 (224 px)."""
    dataset: str = "tiny_imagenet"
    """Name of a tfds dataset."""
    data_dir: str | None = None
    """Where tfds datasets are. [default: ~/tensorflow_datasets]"""
    image_folder: str | None = None
    """A folder of images per class, instead of a dataset."""
    train_split: str = "auto"
    """Split to train on, e.g. train[:90%]."""
    eval_split: str = "auto"
    """Split to evaluate on."""
    epochs: int = 30
    """Passes over the training images."""
    small_epochs: int = 0
    """How many of them, the first ones, see images of --small-size: half as many pixels, half the
    time."""
    small_size: int | None = None
    """Height and width of these images in pixels. The last pooling must make as much of them as of
    full-size ones: 33 to 64 pixels for vgg_small, 193 to 224 for the others."""
    fc_epochs: int = 0
    """Passes after these for fc6, fc7 and fc8 alone: begun anew, on convolutions that stay as they
    are, without dropout and mixup. Nearly as good at the task itself, and fc7 transfers better."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 0.05
    """Highest learning rate of SGD with momentum: reached after a warm-up of half an epoch, then
    lowered to zero along a cosine."""
    weight_decay: float = 5e-3
    """Decay of the kernels, times the learning rate per step. With momentum 0.9 it does what an L2
    penalty of a tenth of it does."""
    dropout: float = 0.2
    """Share dropped after fc6 and fc7 while training."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    mixup: float = 0.2
    """Train on mixtures of two images; parameter of the Beta distribution of their shares."""
    preprocess: str = "torch"
    """Input convention to train with: caffe, slim, torch, tf, unit or none."""
    augment: bool = True
    """Train on random shifts and flips."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    licence: str | None = None
    """Licence of the weights, for the card."""
    out: Path | None = None
    """Folder for the model, named after its architecture, and for the run.
    [default: runs/DATE-TIME-DATASET-ARCH]"""
    resume: bool = False
    """Continue the run in --out after its last complete epoch."""


def pretrain(config: PretrainConfig = PretrainConfig()) -> int:
    """Train a VGG from scratch and save it as a meta graph."""
    with job():
        from transfer.vgg.pretraining_run import run

        with console.resumable("pretrain"):
            figures, prefix = run(config)
    print(console.describe_accuracy(figures, "held-out images"))
    print(prefix)
    return 0
