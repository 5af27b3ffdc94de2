"""Predict the classes of image files with a fine-tuned model.

    vgg-transfer predict RUN photo.jpg holiday/ 'scans/*.tif'
    find / -name '*.jpg' | vgg-transfer predict RUN - --format jsonl > predictions.jsonl

Results go to standard output; images that cannot be read are named on standard error, and the exit
status is 1 if there were any.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from recipes import terminal
from recipes.startup import job


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Flags of ``vgg-transfer predict``, with their defaults."""

    top_k: int = 3
    """Classes to show for each image, the most probable first."""
    format: Literal["table", "csv", "jsonl"] = "table"
    """csv: a row for each image and class; jsonl: an object a line for each image."""
    batch_size: int = 32
    """Images per step."""
    explain: Path | None = None
    """Folder for a picture of each image, named by its number in the results: the more red a part,
    the more it speaks for the most probable class (Grad-CAM)."""


def _no_option(_: type, words: str | Sequence[str]) -> None:
    """Refuse words that look like options; cyclopts passes one word or all."""
    words = [words] if isinstance(words, str) else words
    if unknown := [word for word in words if word.startswith("--")]:
        raise ValueError(f"unknown option: {unknown[0]}")


Images = Annotated[str, Parameter(allow_leading_hyphen=True, validator=_no_option)]  # "-" is one


def predict(run: Path, /, *images: Images, config: PredictConfig = PredictConfig()) -> int:
    """Predict the classes of images.

    Args:
        run: run folder of finetune, or prefix of a fine-tuned model.
        images: files, folders, patterns such as '*.jpg', or - for a list on standard input.
    """
    results = sys.stdout
    if config.format == "jsonl" or (config.format == "csv" and not results.isatty()):
        results = terminal.raw(results)  # names as they are, for programs
    with job():
        from recipes.predict_job import run as predict_run

        num_failed = predict_run(run, images, config, results)
    return 1 if num_failed else 0
