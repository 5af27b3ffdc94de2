"""Implementation of ``vgg-transfer check-data``; its flags are in ``recipes.check_data_flags``."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from tabulate import tabulate

from recipes import console, terminal
from recipes.check_data_flags import CheckDataConfig
from transfer import Backbone, load_meta_graph, open_source
from transfer.activations.extraction import EXTRACTION_BATCH, Compiled, extract
from transfer.activations.fingerprints import remembered
from transfer.core import measurement
from transfer.data import data_checks
from transfer.data.dataset import Split
from transfer.runs import run_data


def run(config: CheckDataConfig) -> tuple[str, bool]:
    """Returns the report to print, and whether no image is unreadable or in both splits."""
    source = open_source(
        config.dataset or "",
        data_dir=config.data_dir,
        image_folder=config.image_folder,
        csv=config.csv,
        group_by=config.group_by,
    )
    with remembered(source):
        train, held_out = run_data.splits(
            source, config.train_split, config.eval_split, progress=console.decoding
        )
        # One split, so that each image is decoded once.
        both = Split(source, train.parts + held_out.parts)
        scan = data_checks.scan(both, console.decoding)
    in_train = np.arange(len(both)) < len(train)

    names = both.names
    groups = data_checks.duplicates(scan)
    leaks = [group for group in groups if 0 < in_train[group].sum() < len(group)]
    findings: dict[str, Any] = {
        "dataset": source.name,
        "num_train": len(train),
        "num_held_out": len(held_out),
        "classes": _counts(source.class_names, train.labels, held_out.labels),
        "balance": data_checks.describe_balance(source.class_names, train.labels, held_out.labels),
        "unreadable": [names[index] for index in np.flatnonzero(scan.unreadable).tolist()],
        "in_both_splits": [[names[index] for index in group] for group in leaks],
        "duplicates": [[names[i] for i in group] for group in groups if group not in leaks],
        "other_label": [
            [names[i] for i in group] for group in groups if len({*both.labels[group]}) > 1
        ],
    }
    shared: list[str] = []
    if both.groups is not None:
        shared = _shared_groups(train, held_out)
        findings["groups"] = {
            "train": len(np.unique(both.groups[in_train])),
            "held_out": len(np.unique(both.groups[~in_train])),
            "in_both_splits": shared,
        }
    if config.image_folder:
        findings["passed_over"] = [name for name, _ in source.passed_over.files]
        findings["empty_classes"] = source.passed_over.empty_classes
    if config.model != "none":
        readable = both.where(~scan.unreadable)
        counts = _independent(readable)
        judged = readable.where(counts[readable.labels] > 1)
        findings["not_judged"] = [
            n for n, c in zip(source.class_names, counts, strict=True) if c < 2
        ]
        findings["doubtful_labels"] = []
        if len(np.unique(judged.labels)) > 1:
            try:
                findings["doubtful_labels"] = _doubtful(config, judged)
            except data_checks.NoFoldsError:  # some classes share their groups
                findings["not_judged"] = source.class_names
    text = json.dumps(findings, indent=2) if config.json else _text(findings, config.show)
    return text, not leaks and not shared and not scan.unreadable.any()


def _counts(
    class_names: list[str], train: np.ndarray, held_out: np.ndarray
) -> dict[str, list[int]]:
    """Class name to its numbers of training and held-out images."""
    counts = [np.bincount(labels, minlength=len(class_names)) for labels in (train, held_out)]
    return {name: [int(n[i]) for n in counts] for i, name in enumerate(class_names)}


def _shared_groups(train: Split, held_out: Split) -> list[str]:
    """The first image to be evaluated on of each group that has images in both splits."""
    if train.groups is None or held_out.groups is None:
        return []
    numbers, first = np.unique(held_out.groups, return_index=True)
    return [held_out.names[index] for index in np.sort(first[np.isin(numbers, train.groups)])]


def _independent(split: Split) -> np.ndarray:
    """Number of images of each class, or of groups if there are some; int ``[num_classes]``."""
    labels = split.labels
    if split.groups is not None:
        labels = np.unique(np.stack([labels, split.groups]), axis=1)[0]
    return np.bincount(labels, minlength=len(split.source.class_names))


def _doubtful(config: CheckDataConfig, split: Split) -> list[dict[str, Any]]:
    graph = load_meta_graph(config.model)
    backbone = Backbone(graph, graph.card.tap or "fc7")
    preprocess = graph.preprocess(backbone.network.input, config.preprocess)
    batches = measurement.progress(split.batches(preprocess, EXTRACTION_BATCH), "features")
    features = extract(Compiled(backbone), batches, len(split))
    p, order = data_checks.doubtful_labels(features, split.labels, split.groups)
    names, labels = split.names, split.source.class_names
    return [
        {
            "image": names[index],
            "label": labels[split.labels[index]],
            "probability": float(p[index, split.labels[index]]),
            "looks_like": labels[p[index].argmax()],
            "its_probability": float(p[index].max()),
        }
        for index in order
    ]


def _text(findings: dict[str, Any], show: int) -> str:
    classes = findings["classes"]
    rows = [[terminal.escaped(name), *counts] for name, counts in classes.items()]
    rows.sort(key=lambda row: row[1])
    parts = [
        f"{findings['dataset']}: {findings['num_train']} images to train on, "
        f"{findings['num_held_out']} to evaluate on, {len(classes)} classes",
        tabulate(
            rows[:show],
            ["rarest classes", "train", "held out"],
            tablefmt="plain",
            disable_numparse=True,  # a class may be called 001
        ),
        *map(terminal.escaped, findings["balance"]),
        _list("unreadable", findings["unreadable"], show),
        _list("in both splits", map(" = ".join, findings["in_both_splits"]), show),
        _list("twice in a split", map(" = ".join, findings["duplicates"]), show),
        _list("duplicates with different labels", map(" = ".join, findings["other_label"]), show),
    ]
    if groups := findings.get("groups"):
        title = f"groups in both splits, of {groups['train']} to train on and {groups['held_out']}"
        parts.append(_list(f"{title} to evaluate on", groups["in_both_splits"], show))
    if passed_over := findings.get("passed_over"):
        parts.append(_list("files passed over", passed_over, show))
    if not_judged := findings.get("not_judged"):
        parts.append(_list("too few images to judge their labels", not_judged, show))
    if "doubtful_labels" in findings:
        parts.append(
            _list(
                "labels to review (predicted from the other images)",
                (
                    f"{row['image']}: {row['label']} {row['probability']:.3f}, rather "
                    f"{row['looks_like']} {row['its_probability']:.3f}"
                    for row in findings["doubtful_labels"]
                ),
                show,
            )
        )
    return "\n".join(parts)


def _list(title: str, items: Any, show: int) -> str:
    lines = [terminal.escaped(line) for line in items]
    more = [f"  ... and {len(lines) - show} more"] if len(lines) > show else []
    return "\n".join([f"{title}: {len(lines)}", *(f"  {line}" for line in lines[:show]), *more])
