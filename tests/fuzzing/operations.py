"""Calls of allowed operations with random arguments, in worker processes.

A call is determined by its number. It is an untrusted graph: an operation whose inputs depend on
the images, with valid or invalid attributes, and with input shapes that are known, partly known or
unknown to shape inference. It is processed like every graph: extracted, its shapes inferred, made a
layer, called and differentiated.

First calls that the library would run in a child process run in the worker itself, which is much
faster. If the worker dies in one, the call is repeated with the child process and must end in a
``ValueError``. If a worker dies at any other point, that is a crash.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import ROOT, Generator, Message, pick

from transfer.graph import extract, free_batch, ranks_of

IMAGES = (2, 6, 6, 3)
CALLS_PER_WORKER = 1000
EXTREME = (0, -1, -2, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, -(2**63))
EQUATIONS = ("ij,jk->ik", "bij,bjk->bik", "...ij,jk", "ii->i", "ij->ji", "ij,ij->", "a,b->ab", "->")
GOOD = ("fine", "refused", "call error", "trial")
Report = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a call; ``trial``: the worker died where the child process would have died."""

    number: int
    outcome: str
    op: str = ""
    message: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome not in GOOD


class Call:
    """The graph of a call, built node by node."""

    def __init__(self, number: int):
        from tensorflow.core.framework.graph_pb2 import GraphDef

        from transfer.core.private_api import find_op_def
        from transfer.graph import policy

        self.rng: Generator = np.random.default_rng(number)
        self.graph_def = GraphDef()
        self.graph_def.versions.producer = 2000
        self._make_images()
        # All operations are equally likely.
        ops = sorted(policy.ALLOWED_OPS - {"Const", "NoOp"})
        self.op = ops[number % len(ops)]
        self.op_def = find_op_def(self.op)
        self._make_call()

    def _node(self, name: str, op: str, inputs: Iterable[str] = (), **types: int) -> str:
        node = self.graph_def.node.add(name=name, op=op, input=inputs)
        for key, dtype in types.items():
            node.attr[key].type = dtype
        return name

    def _constant(self, name: str, value: np.ndarray) -> str:
        import tensorflow as tf

        tensor = tf.make_tensor_proto(value)
        self._node(name, "Const", dtype=tensor.dtype)
        self.graph_def.node[-1].attr["value"].tensor.CopyFrom(tensor)
        return name

    def _make_images(self) -> None:
        self._node("images", "Placeholder", dtype=1)
        for size in (-1, *IMAGES[1:]):
            self.graph_def.node[-1].attr["shape"].shape.dim.add(size=size)
        self._constant("axes", np.arange(4, dtype=np.int32))
        self._node("magnitudes", "Abs", ["images"], T=1)
        self._node("sum", "Sum", ["magnitudes", "axes"], T=1, Tidx=3)
        self._constant("nothing", np.float32(0))
        # Zero, but unknown to shape inference.
        self._node("zero", "Minimum", ["sum", "nothing"], T=1)
        self._node("zero_int", "Cast", ["zero"], SrcT=1, DstT=3)

    def _make_call(self) -> None:
        attributes: dict[str, Any] = {}
        for attr in self.op_def.attr:
            attributes[attr.name] = self._attribute(attr)
        inputs = []
        for argument in self.op_def.input_arg:
            dtypes = [argument.type or attributes.get(argument.type_attr, 1)]
            if argument.number_attr:
                dtypes *= max(1, min(3, attributes[argument.number_attr]))
            if argument.type_list_attr:
                dtypes = attributes[argument.type_list_attr]
            inputs += [
                self._input(f"in_{len(inputs)}_{i}", argument.name, dtype, len(inputs))
                for i, dtype in enumerate(dtypes)
            ]
        self._node("call", self.op, inputs)
        node = self.graph_def.node[-1]
        for attr in self.op_def.attr:
            if attributes[attr.name] is not None:
                _set(node.attr[attr.name], attr.type, attributes[attr.name])
        self._node("total", "Identity", ["zero"], T=1)
        index = 0
        for argument in self.op_def.output_arg:
            dtypes = [argument.type or attributes.get(argument.type_attr, 1)]
            if argument.number_attr:
                dtypes *= max(1, min(4, attributes[argument.number_attr]))
            if argument.type_list_attr:
                dtypes = attributes[argument.type_list_attr]
            for dtype in dtypes:
                previous = self.graph_def.node[-1].name
                self._node(f"float_{index}", "Cast", [f"call:{index}"], SrcT=dtype, DstT=1)
                self._constant(f"minus_{index}", np.array([-1], np.int32))
                self._node(f"flat_{index}", "Reshape", [f"float_{index}", f"minus_{index}"], T=1)
                self.graph_def.node[-1].attr["Tshape"].type = 3
                self._constant(f"first_{index}", np.int32(0))
                self._node(f"sum_{index}", "Sum", [f"flat_{index}", f"first_{index}"], T=1, Tidx=3)
                self._node(f"total_{index}", "AddV2", [previous, f"sum_{index}"], T=1)
                index += 1
        last = self.graph_def.node[-1].name
        self._node("tap", "AddV2", ["images", last], T=1)

    def _attribute(self, attr: Message) -> Any:
        """A random value of an attribute; ``None`` omits the attribute."""
        rng = self.rng
        wild = rng.random() < 0.12
        if attr.type == "type":
            return self._dtype([*attr.allowed_values.list.type])
        if attr.type == "list(type)":
            return [self._dtype([]) for _ in range(1 + int(rng.integers(2)))]
        if attr.type == "int":
            least = int(attr.minimum) if attr.has_minimum else -1
            return int(pick(EXTREME, rng)) if wild else least + int(rng.integers(4))
        if attr.type == "list(int)":
            if attr.name in ("explicit_paddings", "squeeze_dims") and rng.random() < 0.7:
                return None
            length = 5 if "3D" in self.op else 4
            length = int(rng.integers(7)) if rng.random() < 0.05 else length
            values = rng.integers(1, 4, length)
            if rng.random() < 0.6 and length:
                values[[0, -1]] = 1
            if attr.name == "dilations" and rng.random() < 0.6:
                values[:] = 1
            values = [int(value) for value in values]
            if wild and length:
                values[int(rng.integers(length))] = int(pick(EXTREME, rng))
            return values
        if attr.type == "list(float)":
            return [float(pick([1.0, 1.4, 2.0, 0.0, -1.0, 1e30], rng)) for _ in range(4)]
        if attr.type == "float":
            return float(pick([0.0, 0.001, 1.0, -1.0, 1e30], rng))
        if attr.type == "bool":
            return bool(rng.integers(2))
        if attr.type == "string":
            allowed = [*attr.allowed_values.list.s]
            return (
                pick(EQUATIONS, rng).encode()
                if attr.name == "equation"
                else (pick(allowed, rng) if allowed else None)
            )
        if attr.type == "shape":
            return [int(pick([-1, 0, 1, 2, 3, 2**31], rng)) for _ in range(int(rng.integers(5)))]
        return None

    def _dtype(self, allowed: list[int]) -> int:
        import tensorflow as tf

        kinds = "float32 float32 float32 float32 float64 float16 bfloat16 int32 int64 uint8 bool"
        known = [tf.as_dtype(kind).as_datatype_enum for kind in (kinds + " complex64").split()]
        fitting = [kind for kind in known if not allowed or kind in allowed]
        return int(pick(fitting or allowed, self.rng))

    def _input(self, name: str, role: str, dtype: int, position: int) -> str:
        """A tensor that depends on the images, with a known, partly known or unknown shape."""
        import tensorflow as tf

        rng = self.rng
        ranks = ranks_of(_node_of(self.op))
        rank = int(rng.integers(6))
        if ranks and position < len(ranks) and rng.random() < 0.75:
            rank = rank if ranks[position] is None else ranks[position]
        elif rng.random() < 0.4:
            rank = int(pick([0, 1, 2, 4], rng))
        shape = [int(size) for size in rng.integers(1, 9, rank)]
        if rank and rng.random() < 0.05:
            shape[int(rng.integers(rank))] = 0
        kind = tf.as_dtype(dtype)
        if kind.is_floating or kind.is_complex:
            value = rng.normal(size=shape) * pick([1.0, 1.0, 100.0], rng)
        else:
            value = rng.integers(0, 2 if kind.is_bool else 5, shape)
            if value.size and not kind.is_bool and rng.random() < 0.15:
                extreme = int(pick(EXTREME, rng))
                value = value.astype(np.int64)
                value.flat[int(rng.integers(value.size))] = np.clip(
                    extreme, max(kind.min, -(2**63)), min(kind.max, 2**63 - 1)
                )
        constant = self._constant(name, np.asarray(value).astype(kind.as_numpy_dtype))
        if rng.random() < (0.2 if kind.is_floating else 0.5):
            return constant
        self._node(f"{name}_zero", "Cast", ["zero"], SrcT=1, DstT=dtype)
        if kind.is_bool:
            self._node(f"{name}_live", "LogicalOr", [constant, f"{name}_zero"])
        else:
            self._node(f"{name}_live", "AddV2", [constant, f"{name}_zero"], T=dtype)
        how = rng.random()
        if how < 0.4:
            return f"{name}_live"
        sizes = self._constant(f"{name}_shape", np.array([*shape, 1], np.int32))
        if how < 0.6:  # known rank
            sizes = self._constant(f"{name}_sizes", np.array(shape, np.int32))
            self._node(f"{name}_target", "AddV2", [sizes, "zero_int"], T=3)
        else:
            self._constant(f"{name}_begin", np.array([0], np.int32))
            self._constant(f"{name}_rank", np.array([rank], np.int32))
            self._node(f"{name}_length", "AddV2", [f"{name}_rank", "zero_int"], T=3)
            parts = [sizes, f"{name}_begin", f"{name}_length"]
            self._node(f"{name}_target", "Slice", parts, T=3, Index=3)
        self._node(f"{name}_hidden", "Reshape", [f"{name}_live", f"{name}_target"], T=dtype)
        self.graph_def.node[-1].attr["Tshape"].type = 3
        return f"{name}_hidden"


