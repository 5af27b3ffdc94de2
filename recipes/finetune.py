"""Fine-tune a pretrained network on labelled images.

    vgg-transfer finetune
    vgg-transfer finetune photos --model vgg16 --preprocess caffe
    vgg-transfer finetune --dataset tf_flowers --freeze-until none
    vgg-transfer finetune --add runs/photos --image-folder more

The first command fine-tunes the embedded model on the embedded digits; the README shows its output.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from recipes import console
from recipes.finetune_flags import DEFAULTS, FinetuneConfig
from recipes.flag_groups import GROUPS
from recipes.image_flags import Images
from recipes.startup import job

_MAX_CLASSES_SHOWN = 20


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
    print(console.describe_accuracy(result.metrics["eval"], "held-out images"))
    if "growth" in result.metrics:
        for line in _describe(result.metrics["growth"]):
            print(line)
    print(result.run_dir)
    run_dir = shlex.quote(str(result.run_dir))
    console.suggest(
        f"evaluate {run_dir}",
        f"predict {run_dir} IMAGE ...",
        f"serve {run_dir}",
        f"export {run_dir}",
    )
    return 0


def _describe(growth: dict[str, Any]) -> Iterator[str]:
    """Lines on what was added to a run, and on the accuracy of old and new classes."""
    images, old, new = growth["images"], growth["old_classes"], growth["new_classes"]
    known = f", {images['already_there']} were already there" if images["already_there"] else ""
    yield f"added {images['added']} images to {images['kept']} training images{known}"
    if old["num_examples"]:
        yield (
            f"old classes: accuracy {old['accuracy_before']:.4f} before, "
            f"{old['accuracy_after']:.4f} after, on the {old['num_examples']} images that "
            f"{growth['run']} held out"
        )
    tested = [entry for entry in old["classes"] if entry["num_examples"]]
    by_change = sorted(tested, key=lambda e: -abs(e["recall_after"] - e["recall_before"]))
    for entry in by_change[:_MAX_CLASSES_SHOWN]:
        yield (
            f"  {entry['name']}: {entry['recall_before']:.4f} before, {entry['recall_after']:.4f} "
            f"after, on {entry['num_examples']}"
        )
    if len(tested) > _MAX_CLASSES_SHOWN:
        yield f"  the other {len(tested) - _MAX_CLASSES_SHOWN} changed less; see metrics.json"
    if new["num_examples"]:
        yield f"new classes: accuracy {new['accuracy']:.4f} on {new['num_examples']} images"
    for entry in [entry for entry in new["classes"] if entry["num_examples"]][:_MAX_CLASSES_SHOWN]:
        yield f"  {entry['name']}: {entry['recall']:.4f} on {entry['num_examples']}"
