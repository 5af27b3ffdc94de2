"""``Backbone`` with several taps: one pass, with the values of one backbone for each."""

import json

import keras
import numpy as np
import pytest
import strangers
import tensorflow as tf
from stock import Program, assert_close
from stock import images as images_of

from transfer import Backbone, Classifier, Head, Preprocess, load_meta_graph, save_meta_graph
from transfer.exports.meta_graph import save_classifier
from transfer.graph import channels_last, free_batch
from transfer.layers.graph_layer import GraphLayer
from transfer.models.card import Card

tf1 = tf.compat.v1
TAPS = ["fc7", "pool1", "conv2_2:0", "images", "conv2_1"]


def test_each_tap_equals_stock_session_and_backbone_of_one_tap(tiny_vgg, stock_session, images):
    graph = load_meta_graph(tiny_vgg)
    found = Backbone(graph, tap=TAPS)(images)
    assert list(found) == TAPS
    tensors = [name if ":" in name else f"{name}:0" for name in TAPS]
    expected = stock_session(tiny_vgg).run(tensors, {"images:0": images})
    for name, value in zip(TAPS, expected, strict=True):
        assert_close(found[name], value, name)
        one = Backbone(graph, tap=name, pooling=None)(images)
        np.testing.assert_array_equal(found[name], one, name)


def test_taps_are_computed_in_one_pass(model, images):
    backbone = Backbone(load_meta_graph(model), tap=["conv1_1", "pool2", "conv2_1", "fc7"])
    run = tf.function(lambda x: backbone(x)).get_concrete_function(tf.TensorSpec(images.shape))
    graph_def = run.graph.as_graph_def()
    nodes = [*graph_def.node, *(n for f in graph_def.library.function for n in f.node_def)]
    assert sum(node.op == "Conv2D" for node in nodes) == 3


def test_tuple_of_one_tap_gives_dict(model, images):
    graph = load_meta_graph(model)
    found = Backbone(graph, tap=("pool1",))(images)
    assert list(found) == ["pool1"]
    assert found["pool1"].shape == (5, 8, 8, 8)


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_pooling_reduces_each_tap(model, images, pooling):
    graph = load_meta_graph(model)
    found = Backbone(graph, tap=["fc7", "pool1"], pooling=pooling)(images)
    for name, value in found.items():
        np.testing.assert_array_equal(value, Backbone(graph, tap=name, pooling=pooling)(images))


def test_all_taps_are_averages_and_maxima_of_every_activation(model, images):
    graph = load_meta_graph(model)
    backbone = Backbone(graph, tap="all")
    found = backbone(images)
    names = [node.name for node in graph.nodes.values() if node.op == "Relu"]
    assert list(found) == [f"{name}:0" for name in names]
    maps = Backbone(graph, tap=list(found))(images)
    for name, value in maps.items():
        expected = np.asarray(value)
        if value.shape.rank == 4:
            expected = np.concatenate([expected.mean((1, 2)), expected.max((1, 2))], axis=-1)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
    joined = np.concatenate(list(found.values()), axis=-1)
    np.testing.assert_allclose(backbone.concatenated()(images), joined, rtol=1e-6)


@pytest.fixture
def branches(tmp_path):
    """Two branches that join: neither separates the input from the output."""
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.float32, [None, 6, 6, 3], name="x")
        kernel = tf1.get_variable("kernel", [3, 3, 3, 4], use_resource=False)
        net = tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME"), name="net")
        left = tf.nn.max_pool2d(net, 2, 2, "SAME", name="left")
        right = tf.nn.avg_pool2d(net, 2, 2, "SAME", name="right")
        tf.add(left, right, name="joined")
    values = {"kernel": np.random.default_rng(0).standard_normal([3, 3, 3, 4]).astype("f")}
    save_meta_graph(graph, tmp_path / "branches", values)
    return tmp_path / "branches"


def test_taps_may_be_inside_branches(branches, stock_session):
    x = images_of(2, 6, 6, 3)
    taps = ["right", "joined", "left"]
    backbone = Backbone(load_meta_graph(branches), tap=taps)
    found = backbone(x)
    expected = stock_session(branches).run([f"{name}:0" for name in taps], {"x:0": x})
    for name, value in zip(taps, expected, strict=True):
        assert_close(found[name], value, name)
    prefix, suffix = backbone.split(at="net")
    for name, value in suffix(prefix(x)).items():
        np.testing.assert_array_equal(value, found[name])