def _node_of(op: str) -> Message:
    from tensorflow.core.framework.node_def_pb2 import NodeDef

    return NodeDef(op=op)


def _set(attribute: Message, kind: str, value: Any) -> None:
    if kind == "shape":
        attribute.shape.SetInParent()
        for size in value:
            attribute.shape.dim.add(size=size)
    elif kind.startswith("list"):
        attribute.list.SetInParent()
        field = {"list(int)": "i", "list(float)": "f", "list(type)": "type"}[kind]
        getattr(attribute.list, field).extend(value)
    else:
        field = {"int": "i", "float": "f", "bool": "b", "string": "s", "type": "type"}[kind]
        setattr(attribute, field, value)


def make_call(number: int, report: Report) -> tuple[str, str, str]:
    """Make a call; returns its outcome, operation and message."""
    import tensorflow as tf

    from transfer.layers.graph_layer import GraphLayer

    call = Call(number)
    report(call.op)
    stage = "refused"
    try:
        network = extract(
            call.graph_def, "tap", "images", tf.float32, input_shape=(None, *IMAGES[1:])
        )
        network = free_batch(network)
        nodes = {node.name: node for node in call.graph_def.node}
        values = {
            variable.name: tf.constant(tf.make_ndarray(nodes[variable.name].attr["value"].tensor))
            for variable in network.variables
        }
        layer = GraphLayer(network, values)
        stage = "call error"
        images = tf.random.stateless_normal(IMAGES, [number, 0])
        layer(images)
        with tf.GradientTape() as tape:
            tape.watch(images)
            result = layer(images, training=True)
        gradients = tape.gradient(result, [images, *layer.trainable_variables])
        del gradients
    except Exception as error:
        # TypeError: gradients of some operations support fewer dtypes than the operations.
        clean = (ValueError, TypeError, LookupError, tf.errors.OpError)
        outcome = stage if isinstance(error, clean) else "unexpected"
        return outcome, call.op, f"{type(error).__name__}: {str(error)[:500]}"
    return "fine", call.op, ""


