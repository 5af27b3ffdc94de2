"""The main job: from a pretrained network and labelled images to a fine-tuned classifier.

    vgg-transfer finetune
    vgg-transfer finetune --model vgg16 --preprocess caffe --image-folder photos
    vgg-transfer finetune --dataset tf_flowers --freeze-until none

The first fine-tunes the embedded model on the embedded digits. The README says what to expect.
"""

# No `from __future__ import annotations`: flags of other verbs inherit from these, and the types
# would be looked up in their modules.
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
    rename: tuple[str, ...] = ()
    """NAME=KEY where the checkpoint's keys differ from the graph's names by a rule, e.g.
    weights=kernel; an empty NAME stands for the beginning. May be given several times."""
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
    schedule: str | None = None
    """Several cuts in one run, each with its epochs and, if it is to be another than the default,
    its learning rate: 'fc7:20,pool4:5:0.0002,none:3'. Instead of --freeze-until and --epochs."""
    epochs: int | None = None
    """Passes over the training images. [default: as many as make about 2000 steps where only the
    head is trained, and 900 otherwise; at least 5 and 3, at most 200 and 60]"""
    batch_size: int | None = None
    """Images per step. [default: 32, or all where there are fewer]"""
    image_size: int | str | None = None
    """In pixels: one number, or HEIGHTxWIDTH, e.g. 100x200. [default: what the model takes]"""
    preprocess: str | None = None
    """What the weights expect: caffe, slim, torch, tf, unit or none. [default: the card's]"""
    solver: Literal["gradient", "lbfgs"] = "gradient"
    """lbfgs solves for the head exactly: scikit-learn's logistic regression on standardised
    features. For a frozen backbone and a head without hidden layers."""
    lbfgs_c: float | None = None
    """Inverse strength of its L2 penalty. [default: chosen by cross-validation]"""
    optimizer: Literal["adam", "sgd"] = "adam"
    """sgd has momentum 0.9."""
    learning_rate: float | None = None
    """Of the head. [default: 0.006 for up to 512 features with a root mean square of 1, more for
    smaller ones, less for more of them; 0.0001 where more than the head is trained and --schedule
    or --backbone-lr-scale is given]"""
    lr_schedule: Literal["auto", "constant", "cosine"] = "auto"
    """cosine lowers it to zero. auto: constant where only the head is trained, else cosine."""
    warmup_epochs: float = 0.5
    """With cosine: it rises from zero for so long, at most a tenth of the steps."""
    backbone_lr_scale: float | None = None
    """Learning rate of the backbone, as a share of the head's. [default: what makes it 0.0001 where
    --learning-rate and --schedule are left out, else 1]"""
    block_lr_decay: float = 1.0
    """Each block further from the head has its learning rate times this."""
    weight_decay: float = 0.0
    """Decay of the kernels, times the learning rate per step; biases have none."""
    clip_norm: float | None = None
    """Largest norm of a step's gradients, all together."""
    accumulate: int = 1
    """Steps whose gradients are averaged for one update."""
    early_stopping: int | None = None
    """Stop after so many epochs without a lower loss on the images that are evaluated on, and go
    back to the best weights. The accuracy on these images is then a little flattered."""
    hidden: tuple[int, ...] = ()
    """Widths of hidden layers in the head. May be given several times."""
    dropout: float = 0.0
    """Share of the features dropped while training."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    mixup: float = 0.0
    """Train on mixtures of two examples; parameter of the Beta distribution of their shares, e.g.
    0.2. Above a cut, activations are mixed."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a class counts the more the rarer it is."""
    augment: bool = False
    """Train on random shifts and flips, new ones in each epoch. What is frozen is then computed in
    each epoch, too, unless there are --views."""
    views: int = 0
    """Train on so many random views of each image, whose activations are kept."""
    cache: Literal["disk", "memory", "off"] = "disk"
    """Where the activations at the cut are kept, once computed. disk: for later runs, too."""
    cache_dir: Path | None = None
    """Folder of the activations. [default: vgg-transfer in the user's folder for caches]"""
    cache_limit: float = 20.0
    """Largest size of that folder in GB; what was not used for longest makes room."""
    cache_dtype: Literal["float32", "float16"] = "float32"
    """float16 takes half of the room, and keeps three digits."""
    max_to_keep: int = 0
    """Write the model after each epoch, too, as model-STEP, and keep so many of these."""
    keep_checkpoint_every_n_hours: float | None = None
    """With --max-to-keep: of those that would go, keep one for so many hours."""
    checkpoint_minutes: float = 10.0
    """Within a long epoch, write a checkpoint so often; there is one after each epoch anyway."""
    strategy: Literal["auto", "none", "mirrored", "multi_worker"] = "auto"
    """mirrored: all GPUs of this machine share each batch. multi_worker: so do the machines that
    the variable TF_CONFIG names, each of which runs this command. auto: what there is."""
    deterministic: bool = False
    """Use only operations that always give the same bits, where a GPU has quicker ones. On a CPU
    the same flags give the same files anyway."""
    skip_unreadable: int = 0
    """Leave out up to this many images that cannot be decoded, and list them: all images are
    decoded once before the run. By default, one such image ends the run."""
    seed: int = 0
    """Seed of the head, the order, the few shots and the augmentation."""
    out: Path | None = None
    """Run folder. [default: runs/DATE-TIME-DATASET-CUT]"""
    resume: bool = False
    """Continue the run in --out where it was: with the same flags, it ends as if it had never
    stopped."""


DEFAULTS = FinetuneConfig()


def cut_of(freeze_until: str) -> str | None:
    """The tensor to cut at; ``None`` where nothing is frozen."""
    return None if freeze_until == "none" else freeze_until


def finetune(config: FinetuneConfig = DEFAULTS) -> int:
    """Fine-tune a pretrained network on labelled images, and evaluate it."""
    with job(config.strategy) as replicas:
        from recipes.finetune_job import run

        metrics, out = run(config, replicas)
    if not metrics:
        return 0  # the chief says it
    print(measure.describe_accuracy(metrics["eval"], "held-out images"))
    print(out)
    return 0


if __name__ == "__main__":
    from recipes.cli import main

    sys.exit(main(["finetune", *sys.argv[1:]]))
