"""Compare a TF1 program in a stock session with the network that transfer.graph extracts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from transfer.graph import Network, dtype_of, extract, free_batch, inline, static_shape
from transfer.layers.graph_layer import GraphLayer

tf1 = tf.compat.v1


@contextlib.contextmanager
def control_flow_v1() -> Iterator[None]:
    """``tf.cond`` makes ``Switch`` and ``Merge``, as in TensorFlow 1."""
    tf1.disable_control_flow_v2()
    try:
        yield
    finally:
        tf1.enable_control_flow_v2()


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Program:
    """A graph with a placeholder ``x``, a tensor ``tap`` and initialized variables."""

    def __init__(self, build: Callable[[], Any], *, conds: str = "v1"):
        self.graph = tf.Graph()
        with self.graph.as_default():
            tf1.set_random_seed(1)
            with control_flow_v1() if conds == "v1" else contextlib.nullcontext():
                build()
            self._initializer = tf1.global_variables_initializer()
        self.session = self._new_session()

    def _new_session(self) -> tf1.Session:
        session = tf1.Session(graph=self.graph)
        session.run(self._initializer)
        return session

    @property
    def graph_def(self) -> tf1.GraphDef:
        return inline(self.graph.as_graph_def(add_shapes=True))

    def network(self, tap: str = "tap", input: str = "x", **options: Any) -> Network:
        node = next(n for n in self.graph_def.node if n.name == input)
        shape = static_shape(node)
        dtype = dtype_of(node)
        return extract(self.graph_def, tap, input, dtype, input_shape=shape, **options)

    def layer(self, network: Network | None = None, **options: Any) -> GraphLayer:
        network = network or free_batch(self.network(**options))
        return GraphLayer(network, self.values(network))

    def values(self, network: Network) -> dict[str, tf.Tensor]:
        """Values of the variables, and of constants that are weights."""
        sources = self._sources(network)
        return {v.name: tf.constant(self.session.run(sources[v.name])) for v in network.variables}

    def run(self, x: np.ndarray, feeds: Mapping[str, Any] | None = None, tap: str = "tap") -> Any:
        return self.session.run(f"{tap}:0", {"x:0": x, **(feeds or {})})

    def gradients(
        self, network: Network, x: np.ndarray, feeds: Mapping[str, Any], upstream: Any
    ) -> list[np.ndarray]:
        """``tf.gradients`` with respect to the input and to the variables."""
        with self.graph.as_default():
            tap = self.graph.get_tensor_by_name(network.output)
            sources = self._sources(network)
            with_respect_to = [
                self.graph.get_tensor_by_name("x:0"),
                *(sources[v.name] for v in network.variables),
            ]
            found = tf1.gradients(
                tap, with_respect_to, upstream, unconnected_gradients="zero", name="gradients"
            )
            found = [tf.convert_to_tensor(gradient) for gradient in found]
        # Gradients of a function modify its call, which a session that has already run ignores.
        return self._new_session().run(found, {"x:0": x, **feeds})

    def _sources(self, network: Network) -> dict[str, Any]:
        with self.graph.as_default():
            variables = {v.op.name: v for v in tf1.global_variables()}
        return {
            v.name: variables[v.name]
            if v.name in variables
            else self.graph.get_tensor_by_name(f"{v.name}:0")
            for v in network.variables
        }


def assert_close(found: Any, expected: Any, what: str = "value") -> None:
    expected = np.asarray(expected)
    assert np.shape(found) == expected.shape, what
    scale = max(np.abs(expected).max(initial=0), 1e-6)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale, err_msg=what)


def assert_equals_stock(
    program: Program,
    x: np.ndarray,
    feeds: Mapping[str, Any] | None = None,
    network: Network | None = None,
) -> None:
    """Check that value and gradients of a network equal those of the stock session.

    Args:
        program: what it is made of.
        x: a batch for its input.
        feeds: for the stock session, beside the input.
        network: by default what ``extract`` makes of the program.
    """
    layer = program.layer(network)
    inputs = tf.constant(x)
    weights = [variable.value for variable in layer.graph_variables]
    with tf.GradientTape() as tape:
        tape.watch([inputs, *weights])
        found = layer(inputs)
    expected = program.run(x, feeds)
    assert_close(found, expected)
    upstream = images(*expected.shape, seed=1)
    ours = tape.gradient(found, [inputs, *weights], upstream, unconnected_gradients="zero")
    theirs = program.gradients(layer.network, x, feeds or {}, upstream)
    for name, our, their in zip(["x", *layer.variable_names], ours, theirs, strict=True):
        assert_close(our, their, f"gradient of {name}")
