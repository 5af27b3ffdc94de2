"""Writes ``report.html``: metrics, plots and example images of a run, as a self-contained page."""

from __future__ import annotations

import base64
import functools
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

from transfer.core import yaml_files
from transfer.core.files import make_folder, write_bytes, write_text
from transfer.data.dataset import Split
from transfer.evaluation import metrics, plots
from transfer.evaluation.image_scores import ImageScores, score_images
from transfer.evaluation.metrics_text import describe_uncertainty
from transfer.evaluation.pictures import Picture, read_pictures
from transfer.evaluation.prediction import confusion_matrix
from transfer.layers.classifier import Classifier

REPORT = "report.html"
PLOTS = "plots"
NUM_PICTURES = 12
_PICTURES_OF_PAIR = 3
_DPI = 120
_MIN_SCALE = 0.55  # of plots: text of 10 points has 9 pixels
_MAX_ROWS = 40  # rows of the table of classes that are shown without a click
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
    of logits. ``metrics`` is the content of ``evaluation.json``. ``class_means`` are those of
    ``out_of_distribution.class_means``, if unknown images were evaluated.
    """

    classifier: Classifier
    split: Split
    logits: np.ndarray
    labels: np.ndarray
    metrics: dict[str, Any]
    class_means: np.ndarray | None = None

    @functools.cached_property
    def scores(self) -> ImageScores:
        """The most probable classes of each image."""
        return score_images(self.logits, self.labels)

    @functools.cached_property
    def confusion(self) -> np.ndarray:
        """int64 ``[num_classes, num_classes]``: rows are the labels, columns the predictions."""
        return confusion_matrix(self.logits, self.labels)


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
    """Write ``plots/`` and ``report.html`` into a folder; returns the path of the page.

    The page has a bounded number of pictures, and reads only the images that it shows.
    """
    make_folder(folder / PLOTS)
    class_names, scores = evaluated.classifier.labels, evaluated.scores
    by_class = evaluated.metrics["classes"]
    evaluated_classes = [row for row in by_class if row["support"]]  # others have no recall
    drawn = {
        "learning_curves": plots.learning_curves(run.history),
        "confusion": plots.confusion(class_names, evaluated.confusion),
        "calibration": plots.calibration(
            scores.confidences, scores.predictions == evaluated.labels
        ),
        "risk_coverage": plots.risk_coverage(evaluated.metrics["risk_coverage"]["points"]),
        "f1": plots.f1_of_classes(evaluated_classes),
        "classes": plots.classes(evaluated_classes),
    }
    shown = [
        {
            "title": title,
            "alt": alt,
            "data": _png(figure, folder / PLOTS / f"{name}.png"),
            # Narrow screens scroll a plot rather than make its text illegible.
            "min_width": int(_MIN_SCALE * _DPI * figure.get_figwidth()),
        }
        for name, plot in drawn.items()
        if plot is not None
        for title, alt, figure in [plot]
    ]
    mistakes, uncertain = _most_confident_mistakes(evaluated), _least_certain(scores)
    pairs = _confused_pairs(evaluated)
    explained = np.concatenate([mistakes, uncertain])
    pictures = read_pictures(
        evaluated.classifier,
        evaluated.split,
        np.concatenate([explained, *pairs]),
        dict(zip(explained.tolist(), scores.predictions[explained].tolist(), strict=True)),
    )

    def described(index: int) -> dict[str, Any]:
        return _describe(evaluated, index, pictures[index])

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
        class_names=class_names,
        num_groups=evaluated.metrics.get("num_groups"),
        headlines=_headlines(evaluated.metrics),
        uncertainty=list(describe_uncertainty(evaluated.metrics)),
        unknown=evaluated.metrics.get("unknown"),
        plots=shown,
        pairs=[
            (row, [described(index) for index in images.tolist()])
            for row, images in zip(evaluated.metrics["most_confused"], pairs, strict=True)
        ],
        mistakes=[described(index) for index in mistakes.tolist()],
        uncertain=[described(index) for index in uncertain.tolist()],
        classes=sorted(by_class, key=lambda row: (not row["support"], row["f1"])),
        is_long=len(by_class) > _MAX_ROWS,
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


def _most_confident_mistakes(evaluated: Evaluated) -> np.ndarray:
    scores = evaluated.scores
    return _most_confident(scores, scores.predictions != evaluated.labels)[:NUM_PICTURES]


def _most_confident(scores: ImageScores, chosen: np.ndarray) -> np.ndarray:
    """Positions where the boolean array is true, in descending order of the confidence."""
    positions = np.flatnonzero(chosen)
    return positions[np.argsort(-scores.confidences[positions], kind="stable")]


def _least_certain(scores: ImageScores) -> np.ndarray:
    """Positions of the images with the smallest margin between the two most probable classes."""
    margins = scores.top_probabilities[:, 0] - scores.top_probabilities[:, 1]
    return np.argsort(margins, kind="stable")[:NUM_PICTURES]


def _confused_pairs(evaluated: Evaluated) -> list[np.ndarray]:
    """For each of the most confused pairs of classes, positions of some of its images."""
    scores, labels = evaluated.scores, evaluated.labels
    pairs = metrics.confused_pairs(scores.predictions, labels)[: metrics.MAX_CONFUSED, :2]
    return [
        _most_confident(scores, (labels == label) & (scores.predictions == prediction))[
            :_PICTURES_OF_PAIR
        ]
        for label, prediction in pairs
    ]


def _describe(evaluated: Evaluated, index: int, picture: Picture) -> dict[str, Any]:
    class_names, scores = evaluated.classifier.labels, evaluated.scores
    label = class_names[evaluated.labels[index]]
    prediction = class_names[scores.predictions[index]]
    return {
        "data": picture.jpeg,
        "heat": picture.heat,
        "name": picture.name,
        "label": label,
        "prediction": prediction,
        "probability": f"{scores.confidences[index]:.3f}",
        "alt": f"image of {label}, predicted {prediction}",
    }


def _png(figure: Figure, path: Path) -> str:
    data = io.BytesIO()
    with warnings.catch_warnings():
        # Matplotlib's font lacks glyphs of many scripts; the page has the names as text.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(data, format="png", dpi=_DPI, bbox_inches="tight")
    write_bytes(path, data.getvalue())
    return base64.b64encode(data.getvalue()).decode()
