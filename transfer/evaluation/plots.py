"""Plots of an evaluation.

Each function returns a title, an alternative text and the Matplotlib figure; or ``None`` if there
is nothing to plot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from transfer.evaluation import metrics

Plot: TypeAlias = tuple[str, str, Figure]
# Colour-blind safe palette of Okabe and Ito.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_MAX_NAMES = 40  # more names are not legible
_MAX_NAME_LENGTH = 24  # characters, in plots
_MAX_CELLS = 200  # rows of a matrix; more are smaller than four pixels
_MAX_CLUSTERED = 5000  # classes; the distances of 5,000 have 100 MB
_MAX_OPTIMAL = 500  # classes; the optimal order of 1,000 takes seconds


def learning_curves(history: dict[str, list[float]]) -> Plot | None:
    """Training and held-out loss and accuracy by epoch."""
    if len(history.get("epoch", [])) < 2:
        return None
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        epochs = [epoch + 1 for epoch in history["epoch"]]
        axes.plot(epochs, history[name], color=_BLUE, label="training")
        axes.plot(epochs, history[f"val_{name}"], color=_ORANGE, label="held out")
        axes.set_xlabel("epoch")
        axes.set_ylabel(name if name == "accuracy" else "loss (nats)")
        axes.grid(alpha=0.3)
        axes.legend()
    last = {name: values[-1] for name, values in history.items()}
    text = (
        f"After {len(epochs)} epochs the loss is {last['loss']:.3f} in training and "
        f"{last['val_loss']:.3f} on held-out images."
    )
    return "Learning curves", text, figure


def confusion(class_names: Sequence[str], counts: np.ndarray) -> Plot | None:
    """Confusion matrix: rows are labels, columns are predictions, colours are row fractions.

    With more classes than can be named, they are in an order that puts confused classes side by
    side, only some are named, and a cell may stand for several classes. With more than
    ``_MAX_CLUSTERED`` classes there is no plot.

    Args:
        class_names: one name per class.
        counts: int ``[num_classes, num_classes]``.
    """
    num_classes = len(class_names)
    if num_classes > _MAX_CLUSTERED:
        return None
    is_named = num_classes <= _MAX_NAMES
    order = np.arange(num_classes) if is_named else similarity_order(counts)
    step = -(-num_classes // _MAX_CELLS)  # classes per row
    starts = np.arange(0, num_classes, step)
    cells = counts[np.ix_(order, order)]
    cells = np.add.reduceat(np.add.reduceat(cells, starts, axis=0), starts, axis=1)
    shares = cells / np.maximum(1, cells.sum(1, keepdims=True))
    size = min(10.0, max(4.5, 0.42 * num_classes + 2)) if is_named else 9.0
    figure = Figure(figsize=(size, size * 0.92), layout="constrained")
    axes = figure.subplots()
    # With many classes most confusions are a few per cent; the cube root makes them visible.
    norm = PowerNorm(1 if is_named else 1 / 3, vmin=0, vmax=1)
    # Edges in units of classes, with a class at its index.
    edges = (-0.5, num_classes - 0.5, num_classes - 0.5, -0.5)
    image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest", extent=edges)
    ticks = None if is_named else (0, 0.01, 0.05, 0.2, 0.5, 1)
    figure.colorbar(image, ax=axes, label="fraction of the row", shrink=0.8, ticks=ticks)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    every = -(-num_classes // _MAX_NAMES)
    positions = np.arange(0, num_classes, every)
    names = [shortened(class_names[number]) for number in order[positions]]
    fontsize = None if is_named else 8
    # A dollar sign in a name does not start a formula.
    axes.set_xticks(positions, names, rotation=90, parse_math=False, fontsize=fontsize)
    axes.set_yticks(positions, names, parse_math=False, fontsize=fontsize)
    if num_classes <= 15:
        for row, column in np.argwhere(counts).tolist():
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=color)
    text = f"{int(np.trace(counts))} of {int(counts.sum())} images are on the diagonal."
    off = np.where(np.eye(num_classes, dtype=bool), 0, counts)
    if off.max():
        row, column = divmod(int(off.argmax()), num_classes)
        text += (
            f" Most frequent confusion: {int(off.max())} images of {class_names[row]} predicted as "
            f"{class_names[column]}."
        )
    if not is_named:
        text += (
            " Classes that are confused are side by side (hierarchical clustering of the confusion "
            f"matrix); one class in {every} is named."
        )
        if step > 1:
            text += f" Each row and column are {step} classes."
    return "Confusion matrix", text, figure


def similarity_order(counts: np.ndarray) -> np.ndarray:
    """An order of the classes that puts those that are often confused side by side.

    Average linkage of the symmetrized confusion matrix, as for cluster heat maps (doi
    10.1073/pnas.95.25.14863); up to ``_MAX_OPTIMAL`` classes with the order of the leaves that
    makes neighbours most similar (doi 10.1093/bioinformatics/17.suppl_1.S22).

    Args:
        counts: int ``[num_classes, num_classes]``.

    Returns:
        int ``[num_classes]``, a permutation.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    distances = squareform(1 - (shares + shares.T) / 2, checks=False)
    is_small = len(counts) <= _MAX_OPTIMAL
    return leaves_list(linkage(distances, "average", optimal_ordering=is_small))


