"""Speed-up by several workers: a performance model, and its check with two processes.

    python benchmarks/scaling.py model
    python benchmarks/scaling.py check

``model`` prints the bytes that VGG16 exchanges per step for each cut, and the expected speed-up of
1 to 256 workers; its flags are the assumptions. ``check`` measures steps of two workers with one
core each, without and with communication, and an exchange alone. The model should predict the time
of steps with communication from the other two.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from replicas import Process, start_workers

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CUTS = ("fc7", "pool4", "none")
NUM_CLASSES = 10
STEPS = 12
BATCH = 32
SMALL, LARGE = 1, 2_500_000  # elements per exchange, to separate latency from bandwidth
EXCHANGES = 2  # per step: the number of examples, and the gradients


def step_seconds(
    workers: int, compute_s: float, gradient_bytes: float, bandwidth: float, latency: float
) -> float:
    """Seconds of a training step with several workers: an all-reduce of a few bytes, the
    arithmetic, and a ring all-reduce of the gradients, in which each worker sends ``2 (workers - 1)
    / workers`` times their size in ``2 (workers - 1)`` messages (Patarasuk and Yuan, doi
    10.1016/j.jpdc.2008.09.002). Communication and arithmetic do not overlap."""
    sent = 2 * (workers - 1) / workers * gradient_bytes
    return compute_s + sent / bandwidth + EXCHANGES * 2 * (workers - 1) * latency


def print_model(options: argparse.Namespace) -> None:
    rows, expected = [], []
    for name, share, trained in vgg16_cuts():
        # Forward pass, gradients of inputs and of weights: three times the forward pass.
        compute_s = options.batch * 3 * options.forward * (1 - share)
        compute_s = max(compute_s, 1e-3)  # overhead of calls and copies
        gradient_bytes = 4 * trained
        rows.append([name, f"{trained:,}", f"{gradient_bytes / 1e6:,.1f}", f"{compute_s:.3g}"])
        seconds = [
            step_seconds(n, compute_s, gradient_bytes, options.bandwidth, options.latency)
            for n in WORKERS
        ]
        speedups = [n * seconds[0] / s for n, s in zip(WORKERS, seconds, strict=True)]
        expected.append([name, *(f"{speedup:.3g}" for speedup in speedups)])
    headers = ["frozen until", "trained", "MB of gradients", "arithmetic per step, s"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True), end="\n\n")
    headers = ["frozen until", *map(str, WORKERS)]
    print(tabulate(expected, headers, tablefmt="github", disable_numparse=True))


def vgg16_cuts() -> list[tuple[str, float, int]]:
    """For each cut: its name, the share of the arithmetic before it, and the number of trained
    parameters including a new head."""
    import tensorflow as tf

    from transfer import load_meta_graph
    from transfer.graph.cuts import list_cuts
    from transfer.vgg import architectures

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vgg16.meta")
        graph = architectures.build_graph(architectures.ARCHITECTURES["vgg16"], 1000)
        with graph.as_default():
            tf.compat.v1.train.export_meta_graph(str(path))
        network = load_meta_graph(path).network("fc7:0", "images:0")
    head = (4096 + 1) * NUM_CLASSES
    cuts = [
        (cut.tensor.removesuffix(":0"), cut.share, cut.trained + head)
        for cut in reversed(list_cuts(network, 224))
        if cut.ends_stage
    ]
    total = sum(int(np.prod(variable.shape)) for variable in network.variables)
    return [*cuts, ("none", 0.0, total + head)]


def measure() -> dict[str, Any]:
    """Runs in each process. Seconds, gradient bytes and bytes sent on the loopback interface of a
    step for each cut; and seconds of exchanges of two sizes."""
    import keras
    import psutil
    import tensorflow as tf

    from transfer import Backbone, Classifier, Head, Preprocess, load_meta_graph
    from transfer.core.distribution import open_replicas, sum_over_replicas
    from transfer.training.optimizers import make_optimizer
    from transfer.training.trainer import ParameterGroup, Trainer

    replicas = open_replicas("auto")
    keras.utils.set_random_seed(0)
    graph = load_meta_graph("embedded")
    with replicas.strategy.scope():
        labels = list(map(str, range(NUM_CLASSES)))
        classifier = Classifier(
            Backbone(graph, "fc7"), Head(NUM_CLASSES, seed=0), Preprocess("torch", 64), labels
        )
        classifier.build_from_size()
    images = np.random.default_rng(0).normal(size=(BATCH, 64, 64, 3)).astype(np.float32)
    classes = np.arange(BATCH) % NUM_CLASSES

    def sent() -> int:
        return psutil.net_io_counters(pernic=True)["lo"].bytes_sent

    results: dict[str, Any] = {}
    for cut in CUTS:
        frozen, model = classifier.split(None if cut == "none" else cut)
        inputs = images if frozen is None else np.asarray(frozen(images))
        with replicas.strategy.scope():
            optimizer = make_optimizer("sgd", 1e-3)
            group = ParameterGroup(optimizer, model.trainable_variables)
        trainer = Trainer(model, [group], replicas=replicas)
        seconds = []
        for _ in range(STEPS):
            replicas.barrier()
            before, start = sent(), time.perf_counter()
            trainer.train_step(inputs, classes)
            seconds.append(time.perf_counter() - start)
            replicas.barrier()
            num_bytes = sent() - before
        gradient = sum(int(np.prod(v.shape)) for v in model.trainable_variables) * 4
        results[cut] = {
            "seconds": float(np.median(seconds[2:])),
            "gradient": gradient,
            "sent": num_bytes,
        }
    exchange = tf.function(lambda v: replicas.run(lambda x: sum_over_replicas([x])[0], v))
    for size in (SMALL, LARGE):
        values = tf.zeros([size])
        seconds = []
        for _ in range(STEPS):
            start = time.perf_counter()
            exchange(values).numpy()
            seconds.append(time.perf_counter() - start)
        results[f"exchange of {size}"] = float(np.median(seconds[2:]))
    return results


def print_check() -> None:
    # Both cores are busy in both measurements, since they share caches and clock.
    one, _ = measured([Process(__file__, "measure", cores=[core]) for core in (0, 1)])
    two, _ = measured(start_workers(__file__, "measure", cores=[[0], [1]]))
    small, large = (two[f"exchange of {size}"] for size in (SMALL, LARGE))
    latency, bandwidth = small / 2, 4 * LARGE / (large - small)
    print(f"exchange: {bandwidth / 1e6:,.0f} MB/s, latency {latency * 1e3:.2g} ms\n")
    rows = []
    for cut in CUTS:
        alone, together = one[cut]["seconds"], two[cut]["seconds"]
        gradient = one[cut]["gradient"]
        predicted = step_seconds(2, alone, gradient, bandwidth, latency)
        rows.append([
            cut, f"{gradient / 1e6:.2f}", f"{two[cut]['sent'] / 2e6:.2f}", f"{alone * 1e3:.1f}",
            f"{together * 1e3:.1f}", f"{predicted * 1e3:.1f}", f"{2 * alone / together:.2f}",
            f"{2 * alone / predicted:.2f}",
        ])  # fmt: skip
    headers = ["frozen until", "MB of gradients", "MB sent by each", "1 worker, ms",
               "2 workers, ms", "ms, model", "speed-up", "speed-up, model"]  # fmt: skip
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def measured(processes: list[Process]) -> list[dict[str, Any]]:
    """The results that the processes printed."""
    outputs = []
    for process in processes:
        status, output = process.wait()
        if status:
            raise RuntimeError(output)
        outputs.append(json.loads(output.splitlines()[-1]))
    return outputs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    model = verbs.add_parser("model")
    model.add_argument("--batch", type=int, default=32, help="images per worker and step")
    model.add_argument("--bandwidth", type=float, default=1.25e9, help="bytes/s per worker")
    model.add_argument("--latency", type=float, default=5e-5, help="seconds per message")
    model.add_argument(
        "--forward", type=float, default=0.16, help="forward pass, seconds per image"
    )
    verbs.add_parser("check")
    verbs.add_parser("measure")
    options = parser.parse_args()
    if options.verb == "model":
        print_model(options)
    elif options.verb == "check":
        if not shutil.which("taskset"):
            sys.exit("check needs taskset, to pin each worker to its own core")
        print_check()
    else:
        print(json.dumps(measure()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
