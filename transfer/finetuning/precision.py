"""The precision in which the network of a run computes."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from typing import Any, Literal

import tensorflow as tf

from transfer.activations.extraction import Compiled
from transfer.core.distribution import Replicas
from transfer.data.dataset import Split
from transfer.finetuning.options import ResolvedOptions
from transfer.graph import cut as graph_cut
from transfer.graph import is_seeded
from transfer.graph.mixed_precision import num_products
from transfer.images.preprocess import Preprocess
from transfer.layers.graph_layer import GraphLayer
from transfer.quantization import engines
from transfer.quantization.agreement import DisagreementError
from transfer.quantization.calibration import CalibrationImages
from transfer.quantization.engines import Engine
from transfer.quantization.prefix import QuantizedPrefix

logger = logging.getLogger(__name__)

MIN_IMAGES = 500
"""With fewer images, ``auto`` keeps float32: calibration would take longer than int8 saves."""
MAX_TIME_RATIO = 0.8
"""Largest time of int8, relative to float32, for which ``auto`` takes it: the calibration must pay
off as well."""


@dataclass(frozen=True)
class PrecisionChoice:
    """Resolved precision. ``measured`` is what ``auto`` quantized to decide, on the chief."""

    precision: Literal["float32", "int8", "mixed_bfloat16", "mixed_float16"]
    engine: Literal["auto", "litert", "openvino"] = "auto"
    measured: QuantizedPrefix | None = None

    def applied(self, options: ResolvedOptions) -> ResolvedOptions:
        """The options with this precision."""
        return dataclasses.replace(options, precision=self.precision, int8_engine=self.engine)


def choose(
    options: ResolvedOptions,
    backbone: GraphLayer[Any],
    cuts: list[str],
    images: CalibrationImages,
    *,
    num_images: int,
    replicas: Replicas,
) -> PrecisionChoice:
    """Resolve the options ``precision`` and ``int8_engine``.

    Args:
        options: the options of the run, those of the run to resume applied.
        backbone: the network.
        cuts: the cut of each stage, ``none`` if nothing is frozen.
        images: images to calibrate and compare on.
        num_images: number of images, or views of images, to compute.
        replicas: devices and processes that train together; all take the choice of the chief.

    Raises:
        ValueError: if int8 or mixed precision was asked for and is impossible.
    """
    if options.precision == "float32":
        return PrecisionChoice("float32")
    if options.precision in ("mixed_bfloat16", "mixed_float16"):
        _check_mixed(options, backbone, cuts, replicas)
        return PrecisionChoice(options.precision)
    prefixes = [_prefix(backbone, name) for name in dict.fromkeys(cuts) if name != "none"]
    engine = engines.engine_of(options.int8_engine)
    problem = _problem(prefixes)
    if options.precision == "int8":
        if problem:
            raise ValueError(f"precision=int8 computes the frozen part, and {problem}")
        engines.check_installed(engine)
        return PrecisionChoice("int8", engine)
    if not problem and num_images < MIN_IMAGES:
        problem = f"{num_images} images are too few to pay off the calibration"
    if problem:
        logger.info(f"precision: float32, as {problem}")
        return PrecisionChoice("float32")
    engines.check_installed(engine)
    choice = PrecisionChoice("float32")
    if replicas.is_chief:
        choice = _measured(prefixes, engine, images)
    precision, engine = json.loads(replicas.from_chief(json.dumps([choice.precision, engine])))
    if precision == "float32":
        return PrecisionChoice("float32")
    return PrecisionChoice("int8", engine, choice.measured)


def _check_mixed(
    options: ResolvedOptions, backbone: GraphLayer[Any], cuts: list[str], replicas: Replicas
) -> None:
    """Refuse what mixed precision cannot do; warn where it is likely to be slower."""
    precision = options.precision
    if backbone.compute_dtype != "float32" or not num_products(backbone.network):
        raise ValueError(
            f"precision={precision} computes convolutions and matrix products in lower precision, "
            "and the network has none in float32"
        )
    is_head_only = set(cuts) == {backbone.network.output.removesuffix(":0")}
    if precision == "mixed_float16" and replicas.count > 1 and not is_head_only:
        raise ValueError(
            f"precision=mixed_float16 scales the loss on one replica, and there are "
            f"{replicas.count}; mixed_bfloat16 needs no scaling"
        )
    if not tf.config.list_logical_devices("GPU"):
        logger.warning(
            f"precision={precision} without a GPU: most CPUs compute it more slowly than float32; "
            f"`vgg-transfer benchmark --precisions float32,{precision}` measures it"
        )


def _prefix(backbone: GraphLayer[Any], at: str) -> GraphLayer[Any]:
    """The part up to a cut, for inference only: a layer with dropout in training would draw a seed,
    which changes the random numbers of the run."""
    first, _ = graph_cut(backbone.network, backbone.tensor(at))
    variables = dict(zip(backbone.variable_names, backbone.graph_variables, strict=True))
    network = dataclasses.replace(first, training=None)
    return GraphLayer(network, variables, shared=backbone.shared, name=f"{backbone.name}_frozen")


def _problem(prefixes: list[GraphLayer[Any]]) -> str | None:
    """Why int8 is impossible, if it is."""
    if not prefixes:
        return "nothing is frozen"
    if any(is_seeded(prefix.network.graph_def) for prefix in prefixes):
        return "it draws random numbers"
    return None


def _measured(
    prefixes: list[GraphLayer[Any]], engine: Engine, images: CalibrationImages
) -> PrecisionChoice:
    """int8 if it agrees with float32 and is faster, for each frozen part."""
    quantized = None
    for prefix in prefixes:
        quantized = QuantizedPrefix(prefix, Compiled(prefix), engine, images)
        try:
            agreement = quantized.measure()
            agreement.check()
        except (DisagreementError, ValueError) as error:
            logger.info(f"precision: float32; {error}")
            return PrecisionChoice("float32")
        ratio = agreement.time_ratio
        assert ratio is not None
        facts = f"int8 by {engine} takes {ratio:.2f} of the time of float32"
        if ratio > MAX_TIME_RATIO:
            logger.info(f"precision: float32, as {facts} (limit {MAX_TIME_RATIO})")
            return PrecisionChoice("float32")
        logger.info(f"precision: int8, as {facts}; error of the features {agreement.error:.3f}")
    return PrecisionChoice("int8", engine, quantized)


def calibration_images(train: Split, preprocess: Preprocess, seed: int) -> CalibrationImages:
    """The images that determine the ranges of int8. Where images were added to a run, those of the
    first run, so that its activations stay the same."""
    return CalibrationImages(train.of_members()[0], preprocess, seed)
