"""Estimate what a fine-tuning run would give and cost, before anything is trained.

    vgg-transfer plan photos --model vgg16 --preprocess caffe

Takes the flags of ``finetune``.
"""

from __future__ import annotations

from dataclasses import replace

from recipes import console
from recipes.finetune_flags import DEFAULTS, FinetuneConfig
from recipes.image_flags import Images
from recipes.startup import job


def plan(images: Images = None, /, config: FinetuneConfig = DEFAULTS) -> int:
    """Estimate accuracy, time, memory and disk space of a run before it is started."""
    config = config.with_images(images)
    with job():
        from recipes.finetune_request import request
        from recipes.plan_job import describe
        from transfer.finetuning.forecast import forecast

        if config.strategy not in ("auto", "none"):
            raise ValueError("plan is for one device; leave out --strategy")
        with console.skip_suggested():
            lines = describe(forecast(request(replace(config, out=None))), config)
    print("\n".join(lines))
    return 0
