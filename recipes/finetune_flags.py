"""Flags of ``vgg-transfer finetune``. Imports no TensorFlow."""

# No `from __future__ import annotations`: flags of other subcommands inherit from these, and their
# types are looked up in the module of the subclass.
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from recipes.flag_groups import grouped
from recipes.image_flags import SplitFlags
from transfer.core.assignments import parse_feeds, parse_renames
from transfer.finetuning.options import FineTuneOptions

if TYPE_CHECKING:
    from transfer.models.meta_graph import MetaGraph

EMBEDDED = "embedded"


@grouped
@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(SplitFlags, FineTuneOptions):
    """The options of ``fine_tune``, and flags for model, data and run folder."""

    model: str = EMBEDDED
    """Pretrained model: a meta graph (checkpoint prefix, .meta, .index or .data file, V1
    checkpoint, or a folder with one), a frozen .pb, or a SavedModel. 'embedded' is the small VGG
    that comes with the package."""
    feed: tuple[str, ...] = ()
    """NAME=VALUE for a placeholder, e.g. Placeholder_2:0=1.0. Placeholders for dropout and training
    mode are detected and set. Repeatable."""
    rename: tuple[str, ...] = ()
    """NAME=KEY maps a part of the graph's variable names to the checkpoint's keys, e.g.
    weights=kernel; an empty NAME prepends KEY. Repeatable."""
    strategy: Literal["auto", "none", "mirrored", "multi_worker"] = "auto"
    """Distribution strategy. mirrored: all GPUs of this machine share each batch. multi_worker: the
    machines in TF_CONFIG share each batch; run this command on each of them. auto: what is
    available."""
    deterministic: bool = False
    """Use only deterministic operations, even where a GPU has faster ones. On a CPU the same flags
    always give the same files."""
    skip_unreadable: int = 0
    """Skip and list up to this many images that cannot be decoded; all images are decoded once
    before the run. By default, one such image stops the run."""
    out: Path | None = None
    """Run folder. [default: runs/DATE-TIME-DATASET-CUT, with the cut as in --freeze-until]"""
    resume: bool = False
    """Continue the interrupted run in --out; with the same flags, the result is identical to that
    of an uninterrupted run."""

    @property
    def feeds(self) -> dict[str, float | bool]:
        """The values of ``feed``, by name."""
        return parse_feeds(self.feed)

    def open_model(self) -> "MetaGraph":
        """Open the model; see ``transfer.load_meta_graph``, which imports TensorFlow."""
        from transfer.models.meta_graph import load_meta_graph

        return load_meta_graph(self.model, rename=parse_renames(self.rename))

    def check(self) -> None:
        super().check()
        if self.skip_unreadable < 0:
            raise ValueError(f"skip_unreadable must be at least 0, got {self.skip_unreadable}")


DEFAULTS = FinetuneConfig()
