"""Estimate what a fine-tuning run would give and cost, before anything is trained.

    vgg-transfer plan photos --model vgg16 --preprocess caffe

Takes the flags of ``finetune``.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
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
    results = sys.stdout

    def show(lines: Iterable[str], command: str | None = None) -> None:
        for line in lines:
            is_command = command is not None and command in line  # with paths and values as given
            print(line if is_command else console.with_flags(line), file=results, flush=True)

    with job():
        from recipes.finetune_request import request
        from transfer.finetuning.forecast import describe, describe_trial, forecast, with_trial
        from transfer.runs import run_folder

        if given := given_of(config, strategy=("auto", "none")):
            raise ValueError(f"plan is for one device; leave out {given}")
        if config.out is not None:
            run_folder.check(config.out, resume=False)
        with console.skip_suggested():
            asked = request(replace(config, out=None))
            result = forecast(asked)
        command = recommended(config, result.options)
        show(describe(result, command), command)
        advised = result.options
        if replaced := {
            name: value
            for name, value in changed(config).items()
            if value != advised.get(name, value)
        }:
            words = shlex.join(words_of(replaced))
            show([f"  in place of {words}"], words)
        show(describe_trial(with_trial(result, asked, trial_minutes)))
    return 0


def recommended(config: FinetuneConfig, options: Mapping[str, Any]) -> str:
    """The command of ``finetune`` with the flags of ``plan`` and the recommended options."""
    flags = changed(replace(config, **options))
    return shlex.join(["vgg-transfer", "finetune", *words_of(flags)])
