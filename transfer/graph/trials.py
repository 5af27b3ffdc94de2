"""Run graphs that may crash the process in a child process first.

If shape inference proves that every operation gets valid ranks and sizes, a graph runs unchanged.
Otherwise run-time checks are added (``with_guards``), and the first call runs in a child process
with limits on time and memory: if that crashes, the graph is rejected.
"""

from __future__ import annotations

import base64
import contextlib
import faulthandler
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef

from transfer.graph import SEED, Network, canonical, guards, infer, with_guards

MAX_SECONDS = 15
"""Time limit of the first call, on two images."""
START_SECONDS = 120
"""Time limit for starting a process, on a busy machine."""
MAX_BYTES = 2**31
"""Memory limit of the first call, in addition to ten times the size of images and weights."""
_SIZE = 96
"""Height and width of images if the graph accepts any size."""
_SCRIPT = "import sys; sys.path[:] = sys.argv[1:]; from transfer.graph.trials import main; main()"
_tried: dict[bytes, str] = {}


@dataclass(frozen=True)
class Call:
    """A call of a network: graph, outputs, and names, shapes and dtypes of its arguments, input
    first."""

    graph_def: GraphDef
    outputs: tuple[str, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    def to_json(self) -> bytes:
        graph = base64.b64encode(self.graph_def.SerializeToString(deterministic=True))
        return json.dumps(vars(self) | {"graph_def": graph.decode("ascii")}).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Call:
        facts = json.loads(content)
        graph_def = GraphDef.FromString(base64.b64decode(facts["graph_def"]))
        return cls(**facts | {"graph_def": graph_def})

    def arguments(self) -> list[tf.Tensor]:
        """Arguments filled with random numbers."""
        generator = np.random.default_rng(0)
        return [
            tf.cast(tf.constant(generator.normal(size=shape)), dtype)
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]


def checked_graph(
    network: Network, inputs: tf.TensorSpec, weights: Sequence[tf.TensorSpec]
) -> GraphDef:
    """The graph to import for inputs and weights of these shapes.

    Raises:
        ValueError: if the graph does not fit the shapes, would exhaust the memory, or crashes the
            child process.
    """
    shape = tuple(inputs.shape.as_list()) if inputs.shape.rank is not None else network.input_shape
    if shape:
        shape = (_batch(network, shape[0]), *shape[1:])
    variables = {
        canonical(variable.name): (spec.dtype, tuple(spec.shape.as_list()))
        for variable, spec in zip(network.variables, weights, strict=True)
    }
    try:
        shapes = infer(network, {network.input: (inputs.dtype, shape), **variables})
    except ValueError as error:
        raise ValueError(f"cannot take inputs of shape {inputs.shape}: {error}") from error
    unproven = guards.unproven(network.graph_def, shapes)
    if not unproven:
        return network.graph_def
    guarded = with_guards(network.graph_def, shapes)
    # Sizes that are unknown only because of the inputs need guards, not a trial.
    example = _example_shape(network, shape)
    leaves = {network.input: (inputs.dtype, example), **variables}
    with contextlib.suppress(ValueError):  # images of this size may not fit
        shapes = infer(network, leaves)
        unproven = guards.unproven(network.graph_def, shapes)
    if unproven:
        call = Call(
            guarded,
            tuple(dict.fromkeys(name for name in network.outputs if name not in leaves)),
            tuple(leaves),
            tuple(shape for _, shape in leaves.values()),
            tuple(dtype.name for dtype, _ in leaves.values()),
        )
        _try_once(call, unproven)
    return guarded


def _batch(network: Network, size: int | None) -> int:
    """A batch size that the network accepts; that of the inputs if it is small."""
    stated = network.input_shape[0] if network.input_shape else None
    return network.batch_size or stated or (size if size and size <= 64 else 2)


def _example_shape(network: Network, shape: tuple[int | None, ...] | None) -> tuple[int, ...]:
    """A fully defined input shape."""
    shape = shape or (_batch(network, None), None, None, 3)
    stated = network.input_shape
    if stated is None or len(stated) != len(shape):
        stated = shape
    return tuple(size or other or _SIZE for size, other in zip(shape, stated, strict=True))


def _try_once(call: Call, unproven: Sequence[str]) -> None:
    digest = hashlib.sha256(call.to_json()).digest()
    if digest not in _tried:
        _tried[digest] = run_child(call)
    if _tried[digest]:
        shown = ", ".join(repr(name) for name in unproven[:3])
        raise ValueError(
            f"the graph cannot be run: a process that tried it {_tried[digest]}. It does not say "
            f"which shapes some operations take or give ({shown}); it is damaged or malicious"
        )


def run_child(call: Call) -> str:
    """Run a call in a child process; returns how it failed, empty on success."""
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _SCRIPT, *_search_path()],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            child.communicate(call.to_json(), timeout=START_SECONDS + MAX_SECONDS)
        except subprocess.TimeoutExpired:
            return f"did not end within {START_SECONDS + MAX_SECONDS} s"
        finally:
            child.kill()
            child.wait()
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    if child.returncode == 0:
        return ""
    if any(line.startswith("Timeout (") for line in lines):
        return f"took over {MAX_SECONDS} s"
    reason = next((line for line in lines if "Check failed" in line), lines[-1] if lines else "")
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        return f"died with {name}" + (f" ({reason[-200:]})" if "Check failed" in reason else "")
    return f"failed ({reason[-200:]})"


def _search_path() -> list[str]:
    """``sys.path`` for the child: that of this process, without the working folder."""
    own = str(Path(__file__).resolve().parents[2])
    here = {"", os.getcwd()} - {own}
    return [own, *(path for path in sys.path if path not in here)]


def main() -> None:
    """Entry point of the child: read a call from standard input and execute it."""
    tf.config.set_visible_devices([], "GPU")
    call = Call.from_json(sys.stdin.buffer.read())
    arguments = call.arguments()
    _limit_memory(MAX_BYTES + 10 * sum(argument.numpy().nbytes for argument in arguments))
    faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
    # The caller will get the same exception; here it only matters that the process survives.
    with contextlib.suppress(Exception):
        make(call, arguments)
    faulthandler.cancel_dump_traceback_later()


def make(call: Call, arguments: Sequence[tf.Tensor]) -> None:
    """Compute the outputs and their gradients."""
    used = {canonical(edge) for node in call.graph_def.node for edge in node.input}
    seed = {SEED: tf.zeros([2], tf.int32)}

    @tf.function(autograph=False)
    def run(*arguments: tf.Tensor) -> list[tf.Tensor]:
        tensors = dict(zip(call.names, arguments, strict=True)) | seed
        return tf.graph_util.import_graph_def(
            call.graph_def,
            input_map={name: tf.identity(t) for name, t in tensors.items() if name in used},
            return_elements=list(call.outputs),
        )

    run(*arguments)
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        outputs = run(*arguments)
    tape.gradient(outputs, arguments)


def _limit_memory(more: int) -> None:
    """Limit further allocations of this process to ``more`` bytes, if the system supports it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
