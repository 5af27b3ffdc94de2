"""FLOP rate of full fine-tuning of VGG16, relative to the processor's rate of matrix products.

    python benchmarks/training.py --steps 6

Training steps and matrix products alternate, so that varying speed of the machine affects both
alike. Prints the GFLOP/s of the arithmetic that training needs, of the matrix products before and
after each step, and their ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as on the command line

import keras
import numpy as np

from transfer import Backbone, Head, load_meta_graph, save_meta_graph
from transfer.benchmarking.report import training_multiply_adds
from transfer.core.measurement import sgemm_gflops
from transfer.graph.cuts import list_cuts
from transfer.training.optimizers import make_optimizer
from transfer.training.trainer import ParameterGroup, Trainer
from transfer.vgg import architectures

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "vgg16"
        architecture = architectures.ARCHITECTURES["vgg16"]
        save_meta_graph(
            architectures.build_graph(architecture, 5),
            prefix,
            architectures.random_weights(architecture, 5),
        )
        backbone = Backbone(load_meta_graph(prefix), "fc7")
    model = keras.Sequential([backbone, Head(5)])
    images = np.random.default_rng(0).normal(size=(BATCH, 224, 224, 3)).astype(np.float32)
    labels = np.arange(BATCH) % 5
    model(images[:1])
    optimizer = make_optimizer("adam", 1e-6)
    trainer = Trainer(model, [ParameterGroup(optimizer, model.trainable_variables)])
    needed = training_multiply_adds("none", list_cuts(backbone.network, 224))
    trainer.train_step(images, labels)  # traces the function and allocates memory
    ratios, before = [], sgemm_gflops()
    for _ in range(steps):
        start = time.perf_counter()
        trainer.train_step(images, labels)
        seconds = time.perf_counter() - start
        after = sgemm_gflops()
        reached, possible = 2e-9 * needed * BATCH / seconds, (before + after) / 2
        before = after
        ratios.append(reached / possible)
        print(
            f"step {seconds:.2f} s, {BATCH / seconds:.2f} images/s: {reached:.1f} of "
            f"{possible:.1f} GFLOP/s, {ratios[-1]:.1%}",
            flush=True,
        )
    print(f"median {statistics.median(ratios):.1%}")


if __name__ == "__main__":
    main()
