"""Find a learning rate with a learning-rate range test: a short training with rising rates.

    vgg-transfer lr-find --dataset tf_flowers --freeze-until pool4

Takes the flags of ``finetune``; the trained weights are discarded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from cyclopts import Parameter

from recipes import console
from recipes.finetune_flags import DEFAULTS, FinetuneConfig
from recipes.image_flags import Images
from recipes.startup import job


def lr_find(
    images: Images = None,
    /,
    config: FinetuneConfig = DEFAULTS,
    *,
    lowest: Annotated[float, Parameter(help="Learning rate of the first step.")] = 1e-7,
    highest: Annotated[float, Parameter(help="Learning rate of the last step.")] = 1.0,
    steps: Annotated[int, Parameter(help="Maximum number of steps.")] = 100,
) -> int:
    """Suggest a learning rate for a fine-tuning run (learning-rate range test), with a plot."""
    config = config.with_images(images)
    with job():
        from recipes.finetune_request import request
        from transfer.finetuning.lr_find import find_learning_rate
        from transfer.runs import run_folder

        if config.strategy not in ("auto", "none"):
            raise ValueError("lr-find works on one device; leave out --strategy")
        if config.schedule is not None or config.solver in ("ridge", "lbfgs") or config.resume:
            raise ValueError("lr-find tries one cut; leave out --schedule, --solver and --resume")
        out = (config.out or run_folder.default_out("lr-find")).resolve()
        with console.skip_suggested():
            run_request = request(replace(config, out=out))
            test = find_learning_rate(run_request, lowest=lowest, highest=highest, steps=steps)
    print(f"--learning-rate {test.suggestion:g}")
    print(out)
    return 0
