"""Weights that are constants of a graph: frozen graphs, and networks of ``tf.constant``."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY, StockSession, save_vgg
from stock import Program, assert_close, assert_equals_stock, images
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from transfer import Backbone, load_meta_graph
from transfer.vgg import architectures

tf1 = tf.compat.v1


def freeze(prefix, output, path):
    """The meta graph frozen like in TensorFlow 1 programs."""
    stock = StockSession(prefix)
    frozen = tf1.graph_util.convert_variables_to_constants(
        stock.session, stock.graph.as_graph_def(), [output]
    )
    path.write_bytes(frozen.SerializeToString())
    return path


@pytest.fixture
def vgg_and_frozen(tiny_vgg, tmp_path):
    return tiny_vgg, freeze(tiny_vgg, "prob", tmp_path / "frozen.pb")


def pictures(count=5):
    return np.random.default_rng(0).random((count, 16, 16, 3), np.float32)


def test_frozen_graph_equals_its_meta_graph(vgg_and_frozen):
    prefix, frozen = vgg_and_frozen
    expected = Backbone(load_meta_graph(prefix))(pictures())
    assert_close(Backbone(load_meta_graph(frozen))(pictures()), expected)


def test_all_weights_of_a_frozen_graph_are_trainable(vgg_and_frozen):
    prefix, frozen = vgg_and_frozen
    original, thawed = Backbone(load_meta_graph(prefix)), Backbone(load_meta_graph(frozen))
    assert set(thawed.variable_names) == set(original.variable_names)
    assert all(variable.trainable for variable in thawed.graph_variables)


def test_gradients_of_frozen_graph_equal_those_of_its_meta_graph(vgg_and_frozen):
    gradients = []
    for path in vgg_and_frozen:
        backbone = Backbone(load_meta_graph(path))
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(backbone(pictures())))
        found = tape.gradient(loss, [v.value for v in backbone.trainable_variables])
        gradients.append(dict(zip(backbone.variable_names, found, strict=True)))
    original, thawed = gradients
    for name, gradient in original.items():
        assert_close(thawed[name], gradient, name)


def test_weights_of_graph_frozen_by_tensorflow_2_are_found(tmp_path):
    class Dense(tf.Module):
        def __init__(self):
            self.w = tf.Variable(images(4, 3))
            self.b = tf.Variable(images(3, seed=2))

        @tf.function
        def apply(self, x):
            return tf.nn.relu(tf.matmul(x, self.w) + self.b, name="tap")

    module = Dense()
    concrete = module.apply.get_concrete_function(tf.TensorSpec([None, 4], name="x"))
    frozen = convert_variables_to_constants_v2(concrete)
    (tmp_path / "m.pb").write_bytes(frozen.graph.as_graph_def().SerializeToString())
    backbone = Backbone(load_meta_graph(tmp_path / "m"), tap="tap")
    assert_close(backbone(images(5, 4)), module.apply(images(5, 4)))
    assert sorted(tuple(v.shape) for v in backbone.trainable_variables) == [(3,), (4, 3)]


def test_network_of_constants_is_trainable():
    def build():
        x = tf1.placeholder(tf.float32, [None, 6, 6, 3], name="x")
        h = tf.nn.conv2d(x, tf.constant(images(3, 3, 3, 4), name="kernel"), 1, "SAME")
        h = tf.nn.relu(h + tf.constant(images(4), name="bias"))
        h = tf.reduce_mean(h, [1, 2])
        tf.matmul(h, tf.constant(images(4, 2), name="matrix"), name="tap")

    program = Program(build)
    network = program.network()
    assert {v.name for v in network.variables} == {"kernel", "bias", "matrix"}
    assert all(v.trainable for v in network.variables)
    assert_equals_stock(program, images(2, 6, 6, 3), network=network)


def test_constant_weights_beside_variables_are_found():
    """A pretrained part of constants, and a new one of variables."""

    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        h = tf.nn.relu(tf.matmul(x, tf.constant(images(4, 5), name="old")))
        tf.matmul(h, tf1.get_variable("new", [5, 2]), name="tap")

    program = Program(build)
    assert {v.name for v in program.network().variables} == {"old", "new"}
    assert_equals_stock(program, images(3, 4))


def test_preprocessing_constants_are_not_weights():
    def build():
        x = tf1.placeholder(tf.float32, [None, 6, 6, 3], name="x")
        mean = tf.constant([123.68, 116.78, 103.94], name="mean")
        scale = tf.constant([0.5, 0.6, 0.7], name="scale")
        h = tf.reverse((x - mean) * scale, [3])
        tf.nn.conv2d(h, tf.constant(images(3, 3, 3, 4), name="kernel"), 1, "SAME", name="tap")

    program = Program(build)
    network = program.network()
    assert [v.name for v in network.variables] == ["kernel"]
    assert_equals_stock(program, 200 * np.abs(images(2, 6, 6, 3)), network=network)


def test_scalars_are_not_weights():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        h = tf.matmul(x, tf.constant(images(4, 5), name="w"))
        h = tf.maximum(h * tf.constant(0.2), h) + tf.constant([0.1])
        tf.pow(h, 2.0, name="tap")

    program = Program(build)
    assert [v.name for v in program.network().variables] == ["w"]
    assert_equals_stock(program, images(3, 4))


def test_factors_of_constant_product_are_weights():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        left, right = (
            tf.constant(images(4, 2), name="left"),
            tf.constant(images(2, 5), name="right"),
        )
        tf.matmul(x, tf.matmul(left, right), name="tap")

    program = Program(build)
    assert {v.name for v in program.network().variables} == {"left", "right"}
    assert_equals_stock(program, images(3, 4))


def test_constant_statistics_are_not_trainable():
    def build():
        x = tf1.placeholder(tf.float32, [None, 6, 6, 3], name="x")
        h = tf.nn.conv2d(x, tf.constant(images(3, 3, 3, 4), name="kernel"), 1, "SAME")
        names = ("gamma", "beta", "m", "v")
        values = [tf.constant(np.abs(images(4, seed=i)), name=n) for i, n in enumerate(names)]
        h, _, _ = tf1.nn.fused_batch_norm(h, *values, is_training=False)
        tf.nn.relu(h, name="tap")

    program = Program(build)
    network = program.network()
    trainable = {v.name: v.trainable for v in network.variables}
    assert trainable == {"kernel": True, "gamma": True, "beta": True, "m": False, "v": False}
    assert_equals_stock(program, images(2, 6, 6, 3), network=network)


def test_constant_statistics_are_detected_by_name():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        h = tf.matmul(x, tf.constant(images(4, 5), name="w"))
        mean = tf.constant(images(5), name="bn/moving_mean")
        variance = tf.constant(np.abs(images(5)), name="bn/moving_variance")
        h = tf.nn.batch_normalization(h, mean, variance, None, None, 1e-3)
        tf.identity(h, name="tap")

    network = Program(build).network()
    assert {v.name for v in network.variables if not v.trainable} == {
        "bn/moving_mean",
        "bn/moving_variance",
    }


def test_frozen_weights_behind_identities_are_found():
    """As written by ``convert_variables_to_constants``."""

    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        w = tf.constant(images(4, 5), name="w")
        tf.matmul(x, tf.identity(w, name="w/read"), name="tap")

    program = Program(build)
    network = program.network()
    assert [v.name for v in network.variables] == ["w"]
    assert {n.op for n in network.graph_def.node} == {"MatMul"}
    assert_equals_stock(program, images(3, 4), network=network)


def test_frozen_graph_can_be_trained_cut_and_saved(tmp_path):
    frozen = freeze(save_vgg(tmp_path / "m"), "prob", tmp_path / "frozen.pb")
    backbone = Backbone(load_meta_graph(frozen))
    prefix, suffix = backbone.split("pool1")
    np.testing.assert_array_equal(suffix(prefix(pictures())), backbone(pictures()))
    model = keras.Sequential([keras.Input((16, 16, 3)), backbone, keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-3), loss)
    before = [v.numpy() for v in backbone.trainable_variables]
    model.fit(pictures(), np.array([0, 1, 0, 1, 0]), verbose=0)
    for variable, old in zip(backbone.trainable_variables, before, strict=True):
        assert (variable.numpy() != old).any(), variable.name
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(pictures()), model(pictures()))


def test_frozen_weights_keep_names_and_values(tmp_path):
    frozen = freeze(save_vgg(tmp_path / "m"), "prob", tmp_path / "frozen.pb")
    expected = architectures.random_weights(TINY, 10)
    for name, value in Backbone(load_meta_graph(frozen)).values().items():
        np.testing.assert_array_equal(value, expected[name])
