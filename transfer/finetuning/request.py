"""The arguments of a fine-tuning run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras

from transfer.core.distribution import Replicas
from transfer.data.dataset import Split
from transfer.finetuning.options import FineTuneOptions
from transfer.models.meta_graph import MetaGraph
from transfer.runs.growth import Growth


@dataclass(frozen=True)
class RunRequest:
    """Arguments of a fine-tuning run.

    Args:
        graph: the pretrained network.
        train: training images.
        held_out: images to evaluate on, from the same source.
        options: see ``FineTuneOptions``.
        feeds: values of placeholders, see ``Backbone``.
        run_dir: folder of the run; ``None`` takes ``runs/<date-time>-<dataset>-<cut>``, with the
            cut as in ``freeze_until``.
        resume: continue the run in ``run_dir``.
        recorded: values for ``config.yaml`` beside the options, such as the splits' expressions.
        command: command line, written to ``provenance.json``.
        callbacks: Keras callbacks in addition to the run's own.
        verbose: 0 silent, 1 progress bars, 2 log lines.
        replicas: devices and processes that train together.
        growth: what ``train`` and ``held_out`` have from a run that images are added to.
    """

    graph: MetaGraph
    train: Split
    held_out: Split
    options: FineTuneOptions = field(default_factory=FineTuneOptions)
    feeds: Mapping[str, float | bool] = field(default_factory=dict)
    run_dir: Path | None = None
    resume: bool = False
    recorded: Mapping[str, Any] = field(default_factory=dict)
    command: Sequence[str] = ()
    callbacks: Sequence[keras.callbacks.Callback] = ()
    verbose: int = 0
    replicas: Replicas = field(default_factory=Replicas)
    growth: Growth | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """Where model and images come from, and what else is recorded."""
        feeds = [f"{name}={value}" for name, value in self.feeds.items()]
        renames = [f"{name}={key}" for name, key in self.graph.rename.items()]
        of_model = {"feed": feeds, "rename": renames}
        given = {name: value for name, value in of_model.items() if value}
        return {"model": self.graph.name, **self.train.source.origin, **given, **self.recorded}
