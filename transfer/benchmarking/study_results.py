"""The results of a study: its runs, and the rows of its summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transfer.benchmarking.grid import show_value

SEED, SHOTS = "seed", "shots_per_class"


@dataclass(frozen=True)
class Outcome:
    """A finished run of a study.

    ``axes`` are its options on the axes; ``accuracy`` (0 to 1), ``log_loss`` (nats) and
    ``calibration_error`` (0 to 1) are those of the held-out images, and ``predictions`` their
    predicted classes, int ``[num_held_out]``. With ``calibrate``, the log loss and the calibration
    error are cross-fitted, each image with the temperature of other images; ``None`` if all images
    are of one group. Times are in seconds; ``seconds`` is the time of the whole run, ``extract_s``
    that of the activations at the cut, which later runs read from the cache. ``peak_mb`` is the
    peak memory of the process during the run and ``start_mb`` its memory before, with what earlier
    runs left; ``None`` if the system does not tell. ``used`` are options as the run resolved them,
    and ``images_per_class`` is the mean number of training images, ``None`` if it is unknown.
    """

    axes: dict[str, Any]
    run: str
    accuracy: float
    log_loss: float | None
    calibration_error: float | None
    seconds: float
    extract_s: float
    train_s: float
    peak_mb: float | None
    predictions: np.ndarray
    start_mb: float | None = None
    used: dict[str, Any] = field(default_factory=dict)
    images_per_class: float | None = None


@dataclass(frozen=True)
class Study:
    """The results of a study.

    ``labels`` (int ``[num_held_out]``) and ``groups`` (the same, or ``None``) are those of the
    held-out images; ``failures`` are the axes of failed runs with their messages, ``skipped`` those
    of combinations whose options exclude each other, with the reasons.
    """

    axes: dict[str, list[Any]]
    outcomes: list[Outcome]
    failures: list[tuple[dict[str, Any], str]]
    labels: np.ndarray
    groups: np.ndarray | None
    skipped: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    @property
    def varied(self) -> list[str]:
        """The axes with several values, without the seed."""
        return [name for name, values in self.axes.items() if len(values) > 1 and name != SEED]

    @property
    def problems(self) -> list[tuple[dict[str, Any], str]]:
        """The axes of all runs without an outcome, with messages that begin with ``failed`` or
        ``not applicable``."""
        failed = [(axes, f"failed: {message}") for axes, message in self.failures]
        return failed + [(axes, f"not applicable: {reason}") for axes, reason in self.skipped]


@dataclass(frozen=True)
class Row:
    """A combination of the axes other than the seed.

    ``outcomes`` maps a seed to its run; ``problems`` are the messages of the others.
    """

    axes: dict[str, Any]
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def values(self, name: str) -> np.ndarray:
        """A measured value of each run, float ``[num_seeds]``; NaN where it is unknown."""
        return np.array([getattr(outcome, name) for outcome in self.outcomes.values()], float)

    def mean(self, name: str) -> float | None:
        """The mean of a measured value; ``None`` if it is unknown."""
        values = self.values(name)
        return None if not len(values) or np.isnan(values).any() else float(values.mean())

    def deviation(self, name: str) -> float | None:
        """Standard deviation over the seeds, with n - 1; ``None`` for fewer than two seeds."""
        values = self.values(name)
        return None if len(values) < 2 or np.isnan(values).any() else float(values.std(ddof=1))

    @property
    def label(self) -> str:
        return " ".join(f"{name}={show_value(value)}" for name, value in self.axes.items())

    @property
    def shots(self) -> int | None:
        """``shots_per_class`` if it is an axis, and not the default."""
        shots: int | None = self.axes.get(SHOTS)
        return shots


def summarized(study: Study) -> list[Row]:
    """The rows of the summary in the order of the axes, also those without a finished run."""
    rows: dict[str, Row] = {}

    def row_of(point: Mapping[str, Any]) -> Row:
        axes = {name: value for name, value in point.items() if name != SEED}
        return rows.setdefault(repr(axes), Row(axes))

    for outcome in study.outcomes:
        row_of(outcome.axes).outcomes[outcome.axes.get(SEED, 0)] = outcome
    for point, message in study.problems:
        row_of(point).problems.append(message)
    places = {
        name: {repr(value): place for place, value in enumerate(values)}
        for name, values in study.axes.items()
    }
    return sorted(
        rows.values(), key=lambda row: [places[name][repr(row.axes[name])] for name in row.axes]
    )


def by_shots(rows: list[Row]) -> list[list[Row]]:
    """The rows with a finished run, those with the same ``shots_per_class`` together."""
    groups: dict[int | None, list[Row]] = {}
    for row in rows:
        if row.outcomes:
            groups.setdefault(row.shots, []).append(row)
    return list(groups.values())


def best_of(rows: list[Row]) -> Row:
    """The row with the highest mean accuracy."""
    return max(rows, key=lambda row: row.values("accuracy").mean())


def show_point(point: Mapping[str, Any]) -> str:
    """The place of a run on the axes, for messages."""
    return ", ".join(f"{name} {show_value(value)}" for name, value in point.items())
