"""Add images to a finished run: ``grow``, and the request of the run that it performs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transfer.activations.fingerprints import remembered
from transfer.core import measurement
from transfer.core.assignments import parse_feeds, parse_renames
from transfer.core.distribution import Replicas
from transfer.data.dataset import Source, Split
from transfer.finetuning.options import OF_GRADIENT_DESCENT, FineTuneOptions, options_from
from transfer.finetuning.request import RunRequest
from transfer.finetuning.run import FineTuneResult, run
from transfer.models.meta_graph import MetaGraph, load_meta_graph
from transfer.runs import run_folder
from transfer.runs.growth import grown_splits

_FREE = ("cache", "cache_dir", "cache_limit", "track", "track_files", "calibrate")
"""Options that say where files are kept, and ``calibrate``; all others are those of the run."""
_OF_IMAGES = ("shots_per_class",)
_CUT = ("freeze_until", "schedule")


def grow(
    folder: str | Path,
    train: Split,
    held_out: Split,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    graph: MetaGraph | str | Path | None = None,
    feeds: Mapping[str, float | bool] | None = None,
    verbose: int = 0,
    replicas: Replicas | None = None,
    **options: Any,
) -> FineTuneResult:
    """Add images, of new classes or of known ones, to a finished run: solve for its head again on
    its images and the new ones, and write another run folder.

    ``vgg-transfer finetune --add`` is this function with flags. Model, tap, preprocessing and all
    other options are those of the run. Its classes keep their order, new ones follow. Its held-out
    images stay held out, and images that it already has are counted once. Activations of its images
    come from the activation cache, so that the network computes only the new ones.

    Args:
        folder: folder of a run whose head was solved for (``solver="ridge"`` or ``"lbfgs"``); its
            files are not changed.
        train: new training images; a split of a source from ``open_source``, which takes images of
            a single class with ``min_classes=1``.
        held_out: new images to evaluate on, from the same source and disjoint from ``train``.
        run_dir: folder of the new run, see ``fine_tune``.
        resume: continue the run in ``run_dir``, or start it if there is none.
        graph: the pretrained network of the run. Default: loaded from where the run had it.
        feeds: values of placeholders of the graph. Default: those of the run.
        verbose: see ``fine_tune``.
        replicas: devices and processes that train together; see ``open_replicas``.
        **options: where files are kept: ``cache``, ``cache_dir``, ``cache_limit``, ``track`` and
            ``track_files``; and ``calibrate``. Other options must be those of the run.

    Returns:
        The new run. ``metrics["growth"]`` has the accuracy of the old classes before and after, on
        the images that the run held out, and that of the new classes; see
        ``transfer.runs.growth.Growth.compare``.

    Raises:
        TypeError: for an unknown option.
        ValueError: if the run was trained by gradient descent or is not finished, an option differs
            from the run's, its images or its model are gone or have changed, or none of the images
            is new.
        FileNotFoundError: if there is no run, or the place of its images or its model is gone.

    Example:
        >>> from transfer import fine_tune, grow, open_source
        >>> source = open_source("digits")
        >>> some, held_out = source.train_and_eval_splits("train[:200]", "test[:50]")
        >>> first = fine_tune("embedded", some, held_out, run_dir="runs/before")
        >>> more = source.train_and_eval_splits("train[200:260]", "test[50:70]")
        >>> result = grow("runs/before", *more, run_dir="runs/after")
        >>> result.metrics["growth"]["images"]["added"]
        60
        >>> old = result.metrics["growth"]["old_classes"]
        >>> old["accuracy_before"] == first.metrics["eval"]["accuracy"]
        True
    """
    if graph is not None and not isinstance(graph, MetaGraph):
        graph = load_meta_graph(graph)
    return run(
        grown_request(
            Path(folder),
            train,
            held_out,
            options_from(options),
            graph=graph,
            feeds=feeds,
            run_dir=None if run_dir is None else Path(run_dir),
            resume=resume,
            verbose=verbose,
            replicas=replicas or Replicas(),
        )
    )


def grown_request(
    folder: Path,
    train: Split,
    held_out: Split,
    given: FineTuneOptions,
    *,
    graph: MetaGraph | None = None,
    feeds: Mapping[str, float | bool] | None = None,
    verbose: int = 0,
    **arguments: Any,
) -> RunRequest:
    """The request of ``grow``.

    Args:
        folder: folder of a finished run whose head was solved for.
        train: new training images.
        held_out: new images to evaluate on.
        given: options; those that differ from the defaults must be those of the run.
        graph: the pretrained network of the run, if it is no longer in its place.
        feeds: values of placeholders. Default: those of the run.
        verbose: see ``RunRequest``.
        **arguments: other arguments of ``RunRequest``.

    Raises:
        FileNotFoundError, ValueError: if the run cannot be added to, see ``grow``.
    """
    options = grown_options(folder, given)
    run_dir = arguments.get("run_dir")
    if run_dir is not None and Path(run_dir).resolve() == folder.resolve():
        raise ValueError(
            f"run_dir={run_dir} is the run that images are added to, which is not changed; name "
            "another folder"
        )
    if not (folder / run_folder.METRICS).is_file():
        raise ValueError(
            f"the run in {str(folder)!r} is not finished: it has no {run_folder.METRICS}; finish "
            "it with resume=True first"
        )
    settings = run_folder.read_config(folder)
    if graph is None:
        graph = _model(folder, settings)
    if not feeds:
        feeds = parse_feeds(settings.get("feed", ()))

    def remember(source: Source) -> contextlib.AbstractContextManager[None]:
        is_kept = options.cache == "disk"
        return remembered(source, options.cache_dir) if is_kept else contextlib.nullcontext()

    joined_train, joined_held_out, growth = grown_splits(
        folder,
        train,
        held_out,
        remember,
        (lambda it: measurement.progress(it, "images", "image")) if verbose else iter,
    )
    return RunRequest(
        graph,
        joined_train,
        joined_held_out,
        options,
        feeds=feeds,
        verbose=verbose,
        growth=growth,
        **arguments,
    )


def grown_options(folder: Path, given: FineTuneOptions) -> FineTuneOptions:
    """The options of a run, with those that were given for where files are kept, and with
    ``calibrate`` as it was given.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if it has no head that was solved for, or an option differs.
    """
    settings = run_folder.read_config(folder)
    solver = settings.get("solver", "gradient")
    if solver not in ("ridge", "lbfgs"):
        raise ValueError(
            f"the run in {str(folder)!r} was trained by gradient descent (solver={solver}, "
            f"freeze_until={settings.get('freeze_until')}), and images are added by solving for "
            "the head again; repeat it with solver=ridge, or start a new run on all images"
        )
    names = [option.name for option in dataclasses.fields(FineTuneOptions)]
    left_out = {*_FREE, *_OF_IMAGES, *_CUT, *OF_GRADIENT_DESCENT}
    kept = {name: settings[name] for name in names if name in settings and name not in left_out}
    options = FineTuneOptions(**kept, **{name: getattr(given, name) for name in _FREE})
    default = FineTuneOptions()

    def of_run(name: str) -> Any:
        return settings.get(name) if name in _CUT else getattr(options, name)

    conflicts = [
        f"{name}={getattr(given, name)} (the run has {of_run(name)})"
        for name in names
        if name not in _FREE and getattr(given, name) not in (getattr(default, name), of_run(name))
    ]
    if conflicts:
        raise ValueError(
            f"images are added to the run in {str(folder)!r} with its model and options; leave out "
            f"{', '.join(conflicts)}, or start a new run"
        )
    return options


def _model(folder: Path, settings: Mapping[str, Any]) -> MetaGraph:
    try:
        return load_meta_graph(settings["model"], rename=parse_renames(settings.get("rename", ())))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the model of the run in {str(folder)!r} is gone ({error}); say where it is now: "
            "graph=PATH"
        ) from error
