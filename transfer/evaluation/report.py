"""Writes ``report.html``: metrics, plots and example images of a run, as a self-contained page."""

from __future__ import annotations

import base64
import io
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from transfer.core import yaml_files
from transfer.core.files import make_folder, write_bytes, write_text
from transfer.data.dataset import Split
from transfer.evaluation import plots
from transfer.evaluation.explain import grad_cam, overlay
from transfer.evaluation.prediction import probabilities
from transfer.images.decoding import decode
from transfer.images.preprocess import to_channels
from transfer.layers.classifier import Classifier

REPORT = "report.html"
PLOTS = "plots"
NUM_PICTURES = 12
_PICTURE_PIXELS = 160
_HEADLINES = {
    "accuracy": "Accuracy",
    "top5": "Top-5 accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "F1, mean of the classes",
    "roc_auc": "ROC AUC, mean of the classes",
    "average_precision": "Average precision, mean of the classes",
    "loss": "Log loss (nats)",
    "calibration_error": "Expected calibration error",
}


@dataclass(frozen=True)
class Evaluated:
    """A classifier, the images it was evaluated on, and the results.

    ``logits`` are float ``[num_examples, num_classes]``, ``labels`` int ``[num_examples]``, indices
    of logits. ``metrics`` is the content of ``evaluation.json``.
    """

    classifier: Classifier
    split: Split
    logits: np.ndarray
    labels: np.ndarray
    metrics: dict[str, Any]


@dataclass(frozen=True)
class RunSummary:
    """Information about the run that trained the classifier.

    ``history`` maps the name of a metric to its value after each epoch, ``config`` are the resolved
    options, ``commands`` the command lines that repeat training and evaluation.
    """

    name: str
    model: str
    cut: str | None
    history: dict[str, list[float]]
    config: dict[str, Any]
    versions: dict[str, str]
    trained_on: str | None
    commands: Sequence[Sequence[str]]


def write(folder: Path, evaluated: Evaluated, run: RunSummary) -> Path:
    """Write ``plots/`` and ``report.html`` into a folder; returns the path of the page."""
    make_folder(folder / PLOTS)
    p = probabilities(evaluated.logits)
    class_names, metrics = evaluated.classifier.labels, evaluated.metrics
    drawn = {
        "learning_curves": plots.learning_curves(run.history),
        "confusion": plots.confusion(class_names, evaluated.logits.argmax(-1), evaluated.labels),
        "calibration": plots.calibration(p, evaluated.labels),
        "classes": plots.classes(metrics["classes"]),
    }
    shown = [
        {"title": title, "alt": alt, "data": _png(figure, folder / PLOTS / f"{name}.png")}
        for name, plot in drawn.items()
        if plot is not None
        for title, alt, figure in [plot]
    ]
    template = jinja2.Template(
        (files("transfer.evaluation") / REPORT).read_text(encoding="utf-8"), autoescape=True
    )
    page = template.render(
        name=run.name,
        dataset=evaluated.split.source.name,
        splits=" + ".join(name for name, _ in evaluated.split.parts),
        model=run.model,
        cut=run.cut,
        num_examples=len(evaluated.labels),
        num_classes=len(class_names),
        headlines=_headlines(metrics),
        plots=shown,
        mistakes=_pictures(evaluated, p, _most_confident_mistakes(p, evaluated.labels)),
        uncertain=_pictures(evaluated, p, _least_certain(p)),
        classes=metrics["classes"],
        config=yaml_files.to_yaml(run.config),
        versions=run.versions,
        trained_on=run.trained_on,
        commands=[shlex.join(command) for command in run.commands],
    )
    write_text(folder / REPORT, page)
    return folder / REPORT


def _headlines(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of title, value and interval."""
    flat = metrics | {"macro_f1": metrics["macro"]["f1"]}
    intervals = metrics["ci95"] | {"accuracy": metrics["accuracy_ci95"]}
    rows = []
    for key, title in _HEADLINES.items():
        if flat.get(key) is None:
            continue
        interval = intervals.get(key)
        between = "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
        rows.append((title, f"{flat[key]:.4f}", between))
    return rows


def _most_confident_mistakes(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    wrong = np.flatnonzero(p.argmax(-1) != labels)
    return wrong[np.argsort(-p.max(-1)[wrong], kind="stable")][:NUM_PICTURES]


def _least_certain(p: np.ndarray) -> np.ndarray:
    """Positions of the images with the smallest margin between the two most probable classes."""
    first_two = np.sort(p, axis=-1)[:, -2:]
    return np.argsort(first_two[:, 1] - first_two[:, 0], kind="stable")[:NUM_PICTURES]


def _pictures(evaluated: Evaluated, p: np.ndarray, chosen: np.ndarray) -> list[dict[str, str]]:
    """Each image as resized for the network, and overlaid with its Grad-CAM heat map."""
    if not len(chosen):
        return []
    classifier = evaluated.classifier
    preprocess, labels = classifier.preprocess, classifier.labels
    keep = np.zeros(len(evaluated.labels), bool)
    keep[chosen] = True
    order = np.flatnonzero(keep)
    examples = list(evaluated.split.where(keep).encoded())
    pixels = np.stack([preprocess.resize(to_channels(decode(e["image"]), preprocess.channels))
                       for e in examples])  # fmt: skip
    heats = _heats(classifier, pixels, p[order].argmax(-1))
    pictures = {}
    for index, example, image, heat in zip(order, examples, pixels, heats, strict=True):
        label, prediction = labels[evaluated.labels[index]], labels[p[index].argmax()]
        pictures[index] = {
            "data": _jpeg(image.round().clip(0, 255).astype(np.uint8)),
            "heat": None if heat is None else _jpeg(overlay(image, heat)),
            "name": example["name"].numpy().decode(),
            "label": label,
            "prediction": prediction,
            "probability": f"{p[index].max():.3f}",
            "alt": f"image of {label}, predicted {prediction}",
        }
    return [pictures[index] for index in chosen]


def _heats(
    classifier: Classifier, pixels: np.ndarray, classes: np.ndarray
) -> Sequence[np.ndarray | None]:
    try:
        return list(grad_cam(classifier)(classifier.preprocess.normalize(pixels), classes))
    except ValueError:  # a network without feature maps
        return [None] * len(pixels)


def _jpeg(pixels: np.ndarray) -> str:
    """uint8 ``[height, width, channels]`` as base64."""
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((_PICTURE_PIXELS, _PICTURE_PIXELS))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return base64.b64encode(data.getvalue()).decode()


def _png(figure: Figure, path: Path) -> str:
    data = io.BytesIO()
    with warnings.catch_warnings():
        # Matplotlib's font lacks glyphs of many scripts; the page has the names as text.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(data, format="png", dpi=120)
    write_bytes(path, data.getvalue())
    return base64.b64encode(data.getvalue()).decode()
