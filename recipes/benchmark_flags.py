"""Flags of ``vgg-transfer benchmark``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.finetune_flags import FinetuneConfig
from recipes.flag_groups import grouped


@grouped
@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(FinetuneConfig):
    """Flags of ``vgg-transfer benchmark``, with their defaults."""

    cuts: str | None = None
    """Cuts to compare, separated by commas, e.g. 'fc7,pool4,none': tensors to freeze up to; tap (a
    head only); none (full fine-tuning); scratch (full training from random weights). [default: the
    tap, the two middle pooling layers, none and scratch]"""
    seeds: int = 3
    """Runs per cut, with consecutive seeds starting at --seed."""
    grid: str | None = None
    """A study instead of cuts: options with several values each, all combinations of which are run
    in this process, e.g. 'shots_per_class=5,20 tap=fc7,pool5 freeze_until=tap,none'. Values that
    contain commas are separated by |. Without an axis seed, --seeds applies. Started again with
    the same --out, finished runs are not repeated."""
    precisions: str | None = None
    """Precisions to compare instead of cuts, separated by commas, e.g.
    'float32,int8,mixed_bfloat16': images per second of a forward pass, relative to float32 and to
    the rate of matrix products in this precision, and the difference of the features. Nothing is
    trained."""
    baseline: tuple[Literal["keras", "keras-onednn"], ...] = ()
    """Also run keras.Model.fit on the same network, images and number of epochs: once with a
    frozen backbone (trainable=False), once with all of it trained. keras-onednn: with oneDNN
    enabled, as it is by default here but not in TensorFlow. Repeatable."""
    keep_models: bool = False
    """Keep the models of the runs, not only their metrics."""


DEFAULTS = BenchmarkConfig()
