"""Tables and files of a study."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from transfer.benchmarking.grid import show_value
from transfer.benchmarking.learning_curve import learning_curve
from transfer.benchmarking.study import USED
from transfer.benchmarking.study_results import (
    SEED,
    Row,
    Study,
    best_of,
    by_shots,
    show_point,
    summarized,
)
from transfer.benchmarking.study_tests import MAX_GROUP_TESTS, leaves_out_mcnemar, pairs
from transfer.core.csv_files import write_row
from transfer.core.files import replacing
from transfer.runs import run_folder

TABLE, SUMMARY, TESTS, CURVE = "runs.csv", "summary", "tests.csv", "learning_curve"
_MEASURED = (
    "accuracy",
    "log_loss",
    "calibration_error",
    "seconds",
    "extract_s",
    "train_s",
    "peak_mb",
    "start_mb",
)
_SUMMARIZED = ("accuracy", "log_loss", "calibration_error", "seconds", "train_s", "peak_mb")
_EXPLAINED = """\
sd: standard deviation over seeds; n: number of seeds. loss: log loss in nats; ECE: expected
calibration error, 15 bins; with calibrate, both are cross-fitted: each image with the temperature
of other images. seconds: the whole run, with its set-up, its evaluation and the activations that
were not in the cache yet, so that the first run that needs them takes longer; train s: training
alone. p: paired t test over the seeds against the row with the highest mean accuracy among those
with the same shots_per_class, not adjusted. tests.csv has all pairs with the same shots_per_class:
p_holm is adjusted for their number, the p-values of McNemar's exact test for each seed are not."""


def write(out: Path, study: Study) -> str:
    """Write all files to the folder of a study; returns the table to print, with notes.

    ``runs.csv`` has a row per run, ``summary.csv`` a row per combination of the other axes than the
    seed, ``summary.md`` and ``summary.tex`` the printed table, ``tests.csv`` the tests of all pairs
    of its rows, and ``learning_curve.png`` and ``.pdf`` the accuracy by ``shots_per_class``, if
    that has several values; otherwise those of an earlier call are deleted.
    """
    rows, tests = summarized(study), pairs(study)
    write_runs(out, study)
    _write_summary(out / f"{SUMMARY}.csv", study, rows)
    _write_tests(out / TESTS, study, tests)
    header, cells = _summary(study, rows, tests)
    notes = [_EXPLAINED]
    if leaves_out_mcnemar(study):
        notes.append(f"McNemar's tests are left out: more than {MAX_GROUP_TESTS:,} of groups.")
    problems = _problems(study)
    table = tabulate(cells, header, "github", disable_numparse=True)
    # In Markdown, each problem is a paragraph of its own.
    run_folder.write_text(out / f"{SUMMARY}.md", "\n\n".join([table, *notes, *problems]) + "\n")
    latex = tabulate(cells, header, "latex_booktabs", disable_numparse=True)
    comments = "".join(f"% {line}\n" for line in problems)
    run_folder.write_text(out / f"{SUMMARY}.tex", f"{latex}\n{comments}")
    figure = learning_curve(rows)
    for kind in ("png", "pdf"):
        if figure is None:  # that of an earlier grid would be taken for one of this
            (out / f"{CURVE}.{kind}").unlink(missing_ok=True)
        else:
            with replacing(out / f"{CURVE}.{kind}") as path:
                figure.savefig(path, format=kind, dpi=150)
    return "\n".join([table, "", *notes, *problems])


def write_runs(out: Path, study: Study) -> None:
    """Write ``runs.csv`` to the folder of a study: a row per run, finished ones first."""
    text = io.StringIO()
    used = [f"used_{name}" for name in USED]
    write_row(text, [*study.axes, *_MEASURED, *used, "run", "error"])
    for outcome in study.outcomes:
        measured = [getattr(outcome, name) for name in _MEASURED]
        resolved = [outcome.used.get(name) for name in USED]
        write_row(text, [*_cells(outcome.axes), *measured, *resolved, outcome.run, ""])
    for axes, message in study.failures:
        write_row(text, [*_cells(axes), *[""] * len(_MEASURED + USED), "", message])
    for axes, reason in study.skipped:
        error = f"not applicable: {reason}"
        write_row(text, [*_cells(axes), *[""] * len(_MEASURED + USED), "", error])
    run_folder.write_text(out / TABLE, text.getvalue())


