"""Networks with convolutions and matrix products in bfloat16 or float16, compared with float32."""

import collections

import numpy as np
import pytest
import tensorflow as tf
from stock import Program, images
from tensorflow.python.eager import context

from transfer.graph.mixed_precision import in_mixed_precision, num_products
from transfer.layers.graph_layer import GraphLayer

tf1 = tf.compat.v1


def weight(name, *shape):
    return tf1.get_variable(name, shape, initializer=tf1.random_normal_initializer(stddev=0.3))


def build():
    """Every operation that is rewritten, and some that are not."""
    x = tf1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
    y = tf.nn.conv2d(x, weight("first", 3, 3, 3, 8), 1, "SAME")
    y = tf.nn.relu(tf.nn.bias_add(y, weight("bias", 8)), name="relu")
    y, *_ = tf1.nn.fused_batch_norm(
        y, tf.ones([8]), tf.zeros([8]), tf.zeros([8]), tf.ones([8]), is_training=False
    )
    y = tf.nn.leaky_relu(tf.nn.depthwise_conv2d(y, weight("deep", 3, 3, 8, 1), [1] * 4, "SAME"))
    y = tf1.nn.conv2d(y, weight("middle", 3, 3, 8, 8), 1, "SAME") + tf.maximum(y, 0)
    y = tf.nn.local_response_normalization(y)
    y = tf.nn.conv2d(
        tf.pad(y, [[0, 0], [1, 1], [1, 1], [0, 0]]), weight("second", 3, 3, 8, 8), 2, "VALID"
    )
    y = tf.concat([tf.nn.max_pool2d(y, 2, 2, "SAME"), tf.nn.avg_pool2d(y, 2, 2, "SAME")], 3)
    y = tf1.nn.conv2d_transpose(
        y, weight("up", 2, 2, 4, 16), tf.stack([tf.shape(y)[0], 4, 4, 4]), 2, "SAME"
    )
    y = tf.reshape(tf.transpose(tf.nn.relu6(y), [0, 3, 1, 2]), [-1, 64])
    tf.sigmoid(tf.matmul(y, weight("dense", 64, 5)) * 0.5 - weight("last", 5), name="tap")


@pytest.fixture(scope="module")
def program():
    return Program(build)


@pytest.fixture(scope="module")
def x():
    return tf.constant(images(4, 8, 8, 3))


def optimized(function, *arguments):
    """The operations that TensorFlow runs after its graph optimizers, with their dtypes, in the
    first call of a function."""
    context.context().enable_run_metadata()
    try:
        context.context().export_run_metadata()  # of functions that were called before
        function(*arguments)
        metadata = context.context().export_run_metadata()
    finally:
        context.context().disable_run_metadata()
    nodes = [node for graph in metadata.partition_graphs for node in graph.node]
    kinds = [(node.op, node.attr["T"].type) for node in nodes if "T" in node.attr]
    return collections.Counter((op, tf.as_dtype(kind).name) for op, kind in kinds)


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_results_agree_and_products_run_in_the_precision(program, x, dtype, error):
    network = program.network()
    layers = [
        GraphLayer(network, program.values(network), dtype=d) for d in (None, f"mixed_{dtype}")
    ]
    found = []
    for layer in layers:

        def gradients(x, layer=layer):
            weights = [variable.value for variable in layer.graph_variables]
            with tf.GradientTape() as tape:
                tape.watch(x)
                outputs = layer(x, training=True)
                loss = tf.reduce_sum(outputs**2)
            sources = [x, *weights]
            return [outputs, *tape.gradient(loss, sources, unconnected_gradients="zero")]

        function = tf.function(gradients, autograph=False)
        kinds = optimized(function, x)
        found.append([value.numpy() for value in function(x)])
        products = {dtype for (op, dtype), _ in kinds.items() if "Conv2D" in op or "MatMul" in op}
        assert products == {"float32" if layer.mixed_precision is None else dtype}
    (outputs, *expected), (lower, *gradients_of_lower) = found
    assert lower.dtype == np.float32
    assert 0 < np.abs(outputs - lower).max() <= 4 * error * np.abs(outputs).max()
    # Rounding changes which maxima and which rectifiers a gradient passes through, so single values
    # may differ by any amount.
    for gradient, other in zip(expected, gradients_of_lower, strict=True):
        assert other.dtype == np.float32
        norms = np.linalg.norm(gradient), np.linalg.norm(other)
        assert norms[1] == pytest.approx(norms[0], rel=0.5)
        assert np.vdot(gradient, other) >= 0.7 * norms[0] * norms[1]


def test_only_products_and_what_follows_them_are_rewritten(program):
    network = program.network()
    lower = in_mixed_precision(network, tf.bfloat16)
    assert (lower.output, lower.variables) == (network.output, network.variables)
    kinds = collections.defaultdict(set)
    for node in lower.graph_def.node:
        kinds[node.op].add(node.attr["T"].type)
    assert num_products(network) == 6
    assert num_products(lower) == 0
    high, low = tf.float32.as_datatype_enum, tf.bfloat16.as_datatype_enum
    assert kinds["LRN"] == kinds["Sigmoid"] == {high}
    for op in ("Conv2D", "MatMul", "FusedBatchNormV3", "MaxPool", "AvgPool", "LeakyRelu", "Relu6"):
        assert kinds[op] == {low}, op


def test_output_may_be_in_the_middle(program, x):
    network = program.network("relu")
    values = program.values(network)
    float32, lower = (GraphLayer(network, values, dtype=d)(x) for d in (None, "mixed_bfloat16"))
    assert lower.dtype == tf.float32
    np.testing.assert_allclose(lower, float32, atol=0.05)


def test_float64_network_is_not_in_mixed_precision():
    def wide():
        x = tf1.placeholder(tf.float64, [None, 4], name="x")
        tf.matmul(x, tf1.get_variable("w", [4, 2], tf.float64), name="tap")

    program = Program(wide)
    network = program.network()
    assert num_products(network) == 0
    with pytest.raises(ValueError, match="the graph computes in float64"):
        GraphLayer(network, program.values(network), dtype="mixed_bfloat16")
