"""Predict the classes of image files with a fine-tuned model.

    vgg-transfer predict RUN photo.jpg holiday/ 'scans/*.tif'
    find / -name '*.jpg' | vgg-transfer predict RUN - --format jsonl > predictions.jsonl

Results go to standard output. Images that cannot be read are reported on standard error, and the
exit status is then 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated

from cyclopts import CycloptsError, Parameter

from recipes import console, terminal
from recipes.predict_flags import DEFAULTS, PredictConfig
from recipes.startup import job


def _no_option(_: type, words: str | Sequence[str]) -> None:
    """Refuse arguments that look like options; cyclopts passes one argument or all."""
    words = [words] if isinstance(words, str) else words
    if unknown := [word for word in words if word.startswith("--")]:
        known = [console.flag_of(option.name) for option in fields(PredictConfig)]
        hint = console.did_you_mean(unknown[0], known)
        raise CycloptsError(msg=f"Unknown option: {unknown[0]}.{hint}")


Images = Annotated[str, Parameter(allow_leading_hyphen=True, validator=_no_option)]  # "-" is one


def predict(run: Path, /, *images: Images, config: PredictConfig = DEFAULTS) -> int:
    """Predict the classes of images.

    Args:
        run: run folder of finetune, or checkpoint prefix of a fine-tuned model.
        images: files, folders, patterns such as '*.jpg', or - to read paths from standard input.
    """
    results = sys.stdout
    if config.format == "jsonl" or (config.format == "csv" and not results.isatty()):
        results = terminal.raw(results)  # file names unescaped, for programs
    with job():
        from recipes.predict_job import run as predict_run

        num_failed = predict_run(run, images, config, results)
    return 1 if num_failed else 0
