"""The processes that ``vgg-transfer benchmark`` starts besides ``finetune``: hidden commands."""

from __future__ import annotations

from recipes.finetune_flags import DEFAULTS, FinetuneConfig
from recipes.startup import job


def benchmark_limits(config: FinetuneConfig = DEFAULTS) -> int:
    """Measure the machine's limits and write limits.json."""
    with job():
        from recipes.finetune_request import request
        from transfer.benchmarking import limits

        limits.measure(request(config))
    return 0


def keras_baseline(config: FinetuneConfig = DEFAULTS) -> int:
    """Fine-tune with keras.Model.fit; --freeze-until is tap or none."""
    with job():
        from recipes.finetune_request import request
        from transfer.benchmarking import keras_baseline as baseline

        baseline.keras_baseline(request(config))
    return 0
