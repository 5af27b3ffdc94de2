"""Time and memory of loading a model, compared with only reading the same bytes.

    python benchmarks/loading.py --arch vgg16 --repeat 3

Writes a full-size meta graph with random weights to a temporary folder, so that its files are in
the page cache. Then measures these, in separate processes, one after the other:

* ours: ``load_meta_graph`` and ``Backbone``;
* plain: reads the bytes of the same variables from the checkpoint file into arrays, and assigns
  them to the weights of a Keras layer;
* strict: the same, but each weight is initialized with its value instead of zeros;
* stock: ``import_meta_graph`` and ``Saver.restore``, which also read what the tap does not need.

Memory is the peak above the memory of the process after TensorFlow, Keras and ``transfer`` were
imported. It is read from ``/proc``: Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
DATA = ".data-00000-of-00001"
MAX_MEMORY = 1.3  # times the size of the values that are read
MAX_TIME = 1.5  # times the time of plain reading

Measurements = dict[str, float]


def peak_memory() -> int:
    """Peak memory since ``reset_peak_memory`` in bytes; current memory without ``/proc``."""
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 if match else psutil.Process().memory_info().rss


def reset_peak_memory() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def make(prefix: Path, arch: str, tap: str) -> Measurements:
    """Write the meta graph, and ``layout.json`` with the offsets of the tap's variables in the
    checkpoint file."""
    from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto

    from transfer import load_meta_graph, save_meta_graph
    from transfer.models.checkpoint_index import table
    from transfer.vgg import architectures

    architecture = architectures.ARCHITECTURES[arch]
    values = architectures.random_weights(architecture, 1000)
    save_meta_graph(architectures.build_graph(architecture, 1000), prefix, values)
    index = dict(table(prefix.with_name(f"{arch}.index").read_bytes()))
    layout = []
    for variable in load_meta_graph(prefix).network(tap).variables:
        entry = BundleEntryProto.FromString(index[variable.name.encode()])
        layout.append([variable.name, list(values[variable.name].shape), entry.offset])
    prefix.with_name("layout.json").write_text(json.dumps(layout))
    with open(f"{prefix}{DATA}", "rb") as file:  # so that it is in the page cache
        while file.read(1 << 24):
            pass
    read = sum(values[name].nbytes for name, *_ in layout)
    return {"values": read, "file": os.path.getsize(f"{prefix}{DATA}")}


def ours(prefix: Path, tap: str, stage: Callable[[str], Any]) -> Any:
    from transfer import Backbone, load_meta_graph

    with stage("load_meta_graph"):
        graph = load_meta_graph(prefix)
    with stage("Backbone"):
        return Backbone(graph, tap)


def plain(prefix: Path, tap: str, stage: Callable[[str], Any]) -> Any:
    return _plain(prefix, stage, assign=True)


def strict(prefix: Path, tap: str, stage: Callable[[str], Any]) -> Any:
    return _plain(prefix, stage, assign=False)


def _plain(prefix: Path, stage: Callable[[str], Any], assign: bool) -> Any:
    import keras

    layer = keras.layers.Layer()
    with open(f"{prefix}{DATA}", "rb", buffering=0) as file:
        for name, shape, offset in json.loads(prefix.with_name("layout.json").read_text()):
            array = np.empty(shape, np.float32)
            with stage("reading"):
                file.seek(offset)
                view = memoryview(array).cast("B")
                while view:
                    view = view[file.readinto(view) :]
            with stage("weights"):
                start = "zeros" if assign else _initializer(array)
                weight = layer.add_weight(shape, start, name=name.replace("/", "."))
                if assign:
                    weight.assign(array)
    return layer


def _initializer(value: Any) -> Callable[..., Any]:
    return lambda shape, dtype: value


def stock(prefix: Path, tap: str, stage: Callable[[str], Any]) -> Any:
    import tensorflow as tf

    tf1 = tf.compat.v1
    with tf.Graph().as_default() as graph:
        with stage("import_meta_graph"):
            saver = tf1.train.import_meta_graph(f"{prefix}.meta")
        with stage("restore"):
            session = tf1.Session(graph=graph)
            saver.restore(session, str(prefix))
    return session


PARTS = {"ours": ours, "plain": plain, "strict": strict, "stock": stock}


def touch_memory(size: int = 2**31) -> None:
    """Allocate memory and release it. On a virtual machine, memory that was not used for a while
    is slow at first, which would favour whatever allocates less."""
    with mmap.mmap(-1, size) as memory:
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1


def measure(part: str, prefix: Path, tap: str) -> Measurements:
    """Seconds and bytes of one way of loading, measured in this process."""
    import keras  # noqa: F401
    import tensorflow as tf

    import transfer  # noqa: F401

    (tf.constant(1) + 1).numpy()
    gc.collect()
    touch_memory()
    stages: Measurements = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        stages[name] = stages.get(name, 0.0) + time.perf_counter() - begin

    process = psutil.Process()
    reset_peak_memory()
    before, begin, cpu = process.memory_info().rss, time.perf_counter(), time.process_time()
    loaded = PARTS[part](prefix, tap, stage)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    measured = {"seconds": seconds, "cpu": cpu_seconds, "peak": peak_memory() - before}
    measured["kept"] = process.memory_info().rss - before
    del loaded
    return measured | stages


def run_in_process(part: str, prefix: Path, arch: str, tap: str) -> Measurements:
    command = [sys.executable, __file__, "--part", part, "--prefix", str(prefix)]
    command += ["--arch", arch, "--tap", tap]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{part} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def show(size: Measurements, runs: dict[str, list[Measurements]]) -> None:
    medians = {
        part: {key: statistics.median(run[key] for run in repeats) for key in repeats[0]}
        for part, repeats in runs.items()
    }
    print(f"{size['values'] / 1e6:.0f} MB of values, in a file of {size['file'] / 1e6:.0f} MB")
    print(f"\n{'':7}{'s':>7}{'CPU s':>7}{'peak MB':>9}{'kept MB':>9}{'/values':>9}{'/file':>7}")
    for part, median in medians.items():
        stages = [key for key in median if key not in ("seconds", "cpu", "peak", "kept")]
        print(
            f"{part:7}{median['seconds']:7.2f}{median['cpu']:7.2f}{median['peak'] / 1e6:9.0f}"
            f"{median['kept'] / 1e6:9.0f}{median['peak'] / size['values']:9.2f}"
            f"{median['peak'] / size['file']:7.2f}   "
            + ", ".join(f"{key} {median[key]:.2f} s" for key in stages)
        )
    memory = medians["ours"]["peak"] / size["values"]
    print(
        f"\nmemory: {memory:.2f} of the values (at most {MAX_MEMORY}): {_met(memory, MAX_MEMORY)}"
    )
    for part in ("plain", "strict"):
        ratio = medians["ours"]["seconds"] / medians[part]["seconds"]
        print(f"time: {ratio:.2f} of {part} (at most {MAX_TIME}): {_met(ratio, MAX_TIME)}")


def _met(value: float, limit: float) -> str:
    return "met" if value <= limit else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="vgg16")
    parser.add_argument("--tap", default="fc7")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--part", choices=["make", *PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--prefix", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    arch, tap = options.arch, options.tap
    if options.part:
        sys.path.insert(0, str(ROOT))
        if options.part == "make":
            measured = make(options.prefix, arch, tap)
        else:
            measured = measure(options.part, options.prefix, tap)
        print(json.dumps(measured))
        return
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, arch)
        size = run_in_process("make", prefix, arch, tap)
        runs: dict[str, list[Measurements]] = {part: [] for part in PARTS}
        for _ in range(options.repeat):
            for part in PARTS:
                runs[part].append(run_in_process(part, prefix, arch, tap))
    show(size, runs)


if __name__ == "__main__":
    main()
