"""The findings about a dataset as text and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from tabulate import tabulate

from transfer.core.escapes import escaped
from transfer.images.image_files import PassedOver
from transfer.runs.data_report import DataReport, LabelReport


def as_json(report: DataReport, passed_over: PassedOver | None = None) -> dict[str, Any]:
    """The report as a JSON object.

    Args:
        report: of ``check_data``.
        passed_over: files of an image folder that were ignored; ``Source.passed_over``.
    """
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
    if passed_over is not None:
        names = [name for name, _ in passed_over.files]
        findings |= {"ignored_files": names, "passed_over": names}  # the second: its earlier name
        findings["empty_classes"] = passed_over.empty_classes
    return findings


def describe(
    report: DataReport, passed_over: PassedOver | None = None, max_rows: int = 20
) -> Iterator[str]:
    """Describe a report, in lines.

    Args:
        report: of ``check_data``.
        passed_over: files of an image folder that were ignored; ``Source.passed_over``.
        max_rows: number of findings of each kind to list; all are counted.

    Example:
        >>> from transfer import open_source
        >>> from transfer.runs.data_report import check_data
        >>> from transfer.runs.data_report_text import describe
        >>> next(describe(check_data(open_source("digits"))))
        'digits: 1438 images to train on, 359 to evaluate on, 10 classes'
    """

    def section(title: str, items: Iterable[str]) -> Iterator[str]:
        lines = [escaped(line) for line in items]
        yield f"{title}: {len(lines)}"
        yield from (f"  {line}" for line in lines[:max_rows])
        if len(lines) > max_rows:
            yield f"  ... and {len(lines) - max_rows} more"

    yield (
        f"{escaped(report.dataset)}: {report.num_train} images to train on, "
        f"{report.num_held_out} to evaluate on, {len(report.classes)} classes"
    )
    classes = sorted(report.classes.items(), key=lambda item: item[1][0])
    rows = [[escaped(name), *counts] for name, counts in classes]
    header = ["rarest classes", "train", "held out"]
    # A class may be called 001.
    table = tabulate(rows[:max_rows], header, tablefmt="plain", disable_numparse=True)
    yield from table.splitlines()
    yield from map(escaped, report.balance)
    yield from section("unreadable", report.unreadable)
    yield from section("in both splits", map(" = ".join, report.in_both_splits))
    yield from section("twice in a split", map(" = ".join, report.duplicates))
    yield from section("duplicates with different labels", map(" = ".join, report.other_label))
    if groups := report.groups:
        title = (
            f"groups in both splits, of {groups.num_train} to train on and {groups.num_held_out} "
            "to evaluate on"
        )
        yield from section(title, groups.in_both_splits)
    if passed_over and passed_over.files:
        yield from section("files ignored", [name for name, _ in passed_over.files])
    if labels := report.labels:
        if labels.not_judged:
            yield from section("too few images to judge their labels", labels.not_judged)
        title = (
            f"labels to review (about {labels.num_expected:.0f} of {labels.num_judged:,} are "
            "wrong, judging by the other images)"
        )
        yield from section(title, _doubts(labels))


def _doubts(labels: LabelReport) -> Iterator[str]:
    for row in labels.to_review:
        word = "rather" if row.its_probability > row.probability else "or"
        yield (
            f"{row.image}: {row.label} {row.probability:.3f}, {word} "
            f"{row.looks_like} {row.its_probability:.3f}"
        )
