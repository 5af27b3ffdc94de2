"""How the options of a run use its model, checked before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping

from transfer.finetuning.options import FineTuneOptions, parse_tap
from transfer.images.preprocess import parse_size
from transfer.models.meta_graph import MetaGraph
from transfer.models.plan import ModelPlan, plan


def plan_model(
    graph: MetaGraph, options: FineTuneOptions, feeds: Mapping[str, float | bool] | None = None
) -> ModelPlan:
    """The ``ModelPlan`` of a run.

    Args:
        graph: the model.
        options: of the run; ``tap`` is not ``auto``.
        feeds: values of placeholders, see ``Backbone``.

    Raises:
        ValueError, OSError, ForbiddenOpError: as ``transfer.models.plan.plan``.
    """
    return plan(
        graph,
        parse_tap(options.tap),
        input=options.input,
        feeds=feeds,
        keep_dropout=options.keep_dropout,
        use_ema=options.use_ema,
        preprocess=options.preprocess,
        image_size=None if options.image_size is None else parse_size(options.image_size),
    )
