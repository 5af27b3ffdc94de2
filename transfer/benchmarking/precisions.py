"""Precisions of a network compared on the images of a run: speed, and distance from float32."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from tabulate import tabulate

from transfer.activations.extraction import EXTRACTION_BATCH, Compiled
from transfer.benchmarking.product_rates import product_gflops
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest
from transfer.finetuning.setup import prepare
from transfer.graph.cuts import list_cuts
from transfer.layers.graph_layer import MIXED_PRECISIONS, GraphLayer
from transfer.layers.head import average_over_space
from transfer.quantization import engines
from transfer.quantization.agreement import feature_error
from transfer.quantization.calibration import CalibrationImages
from transfer.quantization.engines import Engine
from transfer.runs import run_folder

RESULTS = "precisions.json"
_PASSES = 5  # of which the fastest counts: other programs may slow one down

_EXPLAINED = """\
A forward pass of the network, without the input pipeline. Largest difference: of a feature from
float32; error: root mean square of the difference, relative to the standard deviation over the
images. Limit: convolutions of many channels in the same precision."""


@dataclass(frozen=True)
class PrecisionResult:
    """A network in one precision.

    ``ratio`` is the speed relative to float32. ``largest_difference`` is the largest absolute
    difference of a feature from float32, ``error`` their ``feature_error``. ``gflops`` counts the
    multiplications and additions of the forward pass, ``None`` if they are unknown;
    ``limit_gflops`` is the rate of convolutions of many channels in this precision.
    """

    precision: str
    images_per_s: float
    ratio: float
    largest_difference: float
    error: float
    gflops: float | None
    limit_gflops: float

    @property
    def of_limit(self) -> float | None:
        """Fraction of the limit that the network reaches."""
        return None if self.gflops is None else self.gflops / self.limit_gflops


def compare_precisions(request: RunRequest, precisions: Sequence[str]) -> list[PrecisionResult]:
    """Compute the features of one batch of training images in several precisions, and write
    ``precisions.json`` into the run folder. Nothing is trained.

    Args:
        request: as for ``fine_tune``; the network is that up to its tap.
        precisions: values of the option ``precision`` other than ``auto``; float32, with which the
            others are compared, is measured in any case.

    Raises:
        ValueError: for an unknown precision, one in which the network cannot be computed, or images
            that are all alike.
    """
    known = [p for p in get_args(FineTuneOptions.__annotations__["precision"]) if p != "auto"]
    if unknown := [name for name in precisions if name not in known]:
        raise ValueError(f"precisions must be among {', '.join(known)}; got {', '.join(unknown)}")
    options = dataclasses.replace(request.options.head_only(), precision="float32")
    work = prepare(dataclasses.replace(request, options=options))
    layer, preprocess = work.classifier.feature_extractor, work.classifier.preprocess
    engine = engines.engine_of(options.int8_engine)
    calibration = CalibrationImages(work.train, preprocess, options.seed)
    batches = work.train.batches(preprocess, EXTRACTION_BATCH, shuffle_seed=options.seed)
    images = np.asarray(next(iter(batches))[0])
    names = list(dict.fromkeys(["float32", *precisions]))
    versions = {name: _version(name, layer, engine, calibration) for name in names}
    features = {
        name: np.asarray(average_over_space(version(images)))  # the first call compiles
        for name, version in versions.items()
    }
    if not np.ptp(features["float32"], axis=0).any():
        raise ValueError(
            f"the features of the training images ({len(images)}) do not differ, and errors are "
            "relative to their standard deviation; give at least two different images"
        )
    seconds = dict.fromkeys(names, float("inf"))
    for _ in range(_PASSES):
        for name, version in versions.items():  # alternating, as a machine's speed varies
            start = time.perf_counter()
            np.asarray(version(images))
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    cuts = list_cuts(layer.network, preprocess.size)
    work_per_image = cuts[-1].multiply_adds if cuts else None
    results = []
    for name in names:
        rate = len(images) / seconds[name]
        results.append(
            PrecisionResult(
                name,
                images_per_s=round(rate, 2),
                ratio=round(seconds["float32"] / seconds[name], 3),
                largest_difference=float(np.abs(features[name] - features["float32"]).max()),
                error=feature_error(features["float32"], features[name]),
                gflops=None if work_per_image is None else round(2e-9 * work_per_image * rate, 1),
                limit_gflops=product_gflops(name, engine),
            )
        )
    facts = {"int8_engine": engine, "precisions": [dataclasses.asdict(item) for item in results]}
    with run_folder.opened(work.run_dir, work.config):
        run_folder.write_json(work.run_dir / RESULTS, facts)
    return results


def describe(results: Sequence[PrecisionResult]) -> str:
    """A table of the results."""
    rows = [
        [
            item.precision,
            f"{item.images_per_s:,.1f}",
            f"{item.ratio:.2f}",
            f"{item.largest_difference:.2g}",
            f"{item.error:.2g}",
            "" if item.gflops is None else f"{item.gflops:,.1f}",
            f"{item.limit_gflops:,.1f}",
            "" if item.of_limit is None else f"{item.of_limit:.0%}",
        ]
        for item in results
    ]
    header = [
        "precision",
        "images/s",
        "of float32",
        "largest difference",
        "error",
        "GFLOP/s",
        "limit GFLOP/s",
        "of limit",
    ]
    table = tabulate(
        rows,
        header,
        "github",
        disable_numparse=True,  # keeps the formatted digits
        colalign=["left"] + ["right"] * (len(header) - 1),
    )
    return f"{table}\n\n{_EXPLAINED}"


def _version(
    name: str, layer: GraphLayer[Any], engine: Engine, calibration: CalibrationImages
) -> Callable[[Any], Any]:
    """The network in a precision, as a function of preprocessed images."""
    if name in MIXED_PRECISIONS:
        return Compiled(layer.in_mixed_precision(name))
    if name == "int8":
        engines.check_installed(engine)
        images, _ = calibration.read()
        return engines.quantize(engine, layer, images)
    return Compiled(layer)
