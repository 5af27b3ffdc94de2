"""`to_keras`: networks as stock Keras layers equal the graphs that they are made from, on every
backend of Keras."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from native_graphs import GRAPHS, REFUSED
from stock import Program, assert_close

from transfer import Backbone, Classifier, Head, Preprocess, load_meta_graph, to_keras
from transfer.layers.graph_layer import GraphLayer
from transfer.layers.native.names import Names

WITHOUT_GRADIENTS = {"conv_dilated", "conv_groups"}
"""TensorFlow computes no gradients of these on some CPUs."""


def report(name, difference, model):
    """A row of the table that `pytest -s` shows."""
    gradients = "none" if difference.gradients is None else f"{difference.gradients:.1e}"
    print(f"| {name} | {difference.outputs:.1e} | {gradients} | {len(model.operations)} |")


def inputs_of(layer, batch=3):
    shape = layer.network.input_shape[1:]
    images = np.random.default_rng(0).standard_normal((batch, *shape))
    if layer.network.input_dtype.is_integer:
        return np.abs(images * 60).astype(layer.network.input_dtype.as_numpy_dtype)
    return images.astype(np.float32)


def classes_of(model):
    """Modules of the layers and operations of a model."""
    return {type(operation).__module__.split(".")[0] for operation in model.operations}


@pytest.mark.parametrize("name", GRAPHS)
def test_operation_equals_stock_session(name, compared):
    program = Program(GRAPHS[name])
    layer = program.layer()
    model = to_keras(layer)
    images = inputs_of(layer)
    feeds = {"keep_prob:0": 1.0} if name == "dropout" else None
    expected = program.run(images, feeds)
    assert_close(model(images), expected)
    assert_close(model(images[:1]), expected[:1])  # any number of images
    assert classes_of(model) == {"keras"}
    assert compared[0].gradients is not None or name in WITHOUT_GRADIENTS


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused_with_its_node(name):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        to_keras(Program(build).layer())


def test_a_difference_is_an_error(monkeypatch):
    layer = Program(GRAPHS["conv_bias_relu"]).layer()
    call = GraphLayer.call
    monkeypatch.setattr(GraphLayer, "call", lambda *args, **kw: call(*args, **kw) * 1.001)
    with pytest.raises(ValueError, match=r"outputs differ by 0\.001 of the largest value; expect"):
        to_keras(layer)


@pytest.fixture
def dense_with_other_gradients(monkeypatch):
    """A layer whose gradients are 1 % too large in its first calls, as many as the argument."""

    def layer(num_calls):
        call, calls = GraphLayer.call, []

        def with_other_gradient(*args, **options):
            outputs = call(*args, **options)
            calls.append(outputs)
            scale = 0.01 if len(calls) <= num_calls else 0.0
            return outputs + scale * (outputs - tf.stop_gradient(outputs))

        monkeypatch.setattr(GraphLayer, "call", with_other_gradient)
        return Program(GRAPHS["dense"]).layer()

    return layer


def test_a_different_gradient_is_an_error(dense_with_other_gradients):
    layer = dense_with_other_gradients(num_calls=3)
    with pytest.raises(ValueError, match=r"gradients with respect to the input differ by 0\.01"):
        to_keras(layer)


def test_gradients_that_differ_on_one_input_are_compared_on_others(
    dense_with_other_gradients, compared
):
    to_keras(dense_with_other_gradients(num_calls=1))
    assert compared[0].gradients <= 1e-4


def test_layers_are_named_after_scopes():
    model = to_keras("pretrained/vgg_small", tap="prob")
    names = [layer.name for layer in model.layers]
    assert model.name == "vgg_small"
    assert {"images", "conv1_1", "pool1", "conv5_2", "fc6", "fc7", "fc8", "prob"} <= {*names}
    assert model.get_layer("conv1_1").activation is keras.activations.relu
    assert isinstance(model.get_layer("fc7"), keras.layers.Dense)
    backbone = Backbone("pretrained/vgg_small", "fc7")
    images = np.random.default_rng(0).random((2, 64, 64, 3), np.float32)
    fc7 = keras.Model(model.input, model.get_layer("fc7").output)
    assert_close(fc7(images), backbone(images))


@pytest.mark.parametrize(
    ("nodes", "operation", "name"),
    [
        (["vgg_16/conv1/conv1_1/Conv2D", "vgg_16/conv1/conv1_1/Relu"], "Conv2D", "conv1_1"),
        (["fc7/MatMul", "fc7"], "MatMul", "fc7"),
        (["MatMul_2", "add_1"], "MatMul", "MatMul_2"),
        (["vgg_16/pool5/MaxPool"], "MaxPool", "pool5"),
        (["vgg_16/dropout6/dropout/mul_1"], "Dropout", "dropout6"),
        (["dropout/dropout/SelectV2"], "Dropout", "dropout"),
        (["fc6/dropout/mul"], "Dropout", "dropout"),
    ],
)
def test_layer_is_named_after_its_scope(nodes, operation, name):
    assert Names().of(nodes, operation, is_scope=True) == name


def test_dropout_is_active_in_training_only():
    layer = Program(GRAPHS["dropout"]).layer()
    model = to_keras(layer)
    assert model.get_layer("dropout").rate == pytest.approx(0.4)
    images = inputs_of(layer)
    assert_close(model(images), layer(images))
    hidden = keras.Model(model.input, model.get_layer("dropout").output)
    values = np.asarray(hidden(np.repeat(images, 100, 0), training=True))
    assert 0.3 < np.mean(values == 0) < 0.5


def test_batch_norm_uses_stored_statistics_in_training():
    for name in ("fused_batch_norm", "composed_batch_norm"):
        layer = Program(GRAPHS[name]).layer()
        model = to_keras(layer)
        (norm,) = [n for n in model.layers if isinstance(n, keras.layers.BatchNormalization)]
        assert not norm.trainable
        images = inputs_of(layer)
        assert_close(model(images, training=True), layer(images, training=True))
        values = dict(zip(layer.variable_names, layer.graph_variables, strict=True))
        for weight in norm.weights:
            np.testing.assert_array_equal(weight, values[weight.name], err_msg=weight.name)


def test_equal_weights_share_a_layer():
    model = to_keras(Program(GRAPHS["towers_with_the_same_weights"]).layer())
    assert len([layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]) == 1


def test_image_size_is_needed_only_if_the_graph_states_none():
    def of_any_size():
        images = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3], name="x")
        tf.reduce_mean(tf.nn.relu(images), [1, 2], name="tap")

    layer = Program(of_any_size).layer()
    with pytest.raises(ValueError, match="'x:0' takes any image size.*give image_size"):
        to_keras(layer)
    assert to_keras(layer, image_size=(8, 12)).input_shape == (None, 8, 12, 3)
    with pytest.raises(ValueError, match="takes images of 64x64 pixels, not 32x32"):
        to_keras(Backbone("pretrained/vgg_small"), image_size=32)
    with pytest.raises(TypeError, match="source is of type Dense; expected a Backbone"):
        to_keras(keras.layers.Dense(2))


def test_prefix_and_suffix_are_the_whole():
    backbone = Backbone("pretrained/vgg_small")
    prefix, suffix = map(to_keras, backbone.split("pool4"))
    images = np.random.default_rng(0).random((2, 64, 64, 3), np.float32)
    assert_close(suffix(prefix(images)), backbone(images))
    assert prefix.output_shape == (None, 4, 4, 192)
    assert to_keras(backbone, tap="pool4").output_shape == (None, 4, 4, 192)


def test_several_taps_are_a_dict(tmp_path):
    """Also inside of a branch: a tap keeps its tensor apart from the layers around it."""
    backbone = Backbone("pretrained/vgg_small", ["pool3", "conv4_2/BiasAdd", "fc7"])
    model = to_keras(backbone)
    images = np.random.default_rng(0).random((2, 64, 64, 3), np.float32)
    expected, found = backbone(images), model(images)
    assert [*found] == [*expected]
    for name, features in expected.items():
        assert_close(found[name], features, name)
    model.save(tmp_path / "taps.keras")
    loaded = keras.models.load_model(tmp_path / "taps.keras")(images)
    assert_close(loaded["pool3"], expected["pool3"])
    again = to_keras("pretrained/vgg_small", ["pool3", "fc7"])(images)
    assert {name: features.shape for name, features in again.items()} == {
        "pool3": (2, 8, 8, 96),
        "fc7": (2, 512),
    }
    with pytest.raises(TypeError, match="converted up to one tap"):
        to_keras(backbone, ["pool3", "pool4"])


def test_classifier_on_several_taps_is_native():
    backbone = Backbone("pretrained/vgg_small", ["pool4", "fc7"])
    classifier = Classifier(backbone, Head(2), Preprocess("torch", 64), ["a", "b"])
    classifier.build_from_size()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    assert_close(to_keras(classifier)(pixels), classifier(pixels))


def new_classifier(mode="caffe", head=None):
    head = head or Head(3, hidden=[8], dropout=0.5, seed=0)  # at a kink, gradients would differ
    classifier = Classifier(
        Backbone("pretrained/vgg_small"), head, Preprocess(mode, 64), ["a", "b", "c"]
    )
    classifier.build_from_size()
    return classifier


@pytest.mark.parametrize("mode", ["caffe", "torch", "unit", "none"])
def test_classifier_takes_pixels(mode):
    classifier = new_classifier(mode)
    model = to_keras(classifier)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    assert_close(model(pixels), classifier(pixels))
    assert model.get_layer("head").units == 3
    rates = [n.rate for n in model.layers if n.name.startswith("head_dropout")]
    assert rates == [0.5, 0.5]
    with pytest.raises(ValueError, match="tap is for a network"):
        to_keras(classifier, "fc7")


@pytest.mark.slow
def test_classifier_from_edited_model_equals_it(tmp_path, stock_session):
    """Native layers, an own head, trained: evaluated here, and written as a meta graph."""
    from transfer import Card
    from transfer.exports.meta_graph import save_classifier

    backbone = to_keras("pretrained/vgg_small")
    backbone.trainable = False
    net = keras.layers.BatchNormalization()(backbone.output)
    net = keras.layers.Dropout(0.3)(net)
    model = keras.Model(backbone.input, keras.layers.Dense(3, activation="softmax")(net))
    images = np.random.default_rng(0).random((12, 64, 64, 3), np.float32)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(images, np.arange(12) % 3, epochs=2, verbose=0)
    classifier = Classifier.from_model(model, Preprocess("none", 64), ["a", "b", "c"])
    expected = model(images)
    assert_close(classifier.probabilities(images), expected)
    assert classifier.head.graph_variables[0] is model.layers[-1].kernel
    save_classifier(classifier, tmp_path / "m" / "model", Card())
    loaded = Classifier.load(tmp_path / "m" / "model")
    assert_close(loaded.probabilities(images), expected)
    assert loaded.labels == ["a", "b", "c"]
    session = stock_session(tmp_path / "m" / "model")
    card = load_meta_graph(tmp_path / "m" / "model").card
    assert_close(session.run(card.outputs["probabilities"], {card.input: images}), expected)
    assert_close(tf.nn.softmax(to_keras(classifier)(images)), expected)


def test_classifier_from_convolutional_model():
    """Its logits are not a matrix product."""
    images = keras.Input((8, 8, 3))
    net = keras.layers.Conv2D(4, 3)(images)
    model = keras.Model(images, keras.layers.GlobalAveragePooling2D()(net))
    classifier = Classifier.from_model(model, Preprocess("unit", 8), list("abcd"))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    assert_close(classifier(pixels), model(pixels / np.float32(255)))


def test_from_model_refuses_what_does_not_fit():
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)]
    )
    with pytest.raises(ValueError, match=r"takes inputs of shape \(8, 8, 3\).*\(9, 9, 3\)"):
        Classifier.from_model(model, Preprocess("unit", 9), ["a", "b"])
    with pytest.raises(ValueError, match="has 2 outputs but there are 3 labels"):
        Classifier.from_model(model, Preprocess("unit", 8), ["a", "b", "c"])
    anysize = keras.Sequential([keras.Input((None, None, 3)), keras.layers.GlobalMaxPooling2D()])
    with pytest.raises(ValueError, match="expected a known size"):
        Classifier.from_model(anysize, Preprocess("unit", 8), ["a", "b", "c"])
    sigmoid = keras.Sequential([keras.Input((8, 8, 3)), model, keras.layers.Activation("sigmoid")])
    with pytest.raises(ValueError, match="ends in a sigmoid.* with one output per class"):
        Classifier.from_model(sigmoid, Preprocess("unit", 8), ["a", "b"])
    with pytest.raises(ValueError, match=r"labels=\['a'\]: a classifier needs at least 2 classes"):
        Classifier.from_model(model, Preprocess("unit", 8), ["a"])


def random_layer(graph, tap, input, feeds):
    from transfer.layers.graph_layer import _initializers

    network = graph.network(tap, input, feeds)
    layer = GraphLayer(network, _initializers(network))
    layer.randomize(0)
    return layer


@pytest.mark.slow
def test_graphs_of_strangers(shared_wild, compared):
    """All but the one whose tap is inside of a loop."""
    converted = []
    for case in json.loads((shared_wild / "cases.json").read_text()):
        if case["input"] is None:
            continue
        graph = load_meta_graph(shared_wild / case["case"] / case["prefix"])
        arguments = (graph, case["tap"], case["input"], case["feeds"])
        if case["weights"]:
            layer = Backbone(graph, case["tap"], input=case["input"], feeds=case["feeds"])
        else:
            layer = random_layer(*arguments)
        shape = layer.network.input_shape
        is_any = shape is not None and len(shape) == 4 and None in shape[1:3]
        model = to_keras(layer, image_size=64 if is_any else None)
        assert classes_of(model) == {"keras"}, case["case"]
        converted.append(case["case"])
        report(case["case"], compared[-1], model)
    assert len(converted) == 25


@pytest.mark.parametrize("tap", ["fc7", "prob"])
def test_embedded_model(tap, compared):
    model = to_keras("pretrained/vgg_small", tap)
    report(f"embedded {tap}", compared[0], model)
    assert compared[0].outputs == 0
    assert compared[0].gradients < 1e-5
