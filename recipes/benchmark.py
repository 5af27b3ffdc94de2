"""Benchmark cuts of a model on a dataset: accuracy, time, memory and disk space.

    vgg-transfer benchmark
    vgg-transfer benchmark --model vgg16 --image-folder photos --cuts fc7,pool4,none --seeds 5
    vgg-transfer benchmark --dataset tf_flowers --epochs 5 --baseline keras
    vgg-transfer benchmark --precisions float32,int8,mixed_bfloat16
    vgg-transfer benchmark --grid "shots_per_class=5,20 freeze_until=tap,pool4,none" --seeds 5

Each run is a separate process, except with ``--grid`` and ``--precisions``. The flags of
``finetune`` apply to all runs.
"""

from __future__ import annotations

from recipes.benchmark_flags import DEFAULTS, BenchmarkConfig
from recipes.finetune_flags import DEFAULTS as FINETUNE
from recipes.finetune_flags import FinetuneConfig
from recipes.image_flags import Images
from recipes.startup import job


def benchmark(images: Images = None, /, config: BenchmarkConfig = DEFAULTS) -> int:
    """Compare frozen, partial and full fine-tuning, and training from scratch."""
    config = config.with_images(images)
    with job():
        from recipes import benchmark_job

        if config.precisions is not None:
            table, out, num_failed = benchmark_job.compare_precisions(config)
        elif config.grid is not None:
            table, out, num_failed = benchmark_job.run_grid(config)
        else:
            table, out, num_failed = benchmark_job.compare_cuts(config)
    print(table)
    print(out)
    return 1 if num_failed else 0


def benchmark_limits(config: FinetuneConfig = FINETUNE) -> int:
    """A process of benchmark: measure the machine's limits and write limits.json."""
    with job():
        from recipes.finetune_request import request
        from transfer.benchmarking import limits

        limits.measure(request(config))
    return 0


def keras_baseline(config: FinetuneConfig = FINETUNE) -> int:
    """A process of benchmark: fine-tune with keras.Model.fit; --freeze-until is tap or none."""
    with job():
        from recipes.finetune_request import request
        from transfer.benchmarking import keras_baseline as baseline

        baseline.keras_baseline(request(config))
    return 0
