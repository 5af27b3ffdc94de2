"""The learning curve of a study: accuracy by training images per class."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from transfer.benchmarking.grid import show_value
from transfer.benchmarking.study_results import SHOTS, Row

MAX_LINES = 12
_MARKERS = "osD^v<>PX*hp"


def learning_curve(rows: Sequence[Row]) -> Figure | None:
    """Accuracy by training images per class, with standard deviations over the seeds, one line per
    combination of the other axes, at most the ``MAX_LINES`` best ones.

    Runs on all images are at the mean number of images per class. ``None`` with fewer than two
    numbers of images, or if ``shots_per_class`` is not an axis.
    """
    known = [row for row in rows if SHOTS in row.axes and _images(row) is not None]
    if len({_images(row) for row in known}) < 2:
        return None
    lines: dict[str, list[Row]] = {}
    names = [name for name in known[0].axes if name != SHOTS]
    shown = [name for name in names if len({repr(row.axes[name]) for row in known}) > 1]
    for row in known:
        label = ", ".join(f"{name} {show_value(row.axes[name])}" for name in shown)
        lines.setdefault(label, []).append(row)
    for points in lines.values():
        points.sort(key=lambda row: _images(row) or 0)
    # Sorted by the accuracy with the most images; the order of the legend is that of the axes.
    ranked = sorted(lines, key=lambda label: -lines[label][-1].values("accuracy").mean())
    chosen = [label for label in lines if label in ranked[:MAX_LINES]]
    figure = Figure(figsize=(6, 4.3 + 0.22 * len(chosen)), layout="constrained")
    axes = figure.subplots()
    for number, label in enumerate(chosen):
        points = lines[label]
        deviations = [row.deviation("accuracy") or 0.0 for row in points]
        axes.errorbar(
            [_images(row) or 0 for row in points],
            [row.values("accuracy").mean() for row in points],
            deviations if any(deviations) else None,
            marker=_MARKERS[number],
            linestyle="-" if number < MAX_LINES // 2 else "--",
            capsize=3,
            label=label,
        )
    axes.set_xscale("log")
    ticks = {
        _images(row) or 0: f"all ({_images(row):.0f})" if row.shots is None else str(row.shots)
        for row in sorted(known, key=lambda row: row.shots is not None)
    }
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.set_xlabel("training images per class")
    axes.set_ylabel("accuracy on held-out images")
    missing = any(row.shots is None and _images(row) is None for row in rows if row.outcomes)
    axes.set_title(_title(known, len(chosen), len(lines), without_all=missing), fontsize="small")
    axes.grid(alpha=0.3)
    if any(lines):
        figure.legend(loc="outside lower center", fontsize="small")
    return figure


def _images(row: Row) -> float | None:
    """The mean number of training images per class; ``None`` if no run is finished, or if it is
    unknown."""
    if row.shots is not None and row.outcomes:
        return row.shots
    return row.mean("images_per_class")


def _title(rows: Sequence[Row], shown: int, total: int, *, without_all: bool) -> str:
    counts = sorted({len(row.outcomes) for row in rows})
    if counts == [1]:
        title = "one seed"
    else:
        number = counts[0] if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        title = f"mean and standard deviation over {number} seeds"
    if shown < total:
        title += f"; the {shown} best of {total} lines"
    if without_all:
        title += "; without runs on all images"
    return title
