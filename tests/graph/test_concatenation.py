"""Several taps as one feature vector, compared with NumPy."""

import numpy as np
import pytest
import tensorflow as tf
from stock import Program, images

from transfer.graph import Variable, concatenated

tf1 = tf.compat.v1


def program(of_maps=lambda maps: maps, of_vector=lambda vector: vector):
    def build():
        x = tf1.placeholder(tf.float32, [None, 4, 6, 3], name="x")
        maps = tf.identity(of_maps(tf.tanh(x)), name="maps")
        tf.identity(of_vector(tf.reduce_sum(maps, [1, 2])), name="vector")

    return Program(build)


def avg_max(maps, axes):
    return np.concatenate([np.mean(maps, axes), np.max(maps, axes)], axis=-1)


TAPS = {"vector": "vector", "maps": "maps"}


@pytest.mark.parametrize(
    ("pooling", "reduce"), [("avg", np.mean), ("max", np.max), ("avg_max", avg_max)]
)
def test_maps_are_pooled_and_taps_joined_in_their_order(pooling, reduce):
    stock, x = program(), images(5, 4, 6, 3)
    network = concatenated(stock.network(TAPS), pooling)
    found = stock.layer(network)(x)
    parts = [stock.run(x, tap="vector"), reduce(stock.run(x, tap="maps"), (1, 2))]
    np.testing.assert_allclose(found, np.concatenate(parts, 1), rtol=1e-5)
    assert (network.output, network.outputs) == ("features:0", ("features:0",))


def test_taps_of_different_dtypes_become_float32():
    stock, x = program(of_vector=lambda v: tf.cast(v > 0, tf.float64)), images(5, 4, 6, 3)
    found = stock.layer(concatenated(stock.network(TAPS)))(x)
    assert found.dtype == tf.float32
    np.testing.assert_array_equal(found[:, :3], stock.run(x, tap="vector"))


def test_network_with_one_output_is_unchanged():
    network = program().network("maps")
    assert concatenated(network) is network


def test_name_that_the_graph_uses_is_not_taken():
    from dataclasses import replace

    network = program().network(TAPS)
    taken = Variable("features/weights", tf.float32, (1,))
    assert concatenated(replace(network, variables=(taken,))).output == "features_1:0"


def test_tap_that_is_neither_vector_nor_maps_is_refused():
    stock = program(of_maps=lambda maps: maps[..., 0])
    with pytest.raises(ValueError, match=r"tap 'maps' has shape \(None, 4, 6\); expected features"):
        concatenated(stock.network({"maps": "maps", "x": "x"}))
