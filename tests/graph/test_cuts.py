"""Multiply-adds and parameters of cuts compared with TensorFlow's profiler."""

import numpy as np
import pytest
import strangers
import tensorflow as tf
from conftest import TINY, graph_def_of, save_vgg

from transfer import Backbone, load_meta_graph
from transfer.graph import extract
from transfer.graph.cuts import blocks, default_cuts, list_cuts, stopped
from transfer.vgg import architectures

tf1 = tf.compat.v1
VGG16 = architectures.ARCHITECTURES["vgg16"]
VGG16_STAGES = ["pool1:0", "pool2:0", "pool3:0", "pool4:0", "pool5:0", "fc6/Relu:0"]


def profiled(graph):
    """Multiply-adds of convolutions and matrix products of a graph, counted by TensorFlow."""
    options = tf1.profiler.ProfileOptionBuilder.float_operation()
    options["output"] = "none"
    options["account_type_regexes"] = ["Conv2D", "MatMul", "DepthwiseConv2dNative"]
    return tf1.profiler.profile(graph, cmd="op", options=options).total_float_ops // 2


def network_of(architecture, **options):
    graph = architectures.build_graph(architecture, 10, **options)
    graph_def = graph.as_graph_def(add_shapes=True)
    size = architecture.image_size
    shape = (None, size, size, 3)
    return extract(graph_def, "fc7:0", "images:0", tf.float32, input_shape=shape), graph_def


def with_batch_of_one(graph_def, output, size):
    graph = tf.Graph()
    with graph.as_default():
        images = tf1.placeholder(tf.float32, [1, size, size, 3])
        tf.import_graph_def(graph_def, {"images:0": images}, [output])
    return graph


@pytest.mark.parametrize("convolutional", [False, True])
@pytest.mark.parametrize("architecture", [TINY, VGG16], ids=["tiny", "vgg16"])
def test_multiply_adds_equal_those_of_profiler(architecture, convolutional):
    network, graph_def = network_of(architecture, convolutional=convolutional)
    cuts = list_cuts(network)
    graph = with_batch_of_one(
        tf1.graph_util.extract_sub_graph(graph_def, ["fc7"]), "fc7:0", architecture.image_size
    )
    assert cuts[-1].multiply_adds == profiled(graph)
    assert cuts[-1].share == 1.0


def test_multiply_adds_of_depthwise_convolution():
    def build():
        x = tf1.placeholder(tf.float32, [1, 16, 16, 3], name="images")
        x = tf.nn.depthwise_conv2d(x, tf1.get_variable("d", [3, 3, 3, 2]), [1, 2, 2, 1], "SAME")
        x = tf.nn.conv2d(x, tf1.get_variable("p", [1, 1, 6, 8]), 1, "VALID")
        x = tf.reduce_mean(x, [1, 2])
        tf.matmul(x, tf1.get_variable("w", [5, 8]), transpose_b=True, name="tap")

    graph_def = graph_def_of(build)
    graph = tf.Graph()
    with graph.as_default():
        tf.import_graph_def(graph_def)
    network = extract(graph_def, "tap:0", "images:0", tf.float32, input_shape=(1, 16, 16, 3))
    assert list_cuts(network)[-1].multiply_adds == profiled(graph)


def test_cuts_of_vgg16():
    network, _ = network_of(VGG16)
    cuts = {cut.tensor: cut for cut in list_cuts(network)}
    assert [t for t, c in cuts.items() if c.ends_stage] == [*VGG16_STAGES, network.output]
    pool4 = cuts["pool4:0"]
    assert pool4.shape == (14, 14, 512)
    assert pool4.num_bytes == 14 * 14 * 512 * 4
    # arXiv 1409.1556, configuration D: three 3x3 convolutions of 512 channels, then fc6 and fc7.
    after = 3 * (3 * 3 * 512 * 512 + 512) + (7 * 7 * 512 + 1) * 4096 + (4096 + 1) * 4096
    assert pool4.trained == after
    assert cuts[network.output].trained == 0
    shares = [cut.share for cut in cuts.values()]
    assert shares == sorted(shares)
    assert default_cuts(network) == [network.output, "pool4:0", "pool3:0"]