def _problems(study: Study) -> list[str]:
    """A line per failed run, and per combination that is not applicable, whatever the seed."""
    failed = [f"failed: {show_point(axes)}: {message}" for axes, message in study.failures]
    skipped = []
    for axes, reason in study.skipped:
        shown = show_point({name: value for name, value in axes.items() if name != SEED})
        skipped.append(f"not applicable: {shown}: {reason}")
    return [*failed, *dict.fromkeys(skipped)]


def _summary(
    study: Study, rows: Sequence[Row], tests: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the summary."""
    p_values = _against_best(rows, tests)
    measured = ["accuracy", "sd", "loss", "sd", "ECE", "sd", "seconds", "train s", "p"]
    cells = []
    for row in rows:
        line = [show_value(row.axes[name]) for name in study.varied] + [str(len(row.outcomes))]
        for name in ("accuracy", "log_loss", "calibration_error"):
            line += [_number(row.mean(name)), _number(row.deviation(name))]
        line += [_number(row.mean(name), 1) for name in ("seconds", "train_s")]
        problem = row.problems[0].partition(":")[0] if row.problems else ""
        cells.append([*line, p_values.get(row.label, "") if row.outcomes else problem])
    return [*study.varied, "n", *measured], cells


def _against_best(rows: Sequence[Row], tests: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Maps the label of each row to its p-value against the best row with the same
    ``shots_per_class``, which is itself ``best``, unless it is the only one."""
    known = {(test["first"], test["second"]): test["p"] for test in tests}
    shown = {}
    for same in by_shots([*rows]):
        best = best_of(same).label
        for row in same:
            p = known.get((row.label, best), known.get((best, row.label)))
            shown[row.label] = "" if p is None else f"{p:.3g}"
        shown[best] = "best" if len(same) > 1 else ""
    return shown


def _number(value: float | None, digits: int = 4) -> str:
    """A number for the table; empty if it is unknown. Losses of runs that diverged are huge."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.4g}"


def _write_summary(path: Path, study: Study, rows: Sequence[Row]) -> None:
    names = [name for name in study.axes if name != SEED]
    seeds = sorted({seed for row in rows for seed in row.outcomes})
    text = io.StringIO()
    measured = [f"{name}_{kind}" for name in _SUMMARIZED for kind in ("mean", "sd")]
    of_seeds = [f"accuracy_seed_{seed}" for seed in seeds]
    write_row(text, [*names, "n", *measured, *of_seeds, "error"])
    for row in rows:
        values = [kind(name) for name in _SUMMARIZED for kind in (row.mean, row.deviation)]
        accuracies = [
            row.outcomes[seed].accuracy if seed in row.outcomes else None for seed in seeds
        ]
        cells = _cells({name: row.axes[name] for name in names})
        error = "; ".join(dict.fromkeys(row.problems))
        write_row(text, [*cells, len(row.outcomes), *values, *accuracies, error])
    run_folder.write_text(path, text.getvalue())


def _write_tests(path: Path, study: Study, tests: Sequence[Mapping[str, Any]]) -> None:
    seeds = sorted({seed for test in tests for seed in test["mcnemar"]})
    text = io.StringIO()
    axes = [(side, name) for side in ("a", "b") for name in study.varied]
    columns = ("n", "difference", "p", "p_holm")
    of_axes = [f"{side}_{name}" for side, name in axes]
    of_seeds = [f"mcnemar_p_seed_{seed}" for seed in seeds]
    write_row(text, ["first", "second", *of_axes, *columns, *of_seeds])
    for test in tests:
        points = [_cell(test[side][name]) for side, name in axes]
        values = [test[name] for name in columns]
        p_values = [test["mcnemar"].get(seed) for seed in seeds]
        write_row(text, [test["first"], test["second"], *points, *values, *p_values])
    run_folder.write_text(path, text.getvalue())


def _cells(axes: Mapping[str, Any]) -> list[Any]:
    return [_cell(value) for value in axes.values()]


def _cell(value: Any) -> Any:
    """Numbers stay numbers: the CSV writer would quote a negative one as text."""
    return value if isinstance(value, int | float) else show_value(value)