def shortened(name: str) -> str:
    """A name that leaves room for others beside it in a plot."""
    return name if len(name) <= _MAX_NAME_LENGTH else f"{name[: _MAX_NAME_LENGTH - 1]}…"


def calibration(confidence: np.ndarray, right: np.ndarray) -> Plot:
    """Calibration plot (reliability diagram): accuracy by confidence; see
    ``metrics.calibration``."""
    bins = metrics.calibration(confidence, right)
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfect calibration")
    axes.bar(
        [row["low"] for row in bins],
        [row["accuracy"] for row in bins],
        width=1 / metrics.BINS,
        align="edge",
        color=_BLUE,
        alpha=0.35,
        edgecolor=_BLUE,
        label="accuracy in the bin",
    )
    sizes = [20 + 180 * row["count"] / len(right) for row in bins]
    axes.scatter(
        [row["confidence"] for row in bins],
        [row["accuracy"] for row in bins],
        sizes,
        color=_ORANGE,
        zorder=3,
        label="mean confidence (area: number of images)",
    )
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    last = bins[-1]
    text = (
        f"Highest confidence bin: {last['count']} images, mean confidence "
        f"{last['confidence']:.3f}, accuracy {last['accuracy']:.3f}."
    )
    return "Calibration", f"Accuracy by confidence. {text}", figure


def risk_coverage(points: Sequence[dict[str, float]]) -> Plot | None:
    """Accuracy among the kept images by the fraction kept; see ``abstention.risk_coverage``."""
    if len(points) < 2:
        return None
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["coverage"] for row in points], [row["accuracy"] for row in points], color=_BLUE)
    axes.set(
        xlim=(0, 1.02), xlabel="fraction of images kept (coverage)", ylabel="accuracy among them"
    )
    axes.grid(alpha=0.3)
    half = min(points, key=lambda row: abs(row["coverage"] - 0.5))
    text = (
        "If images of lower confidence are not predicted. The "
        f"{half['coverage']:.0%} with a confidence of at least {half['threshold']:.3f} have an "
        f"accuracy of {half['accuracy']:.3f}, all images {points[-1]['accuracy']:.3f}."
    )
    return "Accuracy if the classifier may abstain", text, figure


def classes(rows: Sequence[dict[str, Any]]) -> Plot:
    """Precision and recall per class; with many classes, those with the lowest F1."""
    chosen = sorted(rows, key=lambda row: row["f1"])[:_MAX_NAMES]
    figure = Figure(figsize=(5.4, 0.36 * len(chosen) + 1.4), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(chosen))
    for offset, name, color in ((-0.2, "precision", _BLUE), (0.2, "recall", _GREEN)):
        axes.barh(positions + offset, [row[name] for row in chosen], 0.38, color=color, label=name)
    axes.set_yticks(positions, [shortened(row["label"]) for row in chosen], parse_math=False)
    axes.set_xlim(0, 1)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    worst = chosen[0]
    text = (
        f"Lowest F1: {worst['label']}, with precision {worst['precision']:.2f} and recall "
        f"{worst['recall']:.2f}."
    )
    title = "Classes" if len(chosen) == len(rows) else f"The {len(chosen)} weakest classes"
    return title, text, figure


def f1_of_classes(rows: Sequence[dict[str, Any]]) -> Plot | None:
    """Histogram of the F1 of the classes, if there are more than ``classes`` shows."""
    if len(rows) <= _MAX_NAMES:
        return None
    f1 = np.array([row["f1"] for row in rows])
    figure = Figure(figsize=(5, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.hist(f1, bins=20, range=(0, 1), color=_BLUE, alpha=0.35, edgecolor=_BLUE)
    low, middle, high = np.quantile(f1, [0.1, 0.5, 0.9])
    axes.axvline(middle, color=_ORANGE, label="median")
    axes.set(xlim=(0, 1), xlabel="F1", ylabel="classes")
    axes.grid(alpha=0.3)
    axes.legend()
    text = (
        f"Median {middle:.3f}; a tenth of the classes is below {low:.3f}, a tenth above {high:.3f}."
    )
    return "F1 by class", text, figure
