"""Upper bounds for a benchmark: throughput of matrix multiplication, of a forward pass of the
network, and of the input pipeline."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from transfer.activations.extraction import EXTRACTION_BATCH, Compiled
from transfer.benchmarking.product_rates import product_gflops
from transfer.core import measurement
from transfer.finetuning.request import RunRequest
from transfer.finetuning.setup import prepare
from transfer.quantization import engines
from transfer.runs import run_folder

LIMITS = "limits.json"
_PASSES = 10  # forward passes of one batch
_MAX_IMAGES = 2000  # read by the input pipeline


def measure(request: RunRequest) -> dict[str, Any]:
    """Measure what a run on this machine can reach at most, and write ``limits.json`` into the run
    folder.

    Args:
        request: as for ``fine_tune``; nothing is trained.

    Returns:
        ``sgemm_gflops`` (matrix multiplication), ``int8_gops`` (the same in int8, by the engine
        ``int8_engine``), ``forward_images_per_s`` (network only), ``pipeline_images_per_s`` (read,
        decode, resize, preprocess), and the numbers of images, ``images_training`` and
        ``images_held_out``.
    """
    work = prepare(request)
    preprocess = work.classifier.preprocess
    forward = Compiled(work.classifier.backbone)
    shape = [EXTRACTION_BATCH, *preprocess.shape]
    images = tf.random.stateless_uniform(shape, [0, 0])
    forward(images)  # warm-up: traces the function and allocates its memory

    def passes() -> None:
        for _ in range(_PASSES):
            forward(images).numpy()

    one_pass = _seconds(passes) / _PASSES  # sustained speed, not the best pass
    batches = work.train.batches(preprocess, EXTRACTION_BATCH)
    num_images = min(len(work.train), _MAX_IMAGES)

    def pipeline() -> None:
        for _ in itertools.islice(batches, -(-num_images // EXTRACTION_BATCH)):
            pass

    engine = engines.engine_of(work.options.int8_engine)
    limits: dict[str, Any] = {
        "sgemm_gflops": measurement.sgemm_gflops(),
        "int8_gops": product_gflops("int8", engine),
        "int8_engine": engine,
        "forward_images_per_s": round(EXTRACTION_BATCH / one_pass, 2),
        "pipeline_images_per_s": round(num_images / measurement.best_seconds(pipeline), 1),
        "images_training": len(work.train),
        "images_held_out": len(work.held_out),
    }
    with run_folder.opened(work.run_dir, work.config):
        run_folder.write_json(work.run_dir / LIMITS, limits)
    return limits


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
