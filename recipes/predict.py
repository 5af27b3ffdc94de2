"""Predict the classes of image files with a fine-tuned model.

    vgg-transfer predict RUN photo.jpg holiday/ 'scans/*.tif'
    find / -name '*.jpg' | vgg-transfer predict RUN - --format jsonl > predictions.jsonl

Results go to standard output. Images that cannot be read are reported on standard error, and the
exit status is then 1.
"""

from __future__ import annotations

import glob
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import CycloptsError, Parameter

from recipes import console, terminal
from recipes.flag_values import flag_of
from recipes.startup import job


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Flags of ``vgg-transfer predict``, with their defaults."""

    top_k: int = 3
    """Number of classes to show per image, most probable first."""
    format: Literal["table", "csv", "jsonl"] = "table"
    """csv: a row per image and class; jsonl: one JSON object per image and line."""
    batch_size: int = 32
    """Images per step."""
    abstain_below: float | None = None
    """Mark predictions whose probability is below this value, 0 to 1, as not sure; csv and jsonl
    have a column sure. The report of evaluate shows what a value gains, and evaluate --risk chooses
    one."""
    sets: bool = False
    """Add the set of classes of each image that contains its label with the probability of the last
    evaluate RUN --coverage; csv then has a row for each class of the set, and a column in_set."""
    unknown_score: Literal["feature_distance", "energy", "max_probability"] | None = None
    """Add an out-of-distribution score, higher for images that are less like the classes.
    feature_distance: cosine distance to the nearest class mean of the features, needs evaluate RUN
    --unknown; energy and max_probability depend on the logits only. No promise: the AUROC is shown
    that evaluate RUN --unknown measured."""
    probabilities: Path | None = None
    """File for the probabilities of all classes: a NumPy array (.npy, float32) with a row per image
    of the results and a column per line of labels.txt."""
    explain: Path | None = None
    """Folder for a Grad-CAM heat map per image, over the photo at its own resolution, named by its
    number in the results: red marks the region that explains the most probable class."""


def _no_option(_: type, words: str | Sequence[str]) -> None:
    """Refuse arguments that look like options; cyclopts passes one argument or all."""
    words = [words] if isinstance(words, str) else words
    if unknown := [word for word in words if word.startswith("--")]:
        known = [flag_of(option.name) for option in fields(PredictConfig)]
        hint = console.did_you_mean(unknown[0], known)
        raise CycloptsError(msg=f"Unknown option: {unknown[0]}.{hint}")


Images = Annotated[str, Parameter(allow_leading_hyphen=True, validator=_no_option)]  # "-" is one


def predict(run: Path, /, *images: Images, config: PredictConfig = PredictConfig()) -> int:
    """Predict the classes of images.

    Args:
        run: run folder of finetune, or checkpoint prefix of a fine-tuned model.
        images: files, folders, patterns such as '*.jpg', or - to read paths from standard input.
    """
    results = sys.stdout
    if config.format == "jsonl" or (config.format == "csv" and not results.isatty()):
        results = terminal.raw(results)  # file names unescaped, for programs
    num_done = num_failed = 0
    with job():
        from tqdm import tqdm

        from transfer.core import measurement
        from transfer.core.escapes import printable
        from transfer.evaluation import file_predictions
        from transfer.evaluation.prediction_writers import WRITERS

        def report(path: Path, error: Exception) -> None:
            nonlocal num_failed
            num_failed += 1
            bar.clear()
            terminal.say(f"error: {printable(path)}: {file_predictions.reason(error)}")
            bar.update()

        if not images:
            raise ValueError("no images are named; give files, folders, patterns, or - for a list")
        options = {k: v for k, v in vars(config).items() if k not in ("format", "sets")}
        options |= _recorded(run, config)
        predictions = file_predictions.predict(run, _paths(images), on_unreadable=report, **options)
        write = WRITERS[config.format](
            results,
            may_abstain=config.abstain_below is not None,
            has_sets=config.sets,
            has_scores=config.unknown_score is not None,
        )
        start = time.perf_counter()
        if console.verbosity() == 2:  # a line now and then, in place of the bar
            predictions = iter(measurement.progress(predictions, "predictions", "image"))
        with tqdm(
            unit="image",
            file=sys.stderr,
            mininterval=1.0,
            leave=False,
            disable=console.verbosity() != 1,
        ) as bar:
            for prediction in predictions:
                write(prediction)
                num_done += 1
                bar.update()
    if not num_done + num_failed:
        raise ValueError("no images were found")
    rate = num_done / (time.perf_counter() - start)
    failed = f", {num_failed} could not be read" if num_failed else ""
    console.say_unless_quiet(f"{num_done} images, {rate:.1f} images/s{failed}")
    return 1 if num_failed else 0


def _recorded(run: Path, config: PredictConfig) -> dict[str, Any]:
    """The options of the library that the last evaluation of the run determines."""
    from transfer.evaluation.metrics_text import describe_score, describe_sets
    from transfer.runs import uncertainty

    options: dict[str, Any] = {}
    if config.sets:
        sets = uncertainty.recorded_sets(run)
        options["set_threshold"] = sets["threshold"]
        console.say_unless_quiet(describe_sets(sets))
    if config.unknown_score is not None:
        if config.unknown_score == "feature_distance":
            options["class_means"] = uncertainty.recorded_class_means(run)
        measured = uncertainty.recorded_unknown(run)
        console.say_unless_quiet(describe_score(config.unknown_score, measured))
    return options


def _paths(words: Iterable[str]) -> Iterator[str | Path]:
    """What the arguments name: glob patterns are expanded, ``-`` reads one path per line from
    standard input."""
    for word in words:
        path = Path(os.path.expanduser(word))  # that of Path refuses ~name.jpg
        if word == "-":
            # As bytes: file names need not be UTF-8.
            lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
            yield from (line for line in lines if line.strip())
        elif path.exists() or not glob.has_magic(word):
            yield path
        else:
            found = map(Path, glob.iglob(str(path), recursive=True))
            # ** already matches the files inside folders.
            matches = (match for match in found if "**" not in word or not match.is_dir())
            yield next(matches, path)  # without a match, the pattern is reported as a missing file
            yield from matches