def test_gradients_of_a_loss_of_all_taps_equal_tf_gradients(tiny_vgg, stock_session, images):
    taps = ["pool1", "conv2_2", "fc7"]
    inputs = tf.constant(images)
    backbone = Backbone(load_meta_graph(tiny_vgg), tap=taps)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.add_n([tf.reduce_sum(value**2) for value in backbone(inputs).values()])
    found = tape.gradient(loss, inputs)
    stock = stock_session(tiny_vgg)
    with stock.graph.as_default():
        tensors = [stock.graph.get_tensor_by_name(f"{name}:0") for name in taps]
        loss = tf.add_n([tf.reduce_sum(value**2) for value in tensors])
        gradient = tf1.gradients(loss, stock.graph.get_tensor_by_name("images:0"))
        (expected,) = stock.run(gradient, {"images:0": images})
    assert_close(found, expected)


def test_split_before_earliest_tap_gives_suffix_with_all(model, images):
    backbone = Backbone(load_meta_graph(model), tap=["fc7", "conv2_1", "pool2"])
    expected = backbone(images)
    for at in ("images", "pool1", "conv2_1"):
        prefix, suffix = backbone.split(at)
        found = suffix(prefix(images))
        assert list(found) == list(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, f"{name} after {at}")
    with pytest.raises(ValueError, match="tap 'conv2_1' does not depend on it; cut before the"):
        backbone.split("conv2_2")


def test_concatenated_taps_are_one_tensor_to_split_at(model, images):
    backbone = Backbone(load_meta_graph(model), tap=["pool2", "fc7", "pool1"])
    layer = backbone.concatenated()
    parts = [
        value if value.ndim == 2 else value.mean((1, 2)) for value in numpy_of(backbone(images))
    ]
    np.testing.assert_allclose(layer(images), np.concatenate(parts, 1), rtol=1e-6)
    for at in ("pool1", "features"):
        prefix, suffix = layer.split(at)
        np.testing.assert_array_equal(suffix(prefix(images)), layer(images))
    assert all(a is b for a, b in zip(layer.weights, backbone.weights, strict=True))
    one = Backbone(load_meta_graph(model))
    assert one.concatenated() is one


def test_activations_are_those_of_the_tap_all_or_after_a_cut(model, images):
    graph = load_meta_graph(model)
    everything = Backbone(graph, tap="all").concatenated()
    backbone = Backbone(graph)
    found = backbone.activations()
    np.testing.assert_array_equal(found(images), everything(images))
    assert all(a is b for a, b in zip(found.weights, backbone.weights, strict=True))
    after = backbone.activations("pool2")(images)
    np.testing.assert_array_equal(after, everything(images)[:, -after.shape[1] :])
    assert 0 < after.shape[1] < everything(images).shape[1]


def test_activations_of_layer_without_nonlinearity_are_its_output(model, images):
    _, pooling = Backbone(load_meta_graph(model), tap="pool2").split("conv2_2/Relu")
    maps = np.ones((2, 8, 8, 16), np.float32)
    np.testing.assert_array_equal(pooling.activations()(maps), pooling(maps))


def numpy_of(features):
    return [value.numpy() for value in features.values()]


@pytest.mark.filterwarnings("ignore:.*made from a configuration")
def test_keras_model_with_several_taps_is_saved_and_loaded(model, images, tmp_path):
    backbone = Backbone(load_meta_graph(model), tap=["pool2", "conv1_1", "fc7"])
    inputs = keras.Input((16, 16, 3))
    keras.Model(inputs, backbone(inputs)).save(tmp_path / "m.keras")
    found = keras.models.load_model(tmp_path / "m.keras")(images)
    for name, value in backbone(images).items():
        np.testing.assert_array_equal(found[name], value, name)
    clone = Backbone.from_config(backbone.get_config())
    assert clone.network.taps == backbone.network.taps


def test_configuration_without_taps_of_earlier_versions_is_read(model):
    config = Backbone(load_meta_graph(model)).get_config()
    del config["taps"]
    assert Backbone.from_config(config).network.taps == {}


