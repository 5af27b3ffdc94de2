"""Fine-tune a pretrained network on labelled images.

    vgg-transfer finetune
    vgg-transfer finetune --model vgg16 --preprocess caffe --image-folder photos
    vgg-transfer finetune --dataset tf_flowers --freeze-until none

The first command fine-tunes the embedded model on the embedded digits; the README shows its output.
"""

from __future__ import annotations

from recipes import console
from recipes.finetune_flags import DEFAULTS, FinetuneConfig
from recipes.startup import job


def finetune(config: FinetuneConfig = DEFAULTS) -> int:
    """Fine-tune a pretrained network on labelled images, and evaluate it."""
    with job(config.strategy) as replicas:
        from recipes.data_errors import skip_suggested
        from recipes.finetune_request import request
        from transfer.finetuning.run import run

        with console.resumable("finetune"), skip_suggested():
            result = run(request(config, replicas))
    if not result.metrics:
        return 0  # only the chief prints the results
    print(console.describe_accuracy(result.metrics["eval"], "held-out images"))
    print(result.run_dir)
    return 0
