"""Converted NCHW networks compared with a plain session on the original graph."""

import numpy as np
import pytest
import strangers
import tensorflow as tf
from stock import assert_close, images

from transfer import Backbone, load_meta_graph

tf1 = tf.compat.v1


def twin(program):
    """The program with NHWC convolutions between transposes, which a CPU can compute."""

    def conv(x, name, channels, padding="SAME", order="NHWC"):
        x = tf.transpose(x, [0, 2, 3, 1]) if order == "NCHW" else x
        return back(conv_of(x, name, channels, padding), order)

    def pool(x, name, order="NHWC"):
        x = tf.transpose(x, [0, 2, 3, 1]) if order == "NCHW" else x
        return back(pool_of(x, name), order)

    def back(x, order):
        return tf.transpose(x, [0, 3, 1, 2]) if order == "NCHW" else x

    def norm(x, scale, offset, mean, variance, *, is_training, data_format):
        x = tf.transpose(x, [0, 2, 3, 1])
        y, *rest = norm_of(x, scale, offset, mean, variance, is_training=is_training)
        return back(y, data_format), *rest

    conv_of, pool_of, norm_of = strangers.conv, strangers.pool, tf1.nn.fused_batch_norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strangers, "conv", conv)
        patch.setattr(strangers, "pool", pool)
        patch.setattr(tf1.nn, "fused_batch_norm", norm)
        program()


@pytest.mark.parametrize("name", ["channels_first", "channels_first_inside"])
@pytest.mark.parametrize("tap", ["fc7/relu", "conv1/relu", "conv2/relu"])
def test_features_and_gradients_equal_those_of_nhwc_network(tmp_path, name, tap):
    prefix = strangers.save(strangers.ALL[name], tmp_path / "m")
    layer = Backbone(load_meta_graph(prefix), tap, pooling=None)
    x = images(5, 16, 16, 3)
    with tf.GradientTape() as tape:
        found = layer(x, training=True)
    upstream = images(*found.shape, seed=1)
    weights = [variable.value for variable in layer.graph_variables]
    gradients = tape.gradient(found, weights, upstream, unconnected_gradients="zero")

    with tf.Graph().as_default() as graph, tf1.Session() as session:
        twin(strangers.ALL[name])
        tf1.train.Saver().restore(session, prefix)
        takes_first = name == "channels_first"
        y = graph.get_tensor_by_name(f"{tap}:0")
        variables = {v.op.name: v for v in tf1.global_variables()}
        theirs = tf1.gradients(
            y,
            [variables[name] for name in layer.variable_names],
            upstream,
            unconnected_gradients="zero",
        )
        feeds = {"images:0": x.transpose(0, 3, 1, 2) if takes_first else x}
        expected, expected_gradients = session.run([y, theirs], feeds)
    assert_close(found, expected)
    for ours, other, variable in zip(
        gradients, expected_gradients, layer.variable_names, strict=True
    ):
        assert_close(ours, other, variable)


def test_forward_pass_equals_original_nchw_graph(tmp_path):
    """oneDNN supports NCHW convolutions and pooling, but not their gradients."""
    prefix = strangers.save(strangers.channels_first, tmp_path / "m")
    layer = Backbone(load_meta_graph(prefix), "pool2", pooling=None)
    x = images(3, 16, 16, 3)
    with tf.Graph().as_default(), tf1.Session() as session:
        saver = tf1.train.import_meta_graph(f"{prefix}.meta")
        saver.restore(session, prefix)
        try:
            expected = session.run("pool2:0", {"images:0": x.transpose(0, 3, 1, 2)})
        except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError):
            pytest.skip("this processor's TensorFlow computes no channels first")
    assert_close(layer(x), expected.transpose(0, 2, 3, 1))


def test_parts_and_copies_of_converted_network_are_channels_last(tmp_path):
    prefix = strangers.save(strangers.channels_first, tmp_path / "m")
    layer = Backbone(load_meta_graph(prefix), "fc7/relu")
    x = images(4, 16, 16, 3)
    first, second = layer.split("pool1")
    assert first(x).shape == (4, 8, 8, 4)
    np.testing.assert_array_equal(second(first(x)), layer(x))
    pooled = Backbone(load_meta_graph(prefix), "pool1")(x)
    np.testing.assert_allclose(pooled, tf.reduce_mean(first(x), [1, 2]), rtol=1e-6)
