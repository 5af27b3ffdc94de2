"""Metrics in words, for people: one line for the accuracy, a few for an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


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
    if sets := metrics.get("conformal"):
        yield (
            f"prediction sets for a coverage of {sets['coverage']:g}: {sets['mean_size']:.2f} "
            f"classes on average, {sets['single']:.0%} with one; they contain the label of "
            f"{sets['measured_coverage']:.4f} of the images"
        )
