"""Tables, tests and the learning curve of a study."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from tabulate import tabulate

from transfer.benchmarking.grid import show_value
from transfer.benchmarking.study import Outcome, Study
from transfer.core.csv_files import write_row
from transfer.core.files import replacing
from transfer.evaluation.metrics import compare
from transfer.runs import run_folder

TABLE, SUMMARY, TESTS, CURVE = "runs.csv", "summary", "tests.csv", "learning_curve"
SEED, SHOTS = "seed", "shots_per_class"
_MEASURED = (
    "accuracy",
    "log_loss",
    "calibration_error",
    "seconds",
    "extract_s",
    "train_s",
    "peak_mb",
)
_EXPLAINED = """\
sd: standard deviation over seeds; n: number of seeds. loss: log loss in nats; ECE: expected
calibration error, 15 bins. p: paired t test over the seeds against the row with the highest mean
accuracy. tests.csv has all pairs, with McNemar's exact test for each seed."""


@dataclass(frozen=True)
class Row:
    """A combination of the axes other than the seed; ``outcomes`` maps a seed to its run."""

    axes: dict[str, Any]
    outcomes: dict[int, Outcome]

    def values(self, name: str) -> np.ndarray:
        """A measured value of each run, float ``[num_seeds]``."""
        return np.array([getattr(outcome, name) for outcome in self.outcomes.values()], float)

    @property
    def label(self) -> str:
        return " ".join(f"{name}={show_value(value)}" for name, value in self.axes.items())


def summarized(study: Study) -> list[Row]:
    """The rows of the summary, in the order of the axes."""
    rows: dict[str, Row] = {}
    for outcome in study.outcomes:
        axes = {name: value for name, value in outcome.axes.items() if name != SEED}
        row = rows.setdefault(repr(axes), Row(axes, {}))
        row.outcomes[outcome.axes.get(SEED, 0)] = outcome
    return list(rows.values())


