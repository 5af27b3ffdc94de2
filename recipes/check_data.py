"""Check a dataset for errors before training on it.

    vgg-transfer check-data photos
    vgg-transfer check-data --dataset tf_flowers --data-dir data --json

Reports unreadable images, duplicates and near-duplicates (leakage between the two splits makes the
accuracy too high), probably wrong labels, rare and missing classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from recipes import console
from recipes.image_flags import Images, SplitFlags
from recipes.startup import job


@dataclass(frozen=True, kw_only=True)
class CheckDataConfig(SplitFlags):
    """Flags of ``vgg-transfer check-data``, with their defaults."""

    model: str = "embedded"
    """Model whose features are used to find wrong labels; 'none' skips this check."""
    preprocess: str | None = None
    """Preprocessing that the weights expect. [default: the card's]"""
    show: int = 20
    """Findings of each kind to list; --json lists all."""
    json: Annotated[bool, Parameter(negative=())] = False
    """Print JSON."""
    strict: Annotated[bool, Parameter(negative=())] = False
    """Exit with status 1 if an image is unreadable, or in both splits."""


def check_data(images: Images = None, /, config: CheckDataConfig = CheckDataConfig()) -> int:
    """Find unreadable, duplicate and probably mislabelled images, and rare classes."""
    config = config.with_images(images)
    with job():
        from transfer import load_meta_graph
        from transfer.core.measurement import progress
        from transfer.runs import data_report
        from transfer.runs.data_report_text import as_json, describe

        source = config.open()
        report = data_report.check_data(
            source,
            config.train_split,
            config.eval_split,
            graph=None if config.model == "none" else load_meta_graph(config.model),
            preprocess=config.preprocess,
            progress=lambda items, what: progress(
                items, what, "image" if what == "images" else "batch"
            ),
        )
    passed_over = source.passed_over if config.image_folder else None
    if config.json:
        print(json.dumps(as_json(report, passed_over), indent=2))
    else:
        print("\n".join(map(console.with_flags, describe(report, passed_over, config.show))))
    return 1 if config.strict and not report.is_sound else 0
