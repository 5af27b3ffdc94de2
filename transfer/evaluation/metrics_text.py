"""Metrics in words, for people: one line for the accuracy, a few for an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transfer.evaluation.abstention import CONFIDENCE
from transfer.evaluation.conformal import min_units

_NOT_TOLD = "other unknown images may be told apart better or worse"


def describe_accuracy(metrics: Mapping[str, Any], images: str) -> str:
    """The accuracy with its confidence interval.

    Args:
        metrics: of ``transfer.evaluate``.
        images: what was evaluated on, such as ``held-out images``.

    Example:
        >>> from transfer.evaluation.metrics_text import describe_accuracy
        >>> metrics = {"accuracy": 0.75, "accuracy_ci95": (0.3, 0.95), "num_examples": 4}
        >>> describe_accuracy(metrics, "images")
        'accuracy 0.7500 on 4 images (95 % interval 0.3000 to 0.9500)'
    """
    low, high = metrics["accuracy_ci95"]
    of_groups = f" of {metrics['num_groups']} groups" if "num_groups" in metrics else ""
    return (
        f"accuracy {metrics['accuracy']:.4f} on {metrics['num_examples']} {images}{of_groups} "
        f"(95 % interval {low:.4f} to {high:.4f})"
    )


def describe(metrics: Mapping[str, Any]) -> Iterator[str]:
    """The metrics of ``evaluate_run`` or ``evaluate_model``, in lines."""
    yield describe_accuracy(metrics, "images")
    yield f"top-5    {metrics['top5']:.4f}"
    yield f"loss     {metrics['loss']:.4f}"
    if other := metrics.get("against"):
        test = "McNemar's exact test"
        if "num_groups" in other:
            test = f"exact randomization test of {other['num_groups']} groups"
        yield (
            f"correct where {other['run']} is wrong: {other['only_first']} images; vice versa: "
            f"{other['only_second']}; p {other['p_value']:.3g} ({test})"
        )
    yield from describe_uncertainty(metrics)
    if unknown := metrics.get("unknown"):
        yield from describe_unknown(unknown)


def describe_uncertainty(metrics: Mapping[str, Any]) -> Iterator[str]:
    """The prediction sets and the threshold of an evaluation, in lines, if there are any."""
    # With groups, these are the units that were drawn independently.
    units = "groups of images" if "num_groups" in metrics else "images"
    if sets := metrics.get("conformal"):
        coverage, size = sets["coverage"], metrics.get("num_groups", metrics["num_examples"])
        yield (
            f"prediction sets for a coverage of {coverage:g}: {sets['mean_size']:.2f} classes on "
            f"average, {sets['single']:.0%} with one, {sets['empty']:.0%} empty; they contain the "
            f"label of {sets['measured_coverage']:.4f} of the images"
        )
        if not sets["is_promised"]:
            yield (
                f"a coverage of {coverage:g} cannot be promised with {size} {units}, it needs "
                f"{min_units(coverage)}: the sets of new images contain all classes"
            )
        elif not all(sets["thresholds"]):
            yield (
                f"halves of the {size} {units} are too few to measure a coverage of {coverage:g}, "
                "and the sets there contain all classes; those of new images do not"
            )
    if found := metrics.get("abstention"):
        yield _describe_abstention(found, units)


def describe_unknown(measured: Mapping[str, Any]) -> list[str]:
    """The entry ``unknown`` of an evaluation, in lines."""
    lines = [f"{measured['num_images']} unknown images in {measured['folder']}:"]
    for name, row in measured["scores"].items():
        between = ""
        if row["auroc_ci95"] is not None:
            between = " (95 % interval {:.4f} to {:.4f})".format(*row["auroc_ci95"])
        lines.append(
            f"  {name:<16} AUROC {row['auroc']:.4f}{between}; where 95 % of the images of the "
            f"classes are kept, {row['fpr95']:.1%} of the unknown ones are"
        )
    return [*lines, f"  measured on these images: {_NOT_TOLD}"]


def describe_sets(sets: Mapping[str, Any]) -> str:
    """What the prediction sets of new images are worth, in a line, from the entry ``conformal``."""
    if not sets["is_promised"]:
        return (
            f"prediction sets for a coverage of {sets['coverage']:g}: too few images were "
            "evaluated to promise it, and the sets contain all classes"
        )
    return (
        f"prediction sets for a coverage of {sets['coverage']:g}, for images like the evaluated "
        f"ones: classes with a probability of at least {sets['threshold']:.4g}"
    )


def describe_score(score: str, measured: Mapping[str, Any] | None) -> str:
    """What a score is worth, in a line, from the entry ``unknown`` of an evaluation, if any."""
    if measured is None:
        return (
            f"unknown score {score}: no AUROC was measured for this run; evaluate RUN --unknown "
            "FOLDER measures it on images of none of the classes"
        )
    return (
        f"unknown score {score}: AUROC {measured['scores'][score]['auroc']:.4f} on "
        f"{measured['num_images']} images in {measured['folder']}; {_NOT_TOLD}"
    )


def _describe_abstention(found: Mapping[str, Any], units: str) -> str:
    risk, size = found["risk"], found["calibrated_on"]
    if found["threshold"] is not None:
        return (
            f"an error rate of at most {risk:g} (with {100 * CONFIDENCE:g} % confidence): predict "
            f"--abstain-below {found['threshold']} keeps {found['coverage']:.1%} of the images, "
            f"of which {found['accuracy']:.4f} are right"
        )
    if size < found["needed"]:
        return (
            f"an error rate of at most {risk:g} cannot be promised with {size} {units}: it needs "
            f"{found['needed']} without an error"
        )
    return (
        f"an error rate of at most {risk:g} cannot be promised at any threshold: that of the most "
        f"confident of {size} {units} is only known to be at most {found['bound']:.4f}"
    )
