"""Which combinations of a study can be run, told before the first run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transfer.benchmarking.study_results import show_point
from transfer.finetuning.hyperparameters import requested_stages
from transfer.finetuning.model_plan import plan_model
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest
from transfer.finetuning.tap_choice import AUTO
from transfer.graph import canonical, cut
from transfer.images.preprocess import parse_size
from transfer.models.plan import ModelPlan, cut_tensor

_MAX_SEED = 2**32 - 1  # of NumPy
_OF_MODEL = ("tap", "input", "keep_dropout", "use_ema", "preprocess", "image_size")


def inapplicable(request: RunRequest, points: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """For each combination the reason why its options exclude each other, ``None`` if they do not.

    Args:
        request: as for ``study``.
        points: the options of each combination.

    Raises:
        ValueError: names a combination, if none is possible, or if one has a value that is wrong
            whatever the other options are, such as an unknown tensor or a number out of range.
    """
    cells = _Cells(request)
    reasons = [cells.reason(dataclasses.replace(request.options, **point)) for point in points]
    possible = [point for point, reason in zip(points, reasons, strict=True) if reason is None]
    usable = {(name, repr(value)) for point in possible for name, value in point.items()}
    for point, reason in zip(points, reasons, strict=True):
        if reason is None:
            continue
        is_wrong = not possible or any(
            (name, repr(value)) not in usable
            # With all other options at their defaults, nothing else can be the reason.
            and cells.reason(FineTuneOptions(**{name: value})) is not None
            for name, value in point.items()
        )
        if is_wrong:
            raise ValueError(f"{show_point(point)}: {reason}")
    return reasons


class _Cells:
    """Checks options against a model and images, with one plan per network."""

    def __init__(self, request: RunRequest):
        self._request = request
        self._plans: dict[Any, ModelPlan | str] = {}
        self._cuts: dict[Any, str | None] = {}
        labels, self._classes = request.train.labels, request.train.source.class_names
        self._counts = np.bincount(labels, minlength=len(self._classes))

    def reason(self, options: FineTuneOptions) -> str | None:
        """Why a run with these options is impossible; ``None`` if nothing is known against it."""
        try:
            options.check()
            self._check_images(options)
            self._check_model(options)
        except ValueError as error:
            return str(error)
        return None

    def _check_images(self, options: FineTuneOptions) -> None:
        if not 0 <= options.seed <= _MAX_SEED:
            raise ValueError(f"seed must be 0 to {_MAX_SEED}, got {options.seed}")
        shots, num_images = options.shots_per_class, int(self._counts.sum())
        if shots is not None:
            fewest = int(self._counts.argmin())
            if shots > self._counts[fewest]:
                raise ValueError(
                    f"class {self._classes[fewest]!r} has {self._counts[fewest]} training images; "
                    f"{shots} per class were asked for"
                )
            num_images = shots * len(self._classes)
        if options.batch_size is not None and options.batch_size > num_images:
            raise ValueError(
                f"batch_size={options.batch_size} does not fit {num_images} training images; "
                f"choose 1 to {num_images}"
            )

    def _check_model(self, options: FineTuneOptions) -> None:
        if options.image_size is not None:
            parse_size(options.image_size)
        cuts = [stage.cut for stage in requested_stages(options)]
        is_known = options.tap != AUTO  # else each run chooses its own
        trained = [name for name in cuts if name == "none"]
        trained += [name for name in cuts if is_known and not self._is_tap(options, name)]
        uses_penalty = options.solver == "auto" and options.lbfgs_c is not None
        solver = "lbfgs" if uses_penalty else options.solver
        if solver in ("ridge", "lbfgs") and trained:
            raise ValueError(
                f"solver={solver} fits a head on frozen features; freeze_until={trained[0]} trains "
                "more than that, for which there is solver=gradient"
            )
        if options.l2_sp and is_known and not trained:
            raise ValueError(
                f"l2_sp={options.l2_sp} is a penalty on weights of the backbone, and the run "
                "trains none of them"
            )

    def _is_tap(self, options: FineTuneOptions, name: str) -> bool:
        """Whether a cut, that of a stage, is the tap.

        Raises:
            ValueError: if the network cannot be planned, or not cut there.
        """
        key = tuple(getattr(options, option) for option in _OF_MODEL)
        if key not in self._plans:
            try:
                self._plans[key] = plan_model(self._request.graph, options, self._request.feeds)
            except ValueError as error:
                self._plans[key] = str(error)
        planned = self._plans[key]
        if isinstance(planned, str):
            raise ValueError(planned)
        if name in ("tap", "none"):
            return name == "tap"
        network = planned.network
        tensor = cut_tensor(self._request.graph, network, name)
        if (key, tensor) not in self._cuts:
            self._cuts[key, tensor] = None
            try:
                cut(network, tensor)
            except ValueError as error:
                self._cuts[key, tensor] = f"tap={options.tap}, freeze_until={name}: {error}"
        if problem := self._cuts[key, tensor]:
            raise ValueError(problem)
        return tensor == canonical(network.output)
