"""Benchmark cuts of a model on a dataset: accuracy, time, memory and disk space.

    vgg-transfer benchmark
    vgg-transfer benchmark --model vgg16 --image-folder photos --cuts fc7,pool4,none --seeds 5
    vgg-transfer benchmark --dataset tf_flowers --epochs 5 --baseline keras

Each run is a separate process. The flags of ``finetune`` apply to all runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cyclopts import Parameter

from recipes.finetune_flags import FinetuneConfig
from recipes.startup import job


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(FinetuneConfig):
    """Flags of ``vgg-transfer benchmark``, with their defaults."""

    cuts: str | None = None
    """Cuts to compare, separated by commas, e.g. 'fc7,pool4,none': tensors to freeze up to; none
    (full fine-tuning); scratch (full training from random weights). [default: the tap, the two
    middle pooling layers, none and scratch]"""
    seeds: int = 3
    """Runs per cut, with consecutive seeds starting at --seed."""
    baseline: tuple[Literal["keras", "keras-onednn"], ...] = ()
    """Also run keras.Model.fit on the same network, images and number of epochs: once with a
    frozen backbone (trainable=False), once with all of it trained. keras-onednn: with oneDNN
    enabled, as it is by default here but not in TensorFlow. Repeatable."""
    keep_models: bool = False
    """Keep the models of the runs, not only their metrics."""


def benchmark(config: BenchmarkConfig = BenchmarkConfig()) -> int:
    """Compare frozen, partial and full fine-tuning, and training from scratch."""
    with job():
        from recipes.benchmark_job import run

        table, out, num_failed = run(config)
    print(table)
    print(out)
    return 1 if num_failed else 0
