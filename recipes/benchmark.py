"""Compare cuts: accuracy against time, memory and disk, for a model and a dataset.

    vgg-transfer benchmark
    vgg-transfer benchmark --model vgg16 --image-folder photos --cuts fc7,pool4,none --seeds 5
    vgg-transfer benchmark --dataset tf_flowers --epochs 5 --baseline keras

Each run is a process of its own. Takes the flags of ``finetune``, for all runs alike.
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
    """What to compare: tensors to freeze up to, none, and scratch (all is trained, from random
    weights), as in 'fc7,pool4,none'. [default: the tap, the two poolings in the middle of the
    network, none and scratch]"""
    seeds: int = 3
    """Runs of each, with --seed and the ones after it."""
    baseline: tuple[Literal["keras", "keras-onednn"], ...] = ()
    """Compare with keras.Model.fit on the same network and images, for as many epochs: with the
    backbone's trainable=False, and with all of it trained. keras-onednn: with oneDNN turned on,
    which is the default here and not in TensorFlow. May be given several times."""
    keep_models: bool = False
    """Keep the models of the runs, not only their figures."""


def benchmark(config: BenchmarkConfig = BenchmarkConfig()) -> int:
    """Compare frozen, partial and full fine-tuning, and training from scratch."""
    with job():
        from recipes.benchmark_job import run

        table, out, num_failed = run(config)
    print(table)
    print(out)
    return 1 if num_failed else 0