@pytest.mark.slow
def test_taps_of_a_network_with_fixed_batch_size_are_padded():
    def build():
        x = tf1.placeholder(tf.float32, [2, 3], name="x")
        a = tf.multiply(x, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], name="a")
        tf.tanh(a, name="tap")

    program = Program(build)
    network = free_batch(program.network({"first": "a", "last": "tap"}))
    assert network.batch_size == 2
    x = images_of(5, 3)
    found = program.layer(network)(x)
    for name, tap in (("first", "a"), ("last", "tap")):
        parts = [program.run(np.resize(x[i : i + 2], (2, 3)), tap=tap) for i in (0, 2, 4)]
        np.testing.assert_allclose(found[name], np.concatenate(parts)[:5], rtol=1e-6)


def test_channels_first_taps_become_channels_last(tmp_path):
    prefix = strangers.save(strangers.ALL["channels_first"], tmp_path / "m")
    graph, x = load_meta_graph(prefix), images_of(2, 16, 16, 3)
    taps = ["conv1/relu", "fc7/relu", "conv2/relu"]
    for name, value in Backbone(graph, tap=taps)(x).items():
        one = Backbone(graph, tap=name, pooling=None)(x)
        np.testing.assert_array_equal(value, one, name)


def test_tap_in_front_of_dropout_is_the_same_in_training():
    def build():
        x = tf1.placeholder(tf.float32, [None, 8], name="x")
        a = tf.tanh(x, name="a")
        tf.identity(tf1.nn.dropout(a, rate=0.5), name="tap")

    program, x = Program(build), images_of(4, 8)
    layer = GraphLayer(channels_last(program.network({"a": "a", "out": "tap"})), {})
    evaluated, trained = layer(x), layer(x, training=True)
    np.testing.assert_array_equal(evaluated["out"], evaluated["a"])
    np.testing.assert_array_equal(trained["a"], evaluated["a"])
    assert np.mean(trained["out"] == 0) > 0.1


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ([], "expected one name or more, each once"),
        (["fc7", "fc7"], "expected one name or more, each once"),
        (["fc7", "nothing"], "no tensor 'nothing'"),
        (["fc7", "conv1_1/weights"], "does not depend on the input"),
    ],
)
def test_wrong_taps_are_refused(model, tap, message):
    with pytest.raises(ValueError, match=message):
        Backbone(load_meta_graph(model), tap=tap)


@pytest.mark.parametrize("tap", [7, [7], {"fc7": 1}])
def test_tap_of_wrong_type_is_refused(model, tap):
    with pytest.raises(TypeError, match="expected a tensor's name, or a list of names"):
        Backbone(load_meta_graph(model), tap=tap)


def test_classifier_of_several_taps_is_saved_split_and_exported(model, tmp_path):
    backbone = Backbone(load_meta_graph(model), tap=["pool2", "fc7", "pool1"])
    classifier = Classifier(backbone, Head(2, seed=0), Preprocess("unit", 16), ["blue", "red"])
    classifier.build_from_size()
    photos = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3)).astype(np.uint8)
    logits = classifier(photos)
    frozen, trained = classifier.split("pool1")
    assert_close(trained(frozen(classifier.preprocess(photos))), logits)
    classifier.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "m.keras")(photos), logits)
    save_classifier(classifier, tmp_path / "meta" / "model", Card())
    assert_close(Classifier.load(tmp_path / "meta")(photos), logits)


@pytest.mark.slow
def test_third_party_meta_graphs_with_several_taps(shared_wild):
    cases = [c for c in json.loads((shared_wild / "cases.json").read_text()) if c["weights"]]
    for case in cases:
        graph = load_meta_graph(shared_wild / case["case"] / case["prefix"])
        network = graph.network(case["tap"], case["input"], case["feeds"])
        floats = [node.name for node in network.graph_def.node if node.op in ("Relu", "MaxPool")]
        taps = [case["tap"], *floats[:2]]
        options = {"input": case["input"], "feeds": case["feeds"]}
        shape = [size or 28 for size in network.input_shape or (None, 32, 32, 3)]
        x = images_of(network.batch_size or 2, *shape[1:])
        for name, value in Backbone(graph, taps, **options)(x).items():
            one = Backbone(graph, name, pooling=None, **options)(x)
            assert_close(value, one, f"{case['case']}: {name}")