def paired_t_test(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray
) -> float | None:
    """Two-sided p-value of Student's paired t test.

    The Wilcoxon signed-rank test would need six seeds to reach 0.05 at all: with n pairs, its
    smallest two-sided p-value is 2^(1 - n).

    Args:
        first: one value per seed.
        second: the same for the other row.

    Returns:
        1 if all values are equal; ``None`` for fewer than two seeds, and if all differences are
        equal but not zero, as their variance is then unknown.
    """
    difference = np.subtract(first, second)
    if not difference.any() and len(difference) > 1:
        return 1.0
    if len(difference) < 2 or np.ptp(difference) < 1e-12:
        return None
    return float(stats.ttest_rel(first, second).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values adjusted for the number of tests by Holm's step-down method (jstor 4615733).

    ``None`` stays ``None``, and does not count as a test.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = highest
    return adjusted


def pairs(study: Study) -> list[dict[str, Any]]:
    """Tests of all pairs of rows, over the seeds that both have.

    Returns:
        For each pair ``first`` and ``second``, ``n`` (seeds), ``difference`` (mean accuracy of the
        first minus that of the second), ``p`` of the paired t test, ``p_holm``, adjusted for the
        number of pairs, and ``mcnemar``: maps each seed to the p-value of
        ``transfer.evaluation.metrics.compare`` on the held-out images.
    """
    results: list[dict[str, Any]] = []
    for first, second in itertools.combinations(summarized(study), 2):
        seeds = [seed for seed in first.outcomes if seed in second.outcomes]
        both = [(first.outcomes[seed], second.outcomes[seed]) for seed in seeds]
        if not seeds:
            continue
        ours, theirs = (
            np.array([run.accuracy for run in runs]) for runs in zip(*both, strict=True)
        )
        results.append(
            {
                "first": first.label,
                "second": second.label,
                "n": len(seeds),
                "difference": float(np.mean(ours - theirs)),
                "p": paired_t_test(ours, theirs),
                "mcnemar": {
                    seed: compare(a.predictions, b.predictions, study.labels, study.groups)[
                        "p_value"
                    ]
                    for seed, (a, b) in zip(seeds, both, strict=True)
                },
            }
        )
    for result, p in zip(results, holm([result["p"] for result in results]), strict=True):
        result["p_holm"] = p
    return results


def write(out: Path, study: Study) -> str:
    """Write all files to the folder of a study; returns the table to print.

    ``runs.csv`` has a row per run, ``summary.md`` and ``summary.tex`` the printed table,
    ``tests.csv`` the tests of all pairs of its rows, and ``learning_curve.png`` and ``.pdf`` the
    accuracy by ``shots_per_class``, if that has several values.
    """
    rows, tests = summarized(study), pairs(study)
    _write_runs(out / TABLE, study)
    _write_tests(out / TESTS, tests)
    printed = ""
    if rows:
        header, cells = _summary(study, rows, tests)
        printed = tabulate(cells, header, "github", disable_numparse=True)
        run_folder.write_text(out / f"{SUMMARY}.md", f"{printed}\n\n{_EXPLAINED}\n")
        latex = tabulate(cells, header, "latex_booktabs", disable_numparse=True)
        run_folder.write_text(out / f"{SUMMARY}.tex", f"{latex}\n")
    figure = learning_curve(rows)
    if figure is not None:
        for kind in ("png", "pdf"):
            with replacing(out / f"{CURVE}.{kind}") as path:
                figure.savefig(path, format=kind, dpi=150)
    lines = [printed, "", _EXPLAINED]
    for axes, message in study.failures:
        shown = ", ".join(f"{name} {show_value(value)}" for name, value in axes.items())
        lines.append(f"failed: {shown}: {message}")
    return "\n".join(lines)


def learning_curve(rows: Sequence[Row]) -> Figure | None:
    """Accuracy by training images per class, with standard deviations over the seeds, one line per
    combination of the other axes. ``None`` with fewer than two numbers of images."""
    known = [row for row in rows if row.axes.get(SHOTS) is not None]
    if len({row.axes[SHOTS] for row in known}) < 2:
        return None
    shown = _varying([{**row.axes, SHOTS: None} for row in known])
    lines: dict[str, list[Row]] = {}
    for row in known:
        label = ", ".join(f"{name} {show_value(row.axes[name])}" for name in shown)
        lines.setdefault(label, []).append(row)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        points.sort(key=lambda row: row.axes[SHOTS])
        means = [row.values("accuracy").mean() for row in points]
        deviations = [_deviation(row.values("accuracy")) or 0.0 for row in points]
        axes.errorbar(
            [row.axes[SHOTS] for row in points],
            means,
            deviations,
            marker="o",
            capsize=3,
            label=label,
        )
    axes.set_xscale("log")
    ticks = sorted({row.axes[SHOTS] for row in known})
    axes.set_xticks(ticks, [str(shots) for shots in ticks])
    axes.minorticks_off()
    axes.set_xlabel("training images per class")
    axes.set_ylabel("accuracy on held-out images")
    axes.grid(alpha=0.3)
    if any(lines):
        axes.legend()
    return figure


def _summary(
    study: Study, rows: Sequence[Row], tests: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the summary."""
    shown = _varying([row.axes for row in rows])
    best = max(rows, key=lambda row: row.values("accuracy").mean()).label
    against = {
        test["second"] if test["first"] == best else test["first"]: test["p"]
        for test in tests
        if best in (test["first"], test["second"])
    }
    header = [*shown, "n", "accuracy", "sd", "loss", "sd", "ECE", "sd", "seconds", "p"]
    cells = []
    for row in rows:
        line = [show_value(row.axes[name]) for name in shown] + [str(len(row.outcomes))]
        for name in ("accuracy", "log_loss", "calibration_error"):
            values = row.values(name)
            deviation = _deviation(values)
            line += [f"{values.mean():.4f}", "" if deviation is None else f"{deviation:.4f}"]
        p = against.get(row.label)
        line += [f"{row.values('seconds').mean():.1f}"]
        is_best = row.label == best and len(rows) > 1
        line += ["best" if is_best else "" if p is None else f"{p:.3g}"]
        cells.append(line)
    return header, cells


def _varying(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The axes with several values."""
    return [name for name in points[0] if len({point[name] for point in points}) > 1]


def _deviation(values: np.ndarray) -> float | None:
    """Standard deviation, with n - 1; ``None`` for a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _write_runs(path: Path, study: Study) -> None:
    text = io.StringIO()
    write_row(text, [*study.axes, *_MEASURED, "run", "error"])
    for outcome in study.outcomes:
        measured = [getattr(outcome, name) for name in _MEASURED]
        write_row(text, [*_cells(outcome.axes), *measured, outcome.run, ""])
    for axes, message in study.failures:
        write_row(text, [*_cells(axes), *[""] * len(_MEASURED), "", message])
    run_folder.write_text(path, text.getvalue())


def _write_tests(path: Path, tests: Sequence[Mapping[str, Any]]) -> None:
    seeds = sorted({seed for test in tests for seed in test["mcnemar"]})
    text = io.StringIO()
    columns = ("first", "second", "n", "difference", "p", "p_holm")
    write_row(text, [*columns, *(f"mcnemar_p_seed_{seed}" for seed in seeds)])
    for test in tests:
        write_row(text, [*(test[c] for c in columns), *(test["mcnemar"].get(s) for s in seeds)])
    run_folder.write_text(path, text.getvalue())


def _cells(axes: Mapping[str, Any]) -> list[Any]:
    """Numbers stay numbers: the CSV writer would quote a negative one as text."""
    return [v if isinstance(v, int | float) else show_value(v) for v in axes.values()]
