"""Output of ``vgg-transfer check-data``; its flags are in ``recipes.check_data_flags``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from tabulate import tabulate

from recipes import console, terminal
from recipes.check_data_flags import CheckDataConfig
from transfer import load_meta_graph
from transfer.core import measurement
from transfer.runs.data_report import DataReport, LabelReport, check_data


def run(config: CheckDataConfig) -> tuple[str, bool]:
    """Returns the report to print, and whether no image is unreadable or in both splits."""
    source = config.open()
    report = check_data(
        source,
        config.train_split,
        config.eval_split,
        graph=None if config.model == "none" else load_meta_graph(config.model),
        preprocess=config.preprocess,
        progress=_progress,
    )
    ignored = source.passed_over if config.image_folder else None
    names = None if ignored is None else [name for name, _ in ignored.files]
    if not config.json:
        return _text(report, names or [], config.show), report.is_sound
    findings = _findings(report)
    if ignored is not None:
        findings |= {"ignored_files": names, "passed_over": names}  # the second: its earlier name
        findings["empty_classes"] = ignored.empty_classes
    return json.dumps(findings, indent=2), report.is_sound


def _progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    return console.decoding(items) if what == "images" else measurement.progress(items, what)


def _findings(report: DataReport) -> dict[str, Any]:
    """The report as a JSON object."""
    findings = dataclasses.asdict(report)
    if labels := findings.pop("labels"):
        findings |= {
            "doubtful_labels": labels["to_review"],
            "expected_label_errors": labels["num_expected"],
            "num_judged": labels["num_judged"],
            "not_judged": labels["not_judged"],
        }
    if groups := findings.pop("groups"):
        findings["groups"] = {
            "train": groups["num_train"],
            "held_out": groups["num_held_out"],
            "in_both_splits": groups["in_both_splits"],
        }
    return findings


def _text(report: DataReport, ignored: list[str], show: int) -> str:
    classes = sorted(report.classes.items(), key=lambda item: item[1][0])
    rows = [[terminal.escaped(name), *counts] for name, counts in classes]
    parts = [
        f"{report.dataset}: {report.num_train} images to train on, "
        f"{report.num_held_out} to evaluate on, {len(rows)} classes",
        tabulate(
            rows[:show],
            ["rarest classes", "train", "held out"],
            tablefmt="plain",
            disable_numparse=True,  # a class may be called 001
        ),
        *(terminal.escaped(console.with_flags(line)) for line in report.balance),
        _list("unreadable", report.unreadable, show),
        _list("in both splits", map(" = ".join, report.in_both_splits), show),
        _list("twice in a split", map(" = ".join, report.duplicates), show),
        _list("duplicates with different labels", map(" = ".join, report.other_label), show),
    ]
    if groups := report.groups:
        title = (
            f"groups in both splits, of {groups.num_train} to train on and {groups.num_held_out}"
        )
        parts.append(_list(f"{title} to evaluate on", groups.in_both_splits, show))
    if ignored:
        parts.append(_list("files ignored", ignored, show))
    if report.labels is not None:
        parts += _label_lines(report.labels, show)
    return "\n".join(parts)


def _label_lines(labels: LabelReport, show: int) -> list[str]:
    parts = []
    if labels.not_judged:
        parts.append(_list("too few images to judge their labels", labels.not_judged, show))
    title = (
        f"labels to review (about {labels.num_expected:.0f} of {labels.num_judged:,} are wrong, "
        "judging by the other images)"
    )
    lines = (
        f"{row.image}: {row.label} {row.probability:.3f}, rather "
        f"{row.looks_like} {row.its_probability:.3f}"
        for row in labels.to_review
    )
    return [*parts, _list(title, lines, show)]


def _list(title: str, items: Iterable[str], show: int) -> str:
    lines = [terminal.escaped(line) for line in items]
    more = [f"  ... and {len(lines) - show} more"] if len(lines) > show else []
    return "\n".join([f"{title}: {len(lines)}", *(f"  {line}" for line in lines[:show]), *more])
