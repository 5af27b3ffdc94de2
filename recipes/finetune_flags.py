"""Flags of ``vgg-transfer finetune``. Imports no TensorFlow."""

# No `from __future__ import annotations`: flags of other verbs inherit from these, and the types
# are looked up in the modules of those.
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from transfer.finetuning.options import FineTuneOptions

EMBEDDED = "embedded"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(FineTuneOptions):
    """The options of ``fine_tune``, and flags for model, data and run folder."""

    model: str = EMBEDDED
    """Meta graph: checkpoint prefix, .meta, .index or .data file, V1 checkpoint, or a folder with
    one; or a frozen .pb, or a SavedModel. 'embedded' is the small VGG that comes with the
    project."""
    feed: tuple[str, ...] = ()
    """NAME=VALUE for a placeholder, e.g. Placeholder_2:0=1.0. Placeholders for dropout and training
    are found and set. Repeatable."""
    rename: tuple[str, ...] = ()
    """NAME=KEY where the checkpoint's keys differ from the graph's names by a rule, e.g.
    weights=kernel; an empty NAME stands for the beginning. Repeatable."""
    dataset: str | None = None
    """Name of a tfds dataset. [default: digits, which is embedded]"""
    data_dir: str | None = None
    """Where tfds datasets are, or the directory of one. [default: ~/tensorflow_datasets]"""
    image_folder: str | None = None
    """A folder with one folder of images per class, or with split folders of such, instead of a
    dataset."""
    train_split: str = "auto"
    """Split to train on, e.g. train[:80%]."""
    eval_split: str = "auto"
    """Split to evaluate on. auto: validation or test, else 20 % of each class, held out of
    train."""
    strategy: Literal["auto", "none", "mirrored", "multi_worker"] = "auto"
    """mirrored: all GPUs of this machine share each batch. multi_worker: the machines in TF_CONFIG
    do, each of which runs this command. auto: what is available."""
    deterministic: bool = False
    """Use only operations with reproducible results, where a GPU has faster ones. On a CPU the
    same flags give the same files anyway."""
    skip_unreadable: int = 0
    """Leave out up to this many images that cannot be decoded, and list them: all images are
    decoded once before the run. By default, one such image ends the run."""
    out: Path | None = None
    """Run folder. [default: runs/DATE-TIME-DATASET-CUT]"""
    resume: bool = False
    """Continue the run in --out: with the same flags, it ends as if it had never stopped."""

    def check(self) -> None:
        super().check()
        if self.skip_unreadable < 0:
            raise ValueError(f"skip_unreadable must be at least 0, got {self.skip_unreadable}")


DEFAULTS = FinetuneConfig()
