"""Random numbers determined by a seed."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from stock import Program

from transfer.graph import is_seeded, randomness

tf1 = tf.compat.v1
ROWS = np.zeros([200, 50], np.float32)


def x_of():
    return tf1.placeholder(tf.float32, [None, 50], name="x")


def layer_with(noise, seed=1):
    keras.utils.set_random_seed(seed)
    return Program(lambda: tf.identity(noise(x_of()), name="tap")).layer()


def dropped(x):
    return tf1.nn.dropout(tf.exp(x), rate=tf1.placeholder(tf.float32, name="rate"))


def test_same_seed_gives_same_dropout_mask():
    first, second = (layer_with(dropped)(ROWS, training=True) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_other_seed_gives_other_dropout_mask():
    first, second = (layer_with(dropped, seed)(ROWS, training=True) for seed in (1, 2))
    assert np.mean(first.numpy() != second.numpy()) > 0.4


def test_each_call_uses_new_dropout_mask():
    layer = layer_with(dropped)
    first, second = (layer(ROWS, training=True).numpy() for _ in range(2))
    assert np.mean(first != second) > 0.4


def test_sequence_of_calls_is_reproducible():
    runs = []
    for _ in range(2):
        layer = layer_with(dropped)
        runs.append([layer(ROWS, training=True).numpy() for _ in range(3)])
    np.testing.assert_array_equal(*runs)


def test_nodes_generate_different_numbers():
    def noise(x):
        shape = tf.shape(x)
        return tf1.random_uniform(shape) - tf1.random_uniform(shape) + x

    found = layer_with(noise)(ROWS).numpy()
    assert np.mean(found == 0.0) < 0.01
    assert found.std() == pytest.approx(np.sqrt(1 / 6), rel=0.05)


NOISE = {
    "uniform": (lambda s: tf1.random_uniform(s), 0.5, np.sqrt(1 / 12)),
    "scaled": (lambda s: tf1.random_uniform(s, -2.0, 4.0), 1.0, 6 * np.sqrt(1 / 12)),
    "normal": (lambda s: tf1.random_normal(s), 0.0, 1.0),
    "truncated": (lambda s: tf1.truncated_normal(s), 0.0, 0.88),
    "integers": (
        lambda s: tf.cast(tf1.random_uniform(s, 0, 10, tf.int32), tf.float32),
        4.5,
        np.sqrt(99 / 12),
    ),
    "long shape": (lambda s: tf1.random_normal(tf.cast(s, tf.int64), 3.0), 3.0, 1.0),
}


@pytest.mark.parametrize("kind", NOISE)
def test_random_numbers_have_distribution_of_program(kind):
    draw, mean, deviation = NOISE[kind]
    found = layer_with(lambda x: x + draw(tf.shape(x)))(ROWS).numpy()
    assert found.mean() == pytest.approx(mean, abs=0.05 * deviation)
    assert found.std() == pytest.approx(deviation, rel=0.05)


def test_a_graph_without_random_numbers_takes_no_seed():
    program = Program(lambda: tf.exp(x_of(), name="tap"))
    network = program.network()
    assert not is_seeded(network.graph_def)
    nodes = list(network.graph_def.node)
    assert randomness.seeded(nodes) == nodes


def test_seed_is_used_in_training_only_if_dropout_is():
    network = Program(lambda: tf.identity(dropped(x_of()), name="tap")).network()
    assert [is_seeded(graph_def) for graph_def in network.graphs] == [False, True]
