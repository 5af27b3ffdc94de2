"""Plots of an evaluation.

Each function returns a title, an alternative text and the Matplotlib figure; or ``None`` if there
is nothing to plot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import sklearn.metrics
from matplotlib.figure import Figure

from transfer.evaluation import metrics

Plot: TypeAlias = tuple[str, str, Figure]
# Colour-blind safe palette of Okabe and Ito.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_MAX_NAMES = 40  # more names are not legible


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


def confusion(classes: Sequence[str], predictions: np.ndarray, labels: np.ndarray) -> Plot:
    """Confusion matrix: rows are labels, columns are predictions, colours are row fractions."""
    count = len(classes)
    counts = sklearn.metrics.confusion_matrix(labels, predictions, labels=np.arange(count))
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    named = count <= _MAX_NAMES
    size = min(10.0, max(4.5, 0.42 * count + 2)) if named else 8.0
    figure = Figure(figsize=(size, size * 0.92), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="fraction of the class", shrink=0.8)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    if named:
        # A dollar sign in a name does not start a formula.
        axes.set_xticks(range(count), classes, rotation=90, parse_math=False)
        axes.set_yticks(range(count), classes, parse_math=False)
    if count <= 15:
        for row, column in np.ndindex(count, count):
            if counts[row, column]:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, counts[row, column], ha="center", va="center", color=color)
    off = np.where(np.eye(count, dtype=bool), 0, counts)
    row, column = divmod(int(off.argmax()), count)
    text = f"{int(np.trace(counts))} of {int(counts.sum())} images are on the diagonal."
    if off.max():
        text += (
            f" Most frequent confusion: {int(off.max())} images of {classes[row]} predicted as "
            f"{classes[column]}."
        )
    return "Confusion matrix", text, figure


def calibration(p: np.ndarray, labels: np.ndarray) -> Plot:
    """Calibration plot (reliability diagram): accuracy by confidence."""
    bins = metrics.calibration(p, labels)
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
    sizes = [20 + 180 * row["count"] / len(labels) for row in bins]
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
    axes.legend(loc="upper left")
    last = bins[-1]
    text = (
        f"Highest confidence bin: {last['count']} images, mean confidence "
        f"{last['confidence']:.3f}, accuracy {last['accuracy']:.3f}."
    )
    return "Calibration", f"Accuracy by confidence. {text}", figure


def classes(rows: Sequence[dict[str, Any]]) -> Plot:
    """Precision and recall per class; with many classes, those with the lowest F1."""
    chosen = sorted(rows, key=lambda row: row["f1"])[:_MAX_NAMES]
    figure = Figure(figsize=(7, 0.36 * len(chosen) + 1.4), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(chosen))
    for offset, name, color in ((-0.2, "precision", _BLUE), (0.2, "recall", _GREEN)):
        axes.barh(positions + offset, [row[name] for row in chosen], 0.38, color=color, label=name)
    axes.set_yticks(positions, [row["label"] for row in chosen], parse_math=False)
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    worst = chosen[0]
    text = (
        f"Lowest F1: {worst['label']}, with precision {worst['precision']:.2f} and recall "
        f"{worst['recall']:.2f}."
    )
    title = "Classes" if len(chosen) == len(rows) else f"The {len(chosen)} weakest classes"
    return title, text, figure
