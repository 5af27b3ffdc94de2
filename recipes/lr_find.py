"""Find a learning rate with a learning-rate range test: a short training with rising rates.

    vgg-transfer lr-find --dataset tf_flowers --freeze-until pool4

Takes the flags of ``finetune``; the trained weights are discarded.
"""

from __future__ import annotations

from dataclasses import replace

from recipes import console
from recipes.finetune_flags import DEFAULTS, FinetuneConfig
from recipes.flag_values import given_of
from recipes.image_flags import Images
from recipes.startup import job


def lr_find(
    images: Images = None,
    /,
    config: FinetuneConfig = DEFAULTS,
    *,
    lowest: float = 1e-7,
    highest: float = 1.0,
    steps: int = 100,
) -> int:
    """Suggest a learning rate for a fine-tuning run (learning-rate range test), with a plot.

    Args:
        lowest: Learning rate of the first step.
        highest: Learning rate of the last step.
        steps: Maximum number of steps.
    """
    config = config.with_images(images)
    with job():
        from recipes.finetune_request import request
        from transfer.finetuning.lr_find import find_learning_rate
        from transfer.runs import run_folder

        if given := given_of(config, strategy=("auto", "none")):
            raise ValueError(f"lr-find works on one device; leave out {given}")
        if given := given_of(config, "schedule", "resume", "lbfgs_c", solver=("auto", "gradient")):
            raise ValueError(f"lr-find tries one cut; leave out {given}")
        out = (config.out or run_folder.default_out("lr-find")).resolve()
        with console.skip_suggested():
            run_request = request(replace(config, out=out))
            test = find_learning_rate(run_request, lowest=lowest, highest=highest, steps=steps)
    print(f"--learning-rate {test.suggestion:g}")
    print(out)
    return 0