def _work(connection: Any, log: Path, in_worker: bool) -> None:
    """Serve a supervisor: receives numbers, sends ``("op", name)``, ``("stage", name)`` and
    results."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable(all_threads=False)
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"}
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as on the command line
    sys.path.insert(0, str(ROOT))
    import keras
    import tensorflow as tf

    from transfer.graph import trials

    keras.config.disable_traceback_filtering()
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.constant(0)
    with contextlib.suppress(OSError, ValueError):
        limit = psutil.Process().memory_info().vms + 4 * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def trial(call: Any) -> str:
        connection.send(("stage", "trial"))
        with contextlib.suppress(Exception):
            trials.make(call, call.arguments())
        connection.send(("stage", "call"))
        return ""

    if in_worker:
        trials.run_child = trial
    connection.send(("ready", ""))
    tried = 0
    while (number := connection.recv()) is not None:
        os.ftruncate(output, 0)
        os.lseek(output, 0, os.SEEK_SET)
        connection.send(("stage", "call"))
        result = make_call(number, lambda op: connection.send(("op", op)))
        tried += 1
        if tried % 25 == 0:
            keras.backend.clear_session()
        connection.send(("done", result))


class Caller:
    """A worker process, seen from the supervisor."""

    def __init__(self, log: Path, seconds: float, in_worker: bool = True):
        self.log, self.seconds, self.in_worker = log, seconds, in_worker
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, far = context.Pipe()
        arguments = (far, self.log, self.in_worker)
        self.process = context.Process(target=_work, args=arguments)
        self.process.start()
        far.close()
        self.number: int | None = None
        self.op, self.stage, self.since, self.calls = "", "start", time.monotonic(), 0
        self.ready = False

    def give(self, number: int) -> None:
        self.number, self.op, self.since = number, "", time.monotonic()
        self.calls += 1
        self.connection.send(number)

    def look(self) -> Outcome | None:
        """The outcome of the current call, if it is finished."""
        try:
            while self.connection.poll():
                order, content = self.connection.recv()
                if order == "ready":
                    self.ready = True
                elif order == "op":
                    self.op = content
                elif order == "stage":
                    self.stage = content
                else:
                    number, self.number = self.number, None
                    outcome, op, message = content
                    if self.calls >= CALLS_PER_WORKER:
                        self.restart()
                    return Outcome(number or 0, outcome, op, message)
        except (EOFError, ConnectionError):
            return self._lost("crash")
        limit = self.seconds if self.ready else 300
        if (self.number is not None or not self.ready) and time.monotonic() - self.since > limit:
            return self._lost("hang")
        return None

    def _lost(self, outcome: str) -> Outcome:
        self.process.kill()
        self.process.join()
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        if self.number is None:
            raise RuntimeError(f"a worker died before it was given anything:\n{text}")
        check = re.search(r"Check failed: .{,120}", text)
        reason = check[0] if check else text[-300:]
        message = f"exit code {self.process.exitcode} in {self.stage}: {reason}"
        if self.stage == "trial":
            outcome = "trial"
        lost = Outcome(self.number, outcome, self.op, message)
        self._start()
        return lost

    def restart(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def run(callers: list[Caller], numbers: Iterable[int]) -> Iterator[Outcome]:
    waiting = collections.deque(numbers)
    while waiting or any(caller.number is not None for caller in callers):
        for caller in callers:
            if caller.ready and caller.number is None and waiting:
                caller.give(waiting.popleft())
        multiprocessing.connection.wait([c.connection for c in callers], timeout=0.05)
        for caller in callers:
            outcome = caller.look()
            if outcome is not None:
                yield outcome


def main(numbers: Iterable[int], root: Path, workers: int, seconds: float, verbose: bool) -> int:
    """Make calls and print failures; returns the exit status."""
    results = []
    callers = [Caller(root / f"caller-{number}.log", seconds) for number in range(workers)]
    try:
        for result in run(callers, numbers):
            results.append(result)
            if result.failed or (verbose and result.outcome == "trial"):
                print(f"{result.number} {result.op} {result.outcome}: {result.message}", flush=True)
    finally:
        for caller in callers:
            caller.stop()
    died = [result.number for result in results if result.outcome == "trial"]
    if died:
        results = [result for result in results if result.outcome != "trial"]
        caller = Caller(root / "caller-child.log", 200.0, in_worker=False)
        try:
            for result in run([caller], died):
                refused = "cannot be run: a process that tried it" in result.message
                outcome = "trial" if refused else result.outcome
                if outcome not in ("trial", "crash", "hang"):
                    outcome = "trial"  # not reproducible every time
                results.append(Outcome(result.number, outcome, result.op, result.message))
        finally:
            caller.stop()
    counts = collections.Counter(result.outcome for result in results)
    for result in results:
        if result.failed or verbose:
            print(f"{result.number} {result.op} {result.outcome}: {result.message}")
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    print("again: python tests/fuzzing --operation NUMBER")
    return 1 if any(result.failed for result in results) else 0
