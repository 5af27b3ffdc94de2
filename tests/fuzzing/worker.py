"""A worker process that tries inputs one after the other."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import ROOT, Base, Result, pick
from inputs import make_input
from models import make_bases
from weights import tiny_architecture

Report = Callable[[str, Any], None]


def peak_memory() -> int:
    """Peak memory since ``reset_peak_memory``, if the system reports it."""
    with contextlib.suppress(OSError):
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if match:
            return int(match[1]) * 1024
    return psutil.Process().memory_info().rss


def reset_peak_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def try_input(base: Base, folder: Path, report: Report) -> dict[str, Any]:
    """Load, inspect, build and call an input; reports the start of each stage."""
    import tensorflow as tf

    from transfer import Backbone, load_meta_graph
    from transfer.models.inspection import inspect
    from transfer.vgg.published import containers, layouts

    def build() -> Backbone:
        tap = base.tap
        if base.kind == "card":
            tap = graph.card.tap or tap
            graph.preprocess(graph.network(tap).input)
        return Backbone(graph, tap, input=base.input, feeds=base.feeds, pooling=None)

    def call() -> None:
        batch = np.random.default_rng(0).integers(0, 2, base.shape).astype(base.dtype)
        tf.nest.map_structure(lambda tensor: tensor.numpy(), backbone(batch))

    stage = ""
    try:
        if base.kind == "weights":
            tiny_architecture()
            report("stage", stage := "load")
            container = containers.read(folder / base.path)
            report("stage", stage := "identify")
            is_unknown = container.backend == "" and container.model is None
            layouts.identify(container, kernels="flipped" if is_unknown else "auto")
            return {"outcome": "fine", "stage": stage}
        report("stage", stage := "load")
        graph = load_meta_graph(folder / base.path)
        report("stage", stage := "inspect")
        with contextlib.suppress(ValueError, OSError):  # may work for models that cannot be built
            inspect(graph)
            graph.repaired()
        report("stage", stage := "build")
        backbone = build()
        report("stage", stage := "call")
        call()
        return {"outcome": "fine", "stage": stage}
    except Exception as error:
        clean: tuple[type[BaseException], ...] = (ValueError, OSError)
        if stage == "call":
            clean = (ValueError, tf.errors.InvalidArgumentError, tf.errors.ResourceExhaustedError)
        outcome = "call error" if stage == "call" else "refused"
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return {
            "outcome": outcome if isinstance(error, clean) else "unexpected",
            "stage": stage,
            "error": type(error).__name__,
            "message": str(error)[:2000],
            "where": f"{Path(frame.filename).name}:{frame.lineno} {frame.name}",
            "trace": "".join(traceback.format_exception(error))[-6000:],
        }


def try_number(
    kind: str, number: int, bases: Sequence[Base], scratch: Path, report: Report
) -> Result:
    """Make an input from its number and try it; negative numbers are the unchanged models."""
    report("stage", "mutate")
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        if number < 0:
            base, done = bases[-1 - number], ""
            folder_tried = base.folder
        else:
            rng = np.random.default_rng([zlib.crc32(kind.encode()), number])
            complete = [base for base in bases if base.complete]
            base = pick(complete if rng.random() < 0.8 else bases, rng)
            donor = pick(bases, rng)
            folder_tried = folder / "model"
            done = make_input(base, donor, folder_tried, rng)
        report("made", (base.name, done))
        reset_peak_memory()
        before, start = psutil.Process().memory_info().rss, time.monotonic()
        found = try_input(base, folder_tried, report)
        seconds, growth = time.monotonic() - start, peak_memory() - before
        return Result(
            kind, number, base=base.name, mutation=done, seconds=seconds, growth=growth, **found
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def work(connection: multiprocessing.connection.Connection, log: Path, scratch: Path) -> None:
    """Serve a supervisor: receives ``("bases", root, wild)`` and ``("input", kind, number,
    bases)``."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"}
    sys.path.insert(0, str(ROOT))
    import keras
    import tensorflow as tf

    import transfer  # noqa: F401

    # Keras replaces TensorFlow's errors by its own with longer messages.
    keras.config.disable_traceback_filtering()
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.constant(0)
    with contextlib.suppress(OSError, ValueError):  # the supervisor may be too slow to receive it
        limit = psutil.Process().memory_info().vms + 6 * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    connection.send(("ready", None))

    def report(order: str, content: Any) -> None:
        connection.send((order, content))

    tried = 0
    while (job := connection.recv()) is not None:
        order, *arguments = job
        if order == "bases":
            connection.send(("done", make_bases(*arguments)))
            continue
        os.ftruncate(output, 0)
        os.lseek(output, 0, os.SEEK_SET)
        result = try_number(*arguments, scratch, report)
        tried += 1
        if tried % 25 == 0:  # as slow as an input
            keras.backend.clear_session()
        connection.send(("done", result))
