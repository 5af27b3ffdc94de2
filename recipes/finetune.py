"""Fine-tune a pretrained network on labelled images.

    vgg-transfer finetune
    vgg-transfer finetune photos --model vgg16 --preprocess caffe
    vgg-transfer finetune --dataset tf_flowers --freeze-until none
    vgg-transfer finetune --add runs/photos --image-folder more

The first command fine-tunes the embedded model on the embedded digits; the README shows its output.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from recipes import console
from recipes.finetune_flags import DEFAULTS, FinetuneConfig
from recipes.flag_groups import GROUPS
from recipes.image_flags import Images
from recipes.startup import job


def finetune(
    images: Images = None,
    /,
    config: FinetuneConfig = DEFAULTS,
    *,
    add: Annotated[Path | None, Parameter(group=GROUPS["Data"])] = None,
) -> int:
    """Fine-tune a pretrained network on labelled images, and evaluate it.

    Args:
        add: Folder of a finished run whose head was solved for: add the images, of new classes or
            of known ones, to its images, and solve for the head again. Model and options are those
            of the run, which is not changed.
    """
    config = config.with_images(images)
    with job(config.strategy) as replicas:
        from recipes.finetune_request import grown, request
        from transfer.finetuning.run import run

        with console.resumable("finetune"), console.skip_suggested():
            result = run(request(config, replicas) if add is None else grown(config, add, replicas))
    if not result.metrics:
        return 0  # only the chief prints the results
    print("\n".join(result.describe()))
    print(result.run_dir)
    run_dir = shlex.quote(str(result.run_dir))
    console.suggest(
        f"evaluate {run_dir}",
        f"predict {run_dir} IMAGE ...",
        f"serve {run_dir}",
        f"export {run_dir}",
    )
    return 0
