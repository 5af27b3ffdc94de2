"""Fine-tune a pretrained network on labelled images.

    vgg-transfer finetune
    vgg-transfer finetune photos --model vgg16 --preprocess caffe
    vgg-transfer finetune --dataset tf_flowers --freeze-until none

The first command fine-tunes the embedded model on the embedded digits; the README shows its output.
"""

from __future__ import annotations

import shlex

from recipes import console
from recipes.finetune_flags import DEFAULTS, FinetuneConfig
from recipes.image_flags import Images
from recipes.startup import job


def finetune(images: Images = None, /, config: FinetuneConfig = DEFAULTS) -> int:
    """Fine-tune a pretrained network on labelled images, and evaluate it."""
    config = config.with_images(images)
    with job(config.strategy) as replicas:
        from recipes.finetune_request import request
        from transfer.finetuning.run import run

        with console.resumable("finetune"), console.skip_suggested():
            result = run(request(config, replicas))
    if not result.metrics:
        return 0  # only the chief prints the results
    print(console.describe_accuracy(result.metrics["eval"], "held-out images"))
    print(result.run_dir)
    run_dir = shlex.quote(str(result.run_dir))
    console.suggest(
        f"evaluate {run_dir}",
        f"predict {run_dir} IMAGE ...",
        f"serve {run_dir}",
        f"export {run_dir}",
    )
    return 0
