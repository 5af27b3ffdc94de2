"""Check a dataset for errors before training on it.

    vgg-transfer check-data photos
    vgg-transfer check-data --dataset tf_flowers --data-dir data --json

Reports unreadable images, duplicates and near-duplicates (leakage between the two splits makes the
accuracy too high), probably wrong labels, rare and missing classes.
"""

from __future__ import annotations

from recipes.check_data_flags import DEFAULTS, CheckDataConfig
from recipes.image_flags import Images
from recipes.startup import job


def check_data(images: Images = None, /, config: CheckDataConfig = DEFAULTS) -> int:
    """Find unreadable, duplicate and probably mislabelled images, and rare classes."""
    config = config.with_images(images)
    with job():
        from recipes.check_data_job import run

        text, is_sound = run(config)
    print(text)
    return 1 if config.strict and not is_sound else 0
