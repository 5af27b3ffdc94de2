import numpy as np
import pytest
import tensorflow as tf

from transfer.graph import extract, graph_preprocessing
from transfer.graph.graph_preprocessing import Preparation

tf1 = tf.compat.v1
MEANS = [103.939, 116.779, 123.68]


def slim(x):
    return x - tf.constant([123.68, 116.78, 103.94], shape=[1, 1, 1, 3])


def machrisaa(x):
    red, green, blue = tf.split(x * 255.0, 3, 3)
    return tf.concat([blue - MEANS[0], green - MEANS[1], red - MEANS[2]], 3)


def reversed_by_stride(x):
    return x[..., ::-1] - tf.constant(MEANS)


def gathered(x):
    return tf.gather(x, [2, 1, 0], axis=3)


def scaled(x):
    return tf.cast(x, tf.float32) / 255.0


def mean_image(x):
    return x - tf.constant(np.full((8, 8, 3), 120, np.float32))


def stacked(x):
    return tf.stack(tf.unstack(x, axis=3)[::-1], axis=3)


def sliced_and_stacked(x):
    return tf.stack([x[..., 2] - MEANS[0], x[..., 1] - MEANS[1], x[..., 0] - MEANS[2]], 3)


def sliced_and_joined(x):
    return tf.concat([x[..., 2:], x[..., 1:2], x[..., :1]], 3)


def divided_as_python_2_does(x):
    return tf.raw_ops.Div(x=x, y=tf.constant(255.0))


def resized_first(x):
    mean = tf.reshape(tf.constant(MEANS), [1, 1, 1, 3])
    return tf.compat.v1.image.resize_bilinear(x, [8, 8]) - mean


def mirrored(x):
    return x[:, :, ::-1]


def nothing(x):
    return tf.identity(x)


CASES = {
    slim: Preparation((123.68, 116.78, 103.94)),
    machrisaa: Preparation(tuple(MEANS), (255.0,), True),
    reversed_by_stride: Preparation(tuple(MEANS), (), True),
    gathered: Preparation(swaps=True),
    scaled: Preparation(scales=(1 / 255,)),
    mean_image: Preparation((120.0,)),
    stacked: Preparation(swaps=True),
    sliced_and_stacked: Preparation(tuple(MEANS), (), True),
    sliced_and_joined: Preparation(swaps=True),
    divided_as_python_2_does: Preparation(scales=(1 / 255,)),
    resized_first: Preparation(tuple(MEANS)),
    mirrored: Preparation(),
    nothing: Preparation(),
}


def network(prepare):
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        kernel = tf1.get_variable("w", [3, 3, 3, 4], use_resource=False)
        biases = tf1.get_variable("b", [4], use_resource=False)
        net = tf.nn.relu(tf.nn.conv2d(prepare(x), kernel, 1, "SAME") + biases)
        tf.multiply(net - 0.5, 3.0, name="tap")  # after the first layer: not preprocessing
    return extract(graph.as_graph_def(), "tap:0", "x:0")


@pytest.mark.parametrize("prepare", CASES, ids=lambda prepare: prepare.__name__)
def test_preprocessing_in_graph_is_detected(prepare):
    found, expected = graph_preprocessing.find(network(prepare)), CASES[prepare]
    # In the order of the graph, which may process channels one after another.
    np.testing.assert_allclose(sorted(found.means), sorted(expected.means), rtol=1e-6)
    np.testing.assert_allclose(found.scales, expected.scales, rtol=1e-6)
    assert found.swaps == expected.swaps
    assert bool(found) == bool(expected)


def test_repeated_preprocessing_steps_are_reported():
    found = Preparation((103.9, 116.8, 123.7), (), True)
    assert str(found) == "subtracts 103.9, 116.8, 123.7 and swaps red and blue"
    assert found.repeats("caffe") == "subtract a mean and swap red and blue"
    assert found.repeats("slim") == "subtract a mean"
    assert found.repeats("none") is None
    assert found.repeats("unit") is None
    assert Preparation(scales=(1 / 255,)).repeats("unit") == "scale"
    assert Preparation(scales=(255.0,)).repeats("unit") is None
