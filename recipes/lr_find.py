"""Find a learning rate: a short trial with rising rates.

    vgg-transfer lr-find --dataset tf_flowers --freeze-until pool4

Takes the flags of ``finetune``; nothing that is trained is kept.
"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from recipes.finetune_flags import DEFAULTS, FinetuneConfig
from recipes.startup import job


def lr_find(
    config: FinetuneConfig = DEFAULTS,
    *,
    lowest: Annotated[float, Parameter(help="Learning rate of the first step.")] = 1e-7,
    highest: Annotated[float, Parameter(help="Learning rate of the last step.")] = 1.0,
    steps: Annotated[int, Parameter(help="Steps at most.")] = 100,
) -> int:
    """Find a learning rate for a fine-tuning run, with a plot."""
    with job():
        from recipes.lr_find_job import run

        found, out = run(config, lowest=lowest, highest=highest, steps=steps)
    print(f"--learning-rate {found:g}")
    print(out)
    return 0
