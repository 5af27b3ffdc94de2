"""A study: fine-tuning runs for all combinations of options, in one process, and their results.

Each run has a folder named after its options, so that a study that is started again, or with more
values, repeats no finished run and mixes no runs of other options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transfer.benchmarking.content import check_content, content_of, keep_content
from transfer.benchmarking.grid import show_grid, show_value
from transfer.benchmarking.study_cells import inapplicable
from transfer.benchmarking.study_results import Outcome, Study, show_point
from transfer.core import measurement
from transfer.core.files import replacing
from transfer.evaluation.metrics import calibration_error
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest
from transfer.finetuning.run import run
from transfer.models import retention
from transfer.runs import run_folder
from transfer.runs.interruption import Interrupted

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions.npy"
"""Predicted classes of the held-out images, the last file of a run of a study."""
RUNS = "runs"
_MEASURED = "study"  # entry of metrics.json
# Options that say where and how often files are written. Results do not depend on them.
_PLACES = ("cache_dir", "cache_limit", "checkpoint_minutes")
_MAX_NAME, _MAX_MESSAGE = 100, 500  # characters
_DIGEST = 12  # characters


USED = ("epochs", "batch_size", "learning_rate", "label_smoothing")
"""Options whose defaults depend on the run; ``Outcome.used`` has the values that it used."""


def study(
    request: RunRequest,
    axes: Mapping[str, Sequence[Any]],
    out: str | Path,
    *,
    keep_models: bool = False,
    on_result: Callable[[Study], object] = lambda results: None,
) -> Study:
    """Do all runs of a study that are not finished yet, one after the other in this process.

    Args:
        request: as for ``fine_tune``; its ``options`` hold for all runs, except for the axes.
        axes: maps options of ``fine_tune`` to their values; see ``parse_grid``. Runs are done for
            all combinations, the values of the last axis in turn.
        out: folder of the study, new, empty, or that of a study to continue.
        keep_models: keep the models of the runs, not only their metrics and predictions.
        on_result: called with the results so far after each run that is done, also if it failed.

    Returns:
        The results. A run that fails is among the ``failures``, and the others are still done. A
        combination whose options exclude each other, such as ``solver="ridge"`` with a cut before
        the tap, is among the ``skipped``.

    Raises:
        ValueError, OSError: before the first run if no combination is possible, a value is invalid
            whatever the other options are, or the folder holds something else, or a study with
            other options outside the axes.
        Interrupted: on Ctrl-C or SIGTERM; a later call continues.

    Example:
        >>> from transfer import load_meta_graph, open_source
        >>> from transfer.benchmarking.study import study
        >>> from transfer.finetuning.options import FineTuneOptions
        >>> from transfer.finetuning.request import RunRequest
        >>> splits = open_source("digits").train_and_eval_splits()
        >>> options = FineTuneOptions(solver="lbfgs")
        >>> request = RunRequest(load_meta_graph("embedded"), *splits, options)
        >>> result = study(request, {"shots_per_class": [2, 5], "seed": [0]}, "runs/study")
        >>> [outcome.axes["shots_per_class"] for outcome in result.outcomes]
        [2, 5]
    """
    out = Path(out).resolve()
    listed = {name: list(values) for name, values in axes.items()}
    points = [
        dict(zip(listed, values, strict=True)) for values in itertools.product(*listed.values())
    ]
    reasons = inapplicable(request, points)
    held_out = request.held_out
    results = Study(listed, [], [], held_out.labels, held_out.groups)
    cells = []
    for point, reason in zip(points, reasons, strict=True):
        if reason is None:
            cells.append((point, dataclasses.replace(request.options, **point)))
        else:
            results.skipped.append((point, reason))
            logger.info(f"not applicable: {show_point(point)}: {reason}")
    num_classes = len(request.train.source.class_names)
    with _opened(out, request, listed, keep_models=keep_models):
        folders = _folders(out / RUNS, cells)
        num_open = sum(not _is_finished(folder) for folder in folders)
        seconds: list[float] = []  # of the runs that were done now
        for number, ((point, options), folder) in enumerate(zip(cells, folders, strict=True), 1):
            name, is_new = f"{number} of {len(cells)}", not _is_finished(folder)
            start, problem = time.perf_counter(), ""
            try:
                if is_new:
                    logger.info(f"{name}: {show_point(point)}{_time_left(seconds, num_open)}")
                    _do(dataclasses.replace(request, options=options, run_dir=folder), keep_models)
                results.outcomes.append(_outcome(point, folder, num_classes))
            except Interrupted as error:
                raise Interrupted(out, error.status - 128) from error
            except Exception as error:  # also those of resources, which other runs may not exhaust
                logger.debug(f"the run with {show_point(point)} failed", exc_info=True)
                problem = _message(error)
            if problem:
                logger.warning(f"the run with {show_point(point)} failed: {problem}")
                results.failures.append((point, problem))
                gc.collect()  # what the run held, now that its exception refers to it no more
            elif is_new:
                done = results.outcomes[-1]
                logger.info(f"  {name}: accuracy {done.accuracy:.4f} in {done.seconds:,.1f} s")
            if is_new:
                seconds.append(time.perf_counter() - start)
                on_result(results)
        _check_images(out, results.outcomes)
    return results


def _time_left(seconds: Sequence[float], num_open: int) -> str:
    """The time that the remaining runs take if they are like those before them, for a log line."""
    if not seconds:
        return ""
    left = sum(seconds) / len(seconds) * (num_open - len(seconds))
    shown = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min"
    return f" (about {shown if left < 7200 else f'{left / 3600:.1f} h'} left)"


def _message(error: Exception) -> str:
    """The first line of an error, with its kind unless that is usual."""
    line = (str(error).splitlines() or [""])[0]
    line = re.sub(r"^\{\{.*?\}\} ", "", line)[:_MAX_MESSAGE]  # TensorFlow's name of the operation
    if line and isinstance(error, ValueError | ArithmeticError | OSError):
        return line
    return f"{type(error).__name__}: {line}".removesuffix(": ")


@contextlib.contextmanager
def _opened(
    out: Path, request: RunRequest, axes: Mapping[str, Sequence[Any]], *, keep_models: bool = False
) -> Iterator[None]:
    has_begun = (out / run_folder.CONFIG).is_file()
    if has_begun and "grid" not in run_folder.read_config(out):
        raise FileExistsError(f"{str(out)!r} holds a run; choose another run_dir for the study")
    options = {name: value for name, value in vars(request.options).items() if name not in axes}
    config = {**request.origin, **options, "grid": show_grid(axes), "out": out}
    config |= {"feed": [*config.get("feed", ())], "keep_models": keep_models}
    content = content_of(request)
    if has_begun:
        check_content(out, content)
    else:
        run_folder.check(out, resume=False)
    names = [option.name for option in dataclasses.fields(FineTuneOptions)]
    free = ("grid", "keep_models", *content, *(name for name in names if name in axes), *_PLACES)
    fixed = {*run_folder.CHANGES_RESULT} - {*axes}
    # Studies of earlier versions did not record these, nor options that came later.
    recorded = {name: config.get(name, ()) for name in ("feed", "rename")}
    defaults = vars(FineTuneOptions()) | recorded
    with run_folder.opened(
        out, config, resume=has_begun, defaults=defaults, may_differ=free, fixed=fixed
    ):
        keep_content(out, content)
        yield


def _name(point: Mapping[str, Any], options: FineTuneOptions) -> str:
    """Name of the folder of a run: its place on the axes, and a digest of the options that are not
    the default, which is the same when there are more options."""
    defaults = vars(FineTuneOptions())
    matters = {
        name: str(value)
        for name, value in vars(options).items()
        if name not in _PLACES and value != defaults[name]
    }
    digest = hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()
    shown = "-".join(f"{name}={show_value(value)}" for name, value in point.items())
    safe = "".join(c if c.isalnum() or c in "=-_.," else "-" for c in shown)
    return f"{safe[:_MAX_NAME]}-{digest[:_DIGEST]}"


def _folders(runs: Path, cells: Sequence[tuple[dict[str, Any], FineTuneOptions]]) -> list[Path]:
    """The folder of each run. One that exists is found by its digest: the rest of its name is of
    the axes, which may have been others when it was done, or in another order."""
    known: dict[str, list[Path]] = {}
    for folder in sorted(runs.iterdir()) if runs.is_dir() else ():
        if folder.is_dir() and folder.name[-_DIGEST - 1 : -_DIGEST] == "-":
            known.setdefault(folder.name[-_DIGEST:], []).append(folder)
    chosen = []
    for point, options in cells:
        folder = runs / _name(point, options)
        same = [folder, *known.get(folder.name[-_DIGEST:], ())]
        begun = [it for it in same if (it / run_folder.CONFIG).is_file()]
        chosen.append(next((it for it in same if _is_finished(it)), (begun or same)[0]))
    return chosen


def _is_finished(folder: Path) -> bool:
    return (folder / PREDICTIONS).is_file()


def _do(request: RunRequest, keep_models: bool) -> None:
    """Do a run, or continue it if it was interrupted."""
    folder = request.run_dir
    assert folder is not None
    is_measured = measurement.reset_peak_rss()
    start = measurement.peak_rss_mb() if is_measured else None
    result = run(dataclasses.replace(request, resume=True))
    peak = result.metrics["memory"]["peak_rss_mb"] if is_measured else None
    error = calibration_error(result.logits, request.held_out.labels)
    measured = {"calibration_error": error, "peak_mb": peak, "start_mb": start}
    run_folder.add_to_metrics(folder, _MEASURED, measured)
    if not keep_models:
        retention.delete(folder / run_folder.MODEL)
        run_folder.remove(folder, only_working=True)
    predictions = result.logits.argmax(-1).astype(np.int32)
    del result
    gc.collect()  # the models of the run: their layers refer to each other
    with replacing(folder / PREDICTIONS) as path, path.open("wb") as file:
        np.save(file, predictions, allow_pickle=False)


def _outcome(point: dict[str, Any], folder: Path, num_classes: int) -> Outcome:
    metrics = run_folder.read_json(folder / run_folder.METRICS)
    evaluation, seconds, measured = metrics["eval"], metrics["time"], metrics[_MEASURED]
    scores = {"loss": evaluation["loss"], "calibration_error": measured["calibration_error"]}
    if "calibration" in metrics:  # the temperature was fitted to these images
        scores = metrics["calibration"].get("cross_fitted", dict.fromkeys(scores))
    config = run_folder.read_config(folder)
    training = run_folder.read_json(folder / run_folder.PROVENANCE)["dataset"].get("training", {})
    num_images = training.get("images")
    return Outcome(
        point,
        folder.name,
        evaluation["accuracy"],
        scores["loss"],
        scores["calibration_error"],
        seconds["total_s"],
        seconds["extract_s"],
        seconds["train_s"],
        measured["peak_mb"],
        np.load(folder / PREDICTIONS, allow_pickle=False),
        start_mb=measured.get("start_mb"),
        used={name: config.get(name) for name in USED},
        images_per_class=None if num_images is None else num_images / num_classes,
    )


def _check_images(out: Path, outcomes: Sequence[Outcome]) -> None:
    """Refuse to compare runs with different held-out images."""
    first: dict[str, Any] | None = None
    for outcome in outcomes:
        path = out / RUNS / outcome.run / run_folder.PROVENANCE
        images = run_folder.read_json(path)["dataset"]["held_out"]
        first = first or images
        if images != first:
            raise ValueError(
                f"the held-out images of {outcome.run!r} differ from those of "
                f"{outcomes[0].run!r}: the images changed between the runs; start a new study, in "
                "another run_dir"
            )