def test_no_cut_inside_parallel_branches(tmp_path):
    def build():
        x = tf1.placeholder(tf.float32, [None, 8, 8, 3], name="images")
        x = tf.nn.conv2d(x, tf1.get_variable("a", [1, 1, 3, 4]), 1, "SAME", name="a_conv")
        y = tf.nn.conv2d(x, tf1.get_variable("b", [3, 3, 4, 4]), 1, "SAME", name="b_conv")
        y = tf.nn.relu(y, name="b_relu")
        x = tf.add(x, y, name="sum")
        tf.reduce_mean(x, [1, 2], name="tap")

    network = extract(graph_def_of(build), "tap:0", "images:0", tf.float32)
    found = [cut.tensor for cut in list_cuts(network, 8)]
    assert found == ["a_conv:0", "tap:0"]


def test_graph_without_shapes_has_cuts():
    network, _ = network_of(TINY)
    unknown = type(network)(**{**network.__dict__, "input_shape": None})
    cuts = list_cuts(unknown)
    assert cuts[-1].tensor == network.output
    assert cuts[-1].multiply_adds is None or cuts[-1].share == 1.0


def test_network_can_be_split_at_every_listed_cut(tmp_path):
    from transfer import Backbone

    backbone = Backbone(load_meta_graph(save_vgg(tmp_path / "m")))
    images = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    for cut in list_cuts(backbone.network)[:-1]:
        before, after = backbone.split(cut.tensor)
        activations = before(images)
        assert tuple(activations.shape[1:]) == cut.shape
        np.testing.assert_allclose(after(activations), backbone(images), rtol=1e-5, atol=1e-6)


def test_blocks_are_those_of_vgg():
    network, _ = network_of(VGG16)
    found = blocks(network)
    first_words = [sorted({name.split("/")[0] for name in block}) for block in found]
    assert first_words == [
        ["conv1_1", "conv1_2"],
        ["conv2_1", "conv2_2"],
        ["conv3_1", "conv3_2", "conv3_3"],
        ["conv4_1", "conv4_2", "conv4_3"],
        ["conv5_1", "conv5_2", "conv5_3"],
        ["fc6"],
        ["fc7"],
    ]
    assert sum(map(len, found)) == len(network.variables)


def test_list_cuts_does_not_modify_graph():
    network, _ = network_of(TINY)
    before = network.graph_def.SerializeToString(deterministic=True)
    list_cuts(network)
    blocks(network)
    assert network.graph_def.SerializeToString(deterministic=True) == before


def test_stopped_variables_have_no_gradient(tmp_path):
    prefix = strangers.save(strangers.gradients_that_stop, tmp_path / "m")
    layer = Backbone(load_meta_graph(prefix), "fc7/relu")
    with tf.GradientTape() as tape:
        features = layer(np.ones([2, 16, 16, 3], np.float32), training=True)
    gradients = tape.gradient(features, [v.value for v in layer.graph_variables])
    without = [n for n, g in zip(layer.variable_names, gradients, strict=True) if g is None]
    assert stopped(layer.network) == {"frozen:0": without}
    assert without == ["conv1/weights", "conv1/biases"]
    assert stopped(layer.split("frozen")[1].network) == {}
    assert stopped(layer.split("conv1")[1].network) == {}  # no trainable variables remain


def test_variables_with_path_around_stop_gradient_are_not_stopped():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        w, v = tf1.get_variable("w", [4, 4]), tf1.get_variable("v", [4, 4])
        net = x @ w
        inner = tf.stop_gradient(tf.stop_gradient(net, name="first") @ v, name="second")
        tf.add(net, inner, name="tap")

    network = extract(graph_def_of(build), "tap", "x", tf.float32, input_shape=(None, 4))
    assert stopped(network) == {"second:0": ["v"]}
