"""Estimate what a fine-tuning run would give and cost, before anything is trained.

    vgg-transfer plan photos --model vgg16 --preprocess caffe

Takes the flags of ``finetune``.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from recipes import console
from recipes.finetune_flags import DEFAULTS, FinetuneConfig
from recipes.flag_values import changed, given_of, words_of
from recipes.image_flags import Images
from recipes.startup import job


def plan(
    images: Images = None,
    /,
    config: FinetuneConfig = DEFAULTS,
    *,
    trial_minutes: float | None = None,
) -> int:
    """Estimate accuracy, time, memory and disk space of a run before it is started.

    Args:
        trial_minutes: Try full fine-tuning on some of the training images, and compare it with a
            head, if that takes at most this many minutes; 0 does not. [default: a tenth of the
            time of full fine-tuning, at most 10]
    """
    config = config.with_images(images)
    with job():
        from recipes.finetune_request import request
        from transfer.finetuning.forecast import describe, forecast

        if given := given_of(config, strategy=("auto", "none")):
            raise ValueError(f"plan is for one device; leave out {given}")
        with console.skip_suggested():
            result = forecast(request(replace(config, out=None)), trial_minutes)
        lines = describe(result, recommended(config, result.options))
    print("\n".join(map(console.with_flags, lines)))
    return 0


def recommended(config: FinetuneConfig, options: Mapping[str, Any]) -> str:
    """The command of ``finetune`` with the flags of ``plan`` and the recommended options."""
    flags = changed(replace(config, **options))
    return shlex.join(["vgg-transfer", "finetune", *words_of(flags)])
