"""Time that training is held up by a checkpoint of a full VGG16, and peak memory.

    python benchmarks/checkpointing.py --steps 12

Steps of one image, with Adam: 138 million parameters and twice as many values of the optimizer. The
same training is measured without checkpoints, with checkpoints for which it waits, and with
checkpoints that are written in the background. Each is the best so far, so that the weights are
written twice, as at the end of an epoch: 2.2 GB in all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as on the command line

import keras
import numpy as np
import psutil
from tabulate import tabulate

from transfer import Backbone, Head, load_meta_graph, save_meta_graph
from transfer.training.checkpoints import RunCheckpoint
from transfer.training.optimizers import make_optimizer
from transfer.training.trainer import ParameterGroup, Trainer
from transfer.vgg import architectures


class PeakMemory(threading.Thread):
    """Largest resident memory in MB while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.megabytes, self._ended = 0.0, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.05):
            self.megabytes = max(self.megabytes, psutil.Process().memory_info().rss / 1e6)

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self.join()


def new_trainer(folder: Path) -> Trainer:
    architecture = architectures.ARCHITECTURES["vgg16"]
    save_meta_graph(
        architectures.build_graph(architecture, 5),
        folder / "vgg16",
        architectures.random_weights(architecture, 5),
    )
    model = keras.Sequential([Backbone(load_meta_graph(folder / "vgg16"), "fc7"), Head(5)])
    model(np.zeros((1, 224, 224, 3), np.float32))
    optimizer = make_optimizer("adam", 1e-6)
    return Trainer(model, [ParameterGroup(optimizer, model.trainable_variables)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="steps after each checkpoint")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    images = np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32)
    labels = np.zeros(1, np.int64)
    modes = ("none", "waiting", "background")
    held_up: dict[str, list[float]] = {mode: [] for mode in modes}
    steps: dict[str, list[float]] = {mode: [] for mode in modes}
    memory = dict.fromkeys(modes, 0.0)
    with tempfile.TemporaryDirectory() as name:
        trainer = new_trainer(Path(name))
        trainer.train_step(images, labels)  # traces the function and allocates memory
        checkpoint = RunCheckpoint(Path(name) / "checkpoints", keep=1)
        checkpoint.begin()
        for mode in modes * options.repeats:
            with PeakMemory() as peak:
                start = time.perf_counter()
                if mode != "none":
                    trainer.epoch += 1
                    checkpoint.save_best(trainer)
                    checkpoint.save(trainer)
                if mode == "waiting":
                    checkpoint.wait()
                held_up[mode].append(time.perf_counter() - start)
                start = time.perf_counter()
                for _ in range(options.steps):
                    trainer.train_step(images, labels)
                steps[mode].append((time.perf_counter() - start) / options.steps)
                start = time.perf_counter()
                checkpoint.wait()
            print(
                f"{mode}: held up for {held_up[mode][-1]:.2f} s, a step took "
                f"{steps[mode][-1]:.2f} s, peak {peak.megabytes:,.0f} MB; after {options.steps} "
                f"steps, {time.perf_counter() - start:.1f} s of writing were left",
                flush=True,
            )
            memory[mode] = max(memory[mode], peak.megabytes)
    rows = [
        [mode, statistics.median(held_up[mode]), statistics.median(steps[mode]), memory[mode]]
        for mode in modes
    ]
    headers = ["checkpoint", "held up s", "s/step", "peak MB"]
    print(tabulate(rows, headers, "github", floatfmt=",.2f"))


if __name__ == "__main__":
    main()
