"""A fine-tuning run that has been set up."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras

from transfer.activations.store import CachePolicy
from transfer.core import measurement
from transfer.core.distribution import Replicas
from transfer.data.dataset import Split
from transfer.finetuning.hyperparameters import Stage
from transfer.finetuning.options import OF_GRADIENT_DESCENT, ResolvedOptions
from transfer.finetuning.request import RunRequest
from transfer.layers.classifier import Classifier
from transfer.layers.graph_layer import MIXED_PRECISIONS, GraphLayer
from transfer.quantization.prefix import QuantizedPrefix
from transfer.training.l2_sp import L2SP


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """A run that has been set up: classifier, stages and images.

    ``fingerprint`` identifies the training and held-out images; ``num_leaks`` is the number of
    held-out images that are also among the training images, as far as they were compared;
    ``inspect_s`` are the seconds that this took, mostly for decoding images whose fingerprints were
    not on disk. ``taps`` are the tensors of several taps, ``measured`` is the frozen part in int8,
    if it was measured to resolve ``precision="auto"``; ``l2_sp`` holds the pretrained weights, if
    the option is set.
    """

    request: RunRequest
    options: ResolvedOptions
    run_dir: Path
    classifier: Classifier
    stages: list[Stage]
    train: Split
    held_out: Split
    fingerprint: dict[str, Any]
    num_leaks: int = 0
    taps: list[str] = field(default_factory=list)
    inspect_s: float = 0.0
    measured: QuantizedPrefix | None = None
    l2_sp: L2SP | None = None

    @property
    def replicas(self) -> Replicas:
        return self.request.replicas

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.options.batch_size)

    @property
    def last_cut(self) -> str:
        return self.stages[-1].cut

    @property
    def mixed_precision(self) -> str | None:
        """The mixed precision of the run, as a Keras dtype policy, if it has one."""
        precision = self.options.precision
        return precision if precision in MIXED_PRECISIONS else None

    def split(self, stage: Stage) -> tuple[GraphLayer | None, keras.Sequential]:
        """The frozen and the trained part of the classifier, in the precision of the run."""
        return self.classifier.split(stage.cut, stage.freeze_from, dtype=self.mixed_precision)

    @property
    def config(self) -> dict[str, Any]:
        """Content of ``config.yaml``: the resolved options, and the sources of model and images."""
        cuts = {"freeze_until": self.last_cut, "freeze_from": self.stages[-1].freeze_from}
        options = dataclasses.asdict(self.options) | cuts
        if self.options.solver != "gradient":
            used = {name: v for name, v in options.items() if name not in OF_GRADIENT_DESCENT}
            return {**self.request.origin, **used, "out": self.run_dir}
        if self.options.schedule is not None:
            options["schedule"] = ",".join(map(str, self.stages))
        else:
            stage = self.stages[-1]
            options["epochs"] = stage.epochs
            options["learning_rate"] = stage.learning_rate
            options["backbone_lr_scale"] = stage.backbone_lr_scale
        return {**self.request.origin, **options, "out": self.run_dir}

    @property
    def cache_policy(self) -> CachePolicy:
        options = self.options
        return CachePolicy(
            options.cache, options.cache_dir, options.cache_limit, options.cache_dtype
        )

    def progress(self, batches: Iterable[Any], title: str) -> Iterable[Any]:
        """The same batches, with a progress bar unless the run is silent."""
        return measurement.progress(batches, title) if self.request.verbose else batches
