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
from recipes.image_flags import Images
from recipes.startup import job


def benchmark(images: Images = None, /, config: BenchmarkConfig = DEFAULTS) -> int:
    """Compare frozen, partial and full fine-tuning, and training from scratch."""
    config = config.with_images(images)
    with job():
        if config.precisions is not None:
            from recipes.benchmark_precisions import run
        elif config.grid is None:
            from recipes.benchmark_job import run
        else:
            from recipes.benchmark_study import run

        table, out, num_failed = run(config)
    print(table)
    print(out)
    return 1 if num_failed else 0
