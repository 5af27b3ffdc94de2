"""Experiment trackers: the hyper-parameters and metrics of a run for MLflow, Weights & Biases and
TensorBoard's HParams dashboard.

A tracker that fails never ends a run: it is reported once and the run continues without it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import keras
import tensorflow as tf

from transfer.finetuning.context import RunContext
from transfer.runs import run_folder

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """A run of an experiment tracker; ``run_id`` identifies it for a resumed run."""

    run_id: str

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def upload(self, files: Sequence[Path]) -> None: ...

    def end(self, *, failed: bool) -> None: ...


class MlflowTracker:
    """A run of MLflow. Server and experiment are those of ``mlflow.set_tracking_uri``,
    ``mlflow.set_experiment`` or of MLflow's environment variables.

    Args:
        run_id: the run to continue; ``None`` begins one.
        name: name of a new run.
        params: hyper-parameters of a new run.
    """

    def __init__(self, run_id: str | None, name: str, params: Mapping[str, Any]):
        import mlflow

        self._mlflow = mlflow
        nested = mlflow.active_run() is not None  # the caller's own
        run = mlflow.start_run(run_id, run_name=None if run_id else name, nested=nested)
        self.run_id = run.info.run_id
        if run_id is None:
            try:
                mlflow.log_params(dict(params))
            except BaseException:
                mlflow.end_run("FAILED")
                raise

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step, run_id=self.run_id)

    def upload(self, files: Sequence[Path]) -> None:
        for file in files:
            self._mlflow.log_artifact(str(file), run_id=self.run_id)

    def end(self, *, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class WandbTracker:
    """A run of Weights & Biases. Project, mode and folder are those of its environment variables;
    the arguments are as for ``MlflowTracker``."""

    def __init__(self, run_id: str | None, name: str, params: Mapping[str, Any]):
        import wandb

        self._wandb, self._name = wandb, name
        self._run = wandb.init(
            id=run_id,
            name=name,
            config=dict(params),
            resume="allow",
            reinit="create_new",  # beside a run of the caller
        )
        self.run_id = self._run.id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def upload(self, files: Sequence[Path]) -> None:
        artifact = self._wandb.Artifact(re.sub(r"[^\w.-]", "-", self._name), type="run-folder")
        for file in files:
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def end(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


TRACKERS: dict[str, Callable[[str | None, str, Mapping[str, Any]], Tracker]] = {
    "mlflow": MlflowTracker,
    "wandb": WandbTracker,
}


def check_installed(name: str | None) -> None:
    """Refuse a tracker whose package is missing, before anything slow.

    Raises:
        ValueError: names the package to install.
    """
    if name is not None and importlib.util.find_spec(name) is None:
        raise ValueError(f"track={name} needs pip install 'vgg-transfer[{name}]'")


class RunTracking:
    """What a run tells its tracker.

    Args:
        context: the run; ``options.track`` names the tracker.
    """

    def __init__(self, context: RunContext):
        self._context = context
        self._name = context.options.track
        self._tracker: Tracker | None = None
        if self._name is not None and context.replicas.is_chief:
            with self._reported():
                self._begin(self._name)

    @property
    def callbacks(self) -> list[keras.callbacks.Callback]:
        """Callbacks that log the metrics of each epoch."""
        if self._tracker is None:
            return []
        log = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: self._log(logs, epoch + 1)
        )
        return [log]

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Log the final evaluation, and upload the files of the run folder if that was asked."""
        context = self._context
        history = run_folder.read_history(context.run_dir)
        if context.options.solver != "gradient":  # has no epochs, so no callbacks
            rows = {name: values[-1] for name, values in history.items() if name != "epoch"}
            self._log(rows, 1)
        scalars = {
            f"eval_{name}": value
            for name, value in metrics["eval"].items()
            if isinstance(value, int | float)
        }
        self._log(scalars, metrics["train"]["epochs"])
        if context.options.track_files:
            files = run_folder.files_of(context.run_dir)
            self._tell(lambda tracker: tracker.upload(files))

    def end(self, *, failed: bool) -> None:
        """Close the tracker's run."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with self._reported():
                tracker.end(failed=failed)

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        self._tell(lambda tracker: tracker.log(metrics, step))

    def _begin(self, name: str) -> None:
        context = self._context
        path = context.run_dir / run_folder.TRACKING
        ids = run_folder.read_json(path) if context.request.resume and path.is_file() else {}
        params = hyperparameters(context.config)
        tracker = TRACKERS[name](ids.get(name), context.run_dir.name, params)
        self._tracker = tracker
        run_folder.write_json(path, ids | {name: tracker.run_id})

    def _tell(self, action: Callable[[Tracker], None]) -> None:
        if self._tracker is not None:
            with self._reported():
                action(self._tracker)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Report an error of the tracker, whose run is then closed."""
        try:
            yield
        except Exception as error:  # of any kind: the packages raise their own, and the network's
            logger.warning(
                f"track={self._name} failed and is off for the rest of the run: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            )
            tracker, self._tracker = self._tracker, None
            if tracker is not None:
                # MLflow would take a run that stays open for the parent of the next one.
                with contextlib.suppress(Exception):
                    tracker.end(failed=True)


@contextlib.contextmanager
def tracked(context: RunContext) -> Iterator[RunTracking]:
    """The tracking of a run, which ends with it."""
    tracking = RunTracking(context)
    try:
        yield tracking
    except BaseException:
        tracking.end(failed=True)
        raise
    tracking.end(failed=False)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """A configuration as trackers take it: numbers, truth values and strings; without what is not
    set.

    Example:
        >>> from transfer.finetuning.tracking import hyperparameters
        >>> hyperparameters({"epochs": 5, "hidden": (64,), "schedule": None})
        {'epochs': 5, 'hidden': '(64,)'}
    """
    return {
        name: value if isinstance(value, bool | int | float) else str(value)
        for name, value in config.items()
        if value not in (None, ())
    }


def write_hparams(context: RunContext) -> None:
    """Write the hyper-parameters for TensorBoard's HParams dashboard, beside the metrics."""
    from tensorboard.plugins.hparams import api

    folder = context.run_dir / run_folder.EVENTS
    writer = tf.summary.create_file_writer(str(folder))
    with writer.as_default():
        api.hparams(hyperparameters(context.config))
    writer.close()
