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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfer.benchmarking.content import check_content, content_of, keep_content
from transfer.benchmarking.grid import show_grid, show_value
from transfer.core import measurement
from transfer.core.files import replacing
from transfer.evaluation.metrics import calibration_error
from transfer.finetuning.model_plan import plan_model
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest
from transfer.finetuning.run import run
from transfer.finetuning.tap_choice import AUTO
from transfer.graph import cut
from transfer.images.preprocess import parse_size
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
_MAX_NAME = 100  # characters


@dataclass(frozen=True)
class Outcome:
    """A finished run of a study.

    ``axes`` are its options on the axes; ``accuracy`` (0 to 1), ``log_loss`` (nats) and
    ``calibration_error`` (0 to 1) are those of the held-out images, and ``predictions`` their
    predicted classes, int ``[num_held_out]``. Times are in seconds; ``seconds`` is the time of the
    whole run, ``extract_s`` that of the activations at the cut, which later runs read from the
    cache. ``peak_mb`` is the peak memory of the process during the run, ``None`` if the system does
    not tell.
    """

    axes: dict[str, Any]
    run: str
    accuracy: float
    log_loss: float
    calibration_error: float
    seconds: float
    extract_s: float
    train_s: float
    peak_mb: float | None
    predictions: np.ndarray


@dataclass(frozen=True)
class Study:
    """The results of a study.

    ``labels`` (int ``[num_held_out]``) and ``groups`` (the same, or ``None``) are those of the
    held-out images; ``failures`` are the axes of failed runs with their messages.
    """

    axes: dict[str, list[Any]]
    outcomes: list[Outcome]
    failures: list[tuple[dict[str, Any], str]]
    labels: np.ndarray
    groups: np.ndarray | None


def study(
    request: RunRequest,
    axes: Mapping[str, Sequence[Any]],
    out: str | Path,
    *,
    keep_models: bool = False,
) -> Study:
    """Do all runs of a study that are not finished yet, one after the other in this process.

    Args:
        request: as for ``fine_tune``; its ``options`` hold for all runs, except for the axes.
        axes: maps options of ``fine_tune`` to their values; see ``parse_grid``. Runs are done for
            all combinations, the values of the last axis in turn.
        out: folder of the study, new, empty, or that of a study to continue.
        keep_models: keep the models of the runs, not only their metrics and predictions.

    Raises:
        ValueError, OSError: before the first run if options are invalid, or the folder holds
            something else, or a study with other options outside the axes.
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
    _check(request, points)
    outcomes, failures = [], []
    with _opened(out, request, listed, keep_models=keep_models):
        for number, point in enumerate(points, 1):
            options = dataclasses.replace(request.options, **point)
            folder = out / RUNS / _name(point, options)
            shown = ", ".join(f"{name} {show_value(value)}" for name, value in point.items())
            is_new = not (folder / PREDICTIONS).is_file()
            try:
                if is_new:
                    logger.info(f"{number} of {len(points)}: {shown}")
                    _do(dataclasses.replace(request, options=options, run_dir=folder), keep_models)
            except Interrupted as error:
                raise Interrupted(out, error.status - 128) from error
            except (ValueError, ArithmeticError, OSError) as error:
                logger.warning(f"the run with {shown} failed: {error}")
                failures.append((point, str(error)))
                continue
            outcomes.append(_outcome(point, folder))
            if is_new:
                done = outcomes[-1]
                logger.info(f"  accuracy {done.accuracy:.4f} in {done.seconds:,.1f} s")
        _check_images(out, outcomes)
    held_out = request.held_out
    return Study(listed, outcomes, failures, held_out.labels, held_out.groups)


def _check(request: RunRequest, points: Sequence[Mapping[str, Any]]) -> None:
    """Refuse invalid options before the slow runs start."""
    seen = set()
    for point in points:
        options = dataclasses.replace(request.options, **point)
        options.check()
        size = None if options.image_size is None else parse_size(options.image_size)
        used = (options.tap, options.input, options.keep_dropout, options.freeze_until, size)
        if used in seen or options.schedule is not None or options.tap == AUTO:
            continue
        seen.add(used)
        planned = plan_model(request.graph, options, request.feeds)
        if options.freeze_until not in ("tap", "none"):
            own = {node.name for node in planned.network.graph_def.node}
            name = options.freeze_until
            try:
                cut(planned.network, name if name in own else request.graph.tensor(name))
            except ValueError as error:
                raise ValueError(f"tap={options.tap}, freeze_until={name}: {error}") from error


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
    return f"{safe[:_MAX_NAME]}-{digest[:12]}"


def _do(request: RunRequest, keep_models: bool) -> None:
    """Do a run, or continue it if it was interrupted."""
    folder = request.run_dir
    assert folder is not None
    is_measured = measurement.reset_peak_rss()
    result = run(dataclasses.replace(request, resume=True))
    peak = result.metrics["memory"]["peak_rss_mb"] if is_measured else None
    error = calibration_error(result.logits, request.held_out.labels)
    measured = {"calibration_error": error, "peak_mb": peak}
    run_folder.add_to_metrics(folder, _MEASURED, measured)
    if not keep_models:
        retention.delete(folder / run_folder.MODEL)
        run_folder.remove(folder, only_working=True)
    predictions = result.logits.argmax(-1).astype(np.int32)
    del result
    gc.collect()  # the models of the run: their layers refer to each other
    with replacing(folder / PREDICTIONS) as path, path.open("wb") as file:
        np.save(file, predictions, allow_pickle=False)


def _outcome(point: dict[str, Any], folder: Path) -> Outcome:
    metrics = run_folder.read_json(folder / run_folder.METRICS)
    evaluation, seconds, measured = metrics["eval"], metrics["time"], metrics[_MEASURED]
    return Outcome(
        point,
        folder.name,
        evaluation["accuracy"],
        evaluation["loss"],
        measured["calibration_error"],
        seconds["total_s"],
        seconds["extract_s"],
        seconds["train_s"],
        measured["peak_mb"],
        np.load(folder / PREDICTIONS, allow_pickle=False),
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
