"""``Backbone`` compared with a plain TF1 session on the same files."""

import base64
import copy
import json
import pickle
import zlib
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import save_vgg

from transfer import Backbone, Card, Head, load_meta_graph, save_meta_graph
from transfer.vgg import architectures

tf1 = tf.compat.v1
PRETRAINED = Path(__file__).parents[2] / "pretrained" / "vgg_small"
RTOL = 1e-5  # of the largest value


def assert_close(found, reference):
    reference = np.asarray(reference)
    np.testing.assert_allclose(found, reference, rtol=0, atol=RTOL * np.abs(reference).max())


def test_features_equal_plain_tensorflow_session(tiny_vgg, stock_session, images):
    expected = stock_session(tiny_vgg).run("fc7:0", {"images:0": images})
    backbone = Backbone(load_meta_graph(tiny_vgg))
    assert_close(backbone(images), expected.reshape(len(images), -1))
    raw = Backbone(load_meta_graph(tiny_vgg), tap="fc7:0", pooling=None)
    assert_close(raw(images), expected)


def test_4d_tap_is_averaged_over_height_and_width(tmp_path, stock_session):
    prefix = save_vgg(tmp_path / "m", convolutional=True)
    images = np.random.default_rng(1).random((2, 24, 28, 3), np.float32)
    expected = stock_session(prefix).run("fc7:0", {"images:0": images})
    assert expected.shape == (2, 3, 4, 32)
    assert_close(Backbone(load_meta_graph(prefix))(images), expected.mean((1, 2)))


def test_gradients_equal_tf_gradients(tiny_vgg, stock_session, images):
    backbone = Backbone(load_meta_graph(tiny_vgg))
    inputs = tf.constant(images)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(tf.square(backbone(inputs)))
    sources = [inputs, *(v.value for v in backbone.graph_variables)]
    found = tape.gradient(loss, sources)

    stock = stock_session(tiny_vgg)
    with stock.graph.as_default():
        variables = {v.op.name: v for v in tf1.global_variables()}
        loss = tf.reduce_sum(tf.square(stock.graph.get_tensor_by_name("fc7:0")))
        sources = [
            stock.graph.get_tensor_by_name("images:0"),
            *(variables[name] for name in backbone.variable_names),
        ]
        expected = stock.run(tf1.gradients(loss, sources), {"images:0": images})
    for name, ours, theirs in zip(
        ["images", *backbone.variable_names], found, expected, strict=True
    ):
        assert np.abs(theirs).max() > 0, name
        assert_close(ours, theirs)


@pytest.mark.parametrize("at", ["images", "conv1_1", "pool1", "conv2_2", "fc6", "fc7"])
def test_suffix_of_prefix_equals_backbone(tiny_vgg, images, at):
    backbone = Backbone(load_meta_graph(tiny_vgg))
    prefix, suffix = backbone.split(at=at)
    np.testing.assert_array_equal(suffix(prefix(images)), backbone(images))
    assert len(prefix.weights) + len(suffix.weights) == len(backbone.weights)


def test_split_shares_the_weights(model, images):
    backbone = Backbone(load_meta_graph(model))
    before = backbone(images)
    _, suffix = backbone.split(at="pool2")
    for variable in suffix.trainable_variables:
        variable.assign(variable * 2)
    assert np.abs(backbone(images) - before).max() > 0.01


def test_only_variables_of_the_tap_are_read(model):
    backbone = Backbone(load_meta_graph(model), tap="pool1")
    assert backbone.variable_names == ["conv1_1/weights", "conv1_1/biases"]


def test_tap_may_be_the_input(model, images):
    backbone = Backbone(load_meta_graph(model), tap="images", pooling=None)
    np.testing.assert_array_equal(backbone(images), images)


def test_unknown_tap_suggests_similar_names(model):
    with pytest.raises(ValueError, match="no tensor 'fc_7'; did you mean fc7"):
        Backbone(load_meta_graph(model), tap="fc_7")


def test_randomized_weights_have_he_variance(tmp_path):
    architecture = architectures.Architecture(((64, 64),), fc=256, image_size=16)
    backbone = Backbone(load_meta_graph(save_vgg(tmp_path / "m", architecture)))
    backbone.randomize(seed=1)
    values = {name: value.numpy() for name, value in backbone.values().items()}
    assert values["conv1_2/weights"].std() == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.05)
    assert not values["conv1_2/biases"].any()


def test_weights_outside_trainable_collection_are_trainable(tmp_path, images):
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.float32, [None, 16, 16, 3], name="x")
        kernel = tf1.get_variable("kernel", [3, 3, 3, 2], trainable=False)
        tf1.get_variable("new_head", [3])
        net = tf.nn.conv2d(x, kernel, 1, "SAME")
        statistics = [tf1.get_variable(name, [2]) for name in ("scale", "offset", "m", "v")]
        net, _, _ = tf1.nn.fused_batch_norm(net, *statistics, is_training=False)
        tf.identity(net, name="tap")
        shapes = {v.op.name: v.shape for v in tf1.global_variables()}
    save_meta_graph(graph, tmp_path / "m", {name: np.ones(s) for name, s in shapes.items()})
    backbone = Backbone(load_meta_graph(tmp_path / "m"), tap="tap")
    assert {v.name for v in backbone.trainable_variables} == {"kernel", "scale", "offset"}
    assert {v.name for v in backbone.non_trainable_variables} == {"m", "v"}


def test_integer_input_is_rounded_and_clipped(tmp_path):
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.uint8, [None, 2, 2, 3], name="x")
        tf.cast(x, tf.float32, name="tap")
        tf1.get_variable("w", [1])
    save_meta_graph(graph, tmp_path / "m", {"w": np.ones(1)})
    graph = load_meta_graph(tmp_path / "m")
    photos = np.full([1, 2, 2, 3], [-3.0, 0.6, 300.0], np.float32)
    assert Backbone(graph, tap="tap")(photos).numpy().tolist() == [[0, 1, 255]]
    with pytest.raises(ValueError, match="'caffe' does not fit, use none"):
        graph.preprocess("x:0", "caffe")


def test_mixed_precision_policy_has_no_effect(model, images):
    expected = Backbone(load_meta_graph(model))(images)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        prefix, suffix = Backbone(load_meta_graph(model)).split("pool1")
        np.testing.assert_array_equal(suffix(prefix(images)), expected)
        assert {layer.compute_dtype for layer in (prefix, suffix)} == {"float32"}
        with pytest.raises(ValueError, match="dtype='float16', but the graph computes in float32"):
            Backbone(load_meta_graph(model), dtype="float16")
    finally:
        keras.config.set_dtype_policy("float32")


def test_batch_norm_statistics_are_not_trainable(tmp_path):
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.float32, [None, 16, 16, 3], name="x")
        gamma = tf1.get_variable("gamma", [3])
        mean = tf1.get_variable("moving_mean", [3], trainable=False)
        tf.multiply(x - mean, gamma, name="tap")
    save_meta_graph(graph, tmp_path / "m", {"gamma": np.ones(3), "moving_mean": np.zeros(3)})
    backbone = Backbone(load_meta_graph(tmp_path / "m"), tap="tap")
    assert [v.name for v in backbone.trainable_variables] == ["gamma"]
    assert [v.name for v in backbone.non_trainable_variables] == ["moving_mean"]


def test_frozen_weights_are_frozen_in_a_loaded_model(model, tmp_path):
    backbone = Backbone(load_meta_graph(model))
    backbone.freeze("pool2")
    stock = keras.Sequential([keras.Input((16, 16, 3)), backbone, keras.layers.Dense(2)])
    stock.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    trained = [variable.shape for variable in stock.trainable_variables]
    assert [variable.shape for variable in loaded.trainable_variables] == trained
    assert len(trained) < len(stock.variables)


def test_graph_of_a_stranger_with_a_circle_is_refused(model):
    config = Backbone(load_meta_graph(model)).get_config()
    size = config["graph_sizes"][0]
    graph = tf.compat.v1.GraphDef.FromString(
        zlib.decompress(base64.b64decode(config["compressed_graphs"]))[:size]
    )
    first = next(node for node in graph.node if node.op == "Relu")
    graph.node.add(name="around", op="Identity", input=[first.name]).attr["T"].type = 1
    first.input[0] = "around"
    data = graph.SerializeToString()
    config |= {
        "graph_sizes": [len(data)],
        "compressed_graphs": base64.b64encode(zlib.compress(data)).decode(),
    }
    with pytest.raises(ValueError, match="cycle|circle|loop"):
        Backbone.from_config(config)


def test_backbone_works_as_keras_layer(model, images, tmp_path):
    model = keras.Sequential(
        [keras.Input((16, 16, 3)), Backbone(load_meta_graph(model)), keras.layers.Dense(2)]
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = [w.numpy() for w in model.weights]
    model.fit(images, np.array([0, 1, 0, 1, 0]), verbose=0)
    assert all((w.numpy() != b).any() for w, b in zip(model.weights, before, strict=True))

    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(images), model(images))
    model.export(tmp_path / "saved_model", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "saved_model"))
    np.testing.assert_allclose(
        served.serve(tf.constant(images)), model(images), rtol=1e-5, atol=1e-6
    )


def normalising(tmp_path):
    """Fused and unfused batch norm, with variables of arbitrary names."""
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        net = tf.nn.conv2d(x, tf1.get_variable("a", [3, 3, 3, 4]), 1, "SAME")
        fused = [tf1.get_variable(name, [4]) for name in ("b", "c", "d", "e")]
        net, _, _ = tf1.nn.fused_batch_norm(net, *fused, is_training=False)
        mean, variance, offset, scale = (tf1.get_variable(name, [4]) for name in "fghi")
        net = tf.nn.batch_normalization(net, mean, variance, offset, scale, 1e-3)
        net = tf.nn.relu(net) - tf1.get_variable("slope", [4]) * tf.nn.relu(-net)
        tf.reduce_mean(net, [1, 2], name="tap")
        shapes = {v.op.name: v.shape for v in tf1.global_variables()}
    save_meta_graph(graph, tmp_path / "bn", {n: np.full(s, 0.5) for n, s in shapes.items()})
    return load_meta_graph(tmp_path / "bn")


def test_from_config_initializes_he_normal_weights_and_unit_scales(tmp_path):
    backbone = Backbone(normalising(tmp_path), "tap")
    new = Backbone.from_config(backbone.get_config())
    other = Backbone(normalising(tmp_path), "tap")
    other.randomize(seed=0)
    for layer in (new, other):
        values = {name: value.numpy() for name, value in layer.values().items()}
        assert {name for name, value in values.items() if (value == 1).all()} == set("begi")
        assert {n for n, value in values.items() if (value == 0).all()} == {*"cdfh", "slope"}
        assert values["a"].std() == pytest.approx(np.sqrt(2 / 27), rel=0.3)


def clones(backbone):
    model = keras.Sequential([keras.Input((16, 16, 3)), backbone, keras.layers.Dense(2)])
    yield keras.models.clone_model(model)
    yield keras.Sequential.from_config(model.get_config())
    yield keras.models.model_from_json(model.to_json())


def test_clones_are_reinitialized_and_warn(tmp_path, images):
    architecture = architectures.Architecture(((32, 32), (64,)), fc=64, image_size=16)
    backbone = Backbone(load_meta_graph(save_vgg(tmp_path / "m", architecture)), name="vgg")
    for clone in clones(backbone):
        layer = clone.layers[0]
        for name, value in layer.values().items():
            fan_in = np.prod(value.shape[:-1])
            if name.endswith("weights"):
                expected = np.sqrt(2 / fan_in)  # keras.initializers.HeNormal
                assert np.std(value) == pytest.approx(expected, rel=0.15), name
            else:
                assert not np.any(value), name
            assert (value.numpy() != backbone.values()[name].numpy()).any(), name
        with pytest.warns(UserWarning, match="layer 'vgg' .* random, not pretrained.*set_weights"):
            clone(images)
        clone.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        before = [w.numpy() for w in clone.trainable_weights]
        clone.fit(images, np.array([0, 1, 0, 1, 0]), verbose=0)
        assert all((w != b).numpy().any() for w, b in zip(layer.weights, before, strict=False))


def test_clones_with_copied_weights_do_not_warn(model, images, recwarn):
    backbone = Backbone(load_meta_graph(model))
    for clone in clones(backbone):
        clone.layers[0].set_weights(backbone.get_weights())
        np.testing.assert_array_equal(clone.layers[0](images), backbone(images))
    assert not [w for w in recwarn if "pretrained" in str(w.message)]


@pytest.mark.slow
def test_scikit_learn_wrapper_trains_its_clone(model):
    """Keras clones the model without its weights; it still learns to separate bright from dark."""
    inner = [keras.layers.Reshape((16, 16, 3)), Backbone(load_meta_graph(model))]
    network = keras.Sequential(
        [keras.Input((768,)), *inner, keras.layers.Dense(2, activation="softmax")]
    )
    network.compile("adam", "categorical_crossentropy")
    labels = np.arange(40) % 2
    pixels = np.random.default_rng(0).random((40, 768), np.float32) * 0.3 + 0.7 * labels[:, None]
    wrapper = keras.wrappers.SKLearnClassifier(network)
    with pytest.warns(UserWarning, match="random, not pretrained"):
        wrapper.fit(pixels, labels, epochs=30, verbose=0)
    assert (wrapper.model_.predict(pixels, verbose=0).argmax(-1) == labels).mean() > 0.9


def test_copies_keep_the_weights(model, images, recwarn):
    backbone = Backbone(load_meta_graph(model))
    for copied in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        np.testing.assert_array_equal(copied(images), backbone(images))
        assert copied.graph_variables[0] is not backbone.graph_variables[0]
    assert not [w for w in recwarn if "pretrained" in str(w.message)]


def with_parts(backbone):
    prefix, suffix = backbone.split("pool2")
    inputs = keras.Input((16, 16, 3))
    return keras.Model(inputs, [backbone(inputs), prefix(inputs), suffix(prefix(inputs))])


def test_saved_model_keeps_shared_variables(model, images, tmp_path):
    built = with_parts(Backbone(load_meta_graph(model), "fc7"))
    built.save(tmp_path / "m.keras")
    loaded, other = (keras.models.load_model(tmp_path / "m.keras") for _ in range(2))
    assert len(loaded.weights) == len(built.weights) == 10
    for found, expected in zip(loaded(images), built(images), strict=True):
        np.testing.assert_array_equal(found, expected)
    for variable in loaded.layers[1].graph_variables:
        variable.assign(variable * 2)
    whole, _, parts = loaded(images)
    np.testing.assert_array_equal(whole, parts)
    assert (whole != built(images)[0]).numpy().any()
    np.testing.assert_array_equal(other(images)[0], built(images)[0])  # loaded separately


def test_loaded_frozen_layer_can_be_unfrozen(tmp_path):
    """Its statistics are the last weights, whether it is frozen or not."""
    backbone = Backbone(normalising(tmp_path), "tap")
    backbone.randomize(seed=0)
    for number, variable in enumerate(backbone.graph_variables[1:]):
        variable.assign(tf.fill(variable.shape, number + 1.0))
    backbone.trainable = False
    keras.Sequential([keras.Input((8, 8, 3)), backbone]).save(tmp_path / "m.keras")
    layer = keras.models.load_model(tmp_path / "m.keras").layers[0]
    assert not layer.trainable_variables
    for name, value in backbone.values().items():
        np.testing.assert_array_equal(layer.values()[name], value, err_msg=name)
    layer.trainable = True
    assert {v.name for v in layer.trainable_variables} == {*"abcfghi", "slope"}


def test_models_with_uncompressed_graphs_still_load(model, images):
    backbone = Backbone(load_meta_graph(model))
    config = backbone.get_config()
    for key in ("compressed_graphs", "graph_sizes", "shared", "to_load_it"):
        del config[key]
    config["dtype"] = keras.dtype_policies.get("mixed_float16")  # was written, but ignored
    graphs = [base64.b64encode(g.SerializeToString()) for g in backbone.network.graphs]
    loaded = Backbone.from_config({**config, "graph_defs": [g.decode() for g in graphs]})
    loaded.set_weights(backbone.get_weights())
    np.testing.assert_array_equal(loaded(images), backbone(images))
    assert loaded.compute_dtype == "float32"


@pytest.mark.parametrize("damage", [lambda g: g[:-8], lambda g: g[:4] + "AAAA" + g[8:]])
def test_config_with_damaged_graph_is_rejected(model, damage):
    config = Backbone(load_meta_graph(model)).get_config()
    config["compressed_graphs"] = damage(config["compressed_graphs"])
    with pytest.raises(ValueError, match="damaged"):
        Backbone.from_config(config)


def test_config_is_short_and_states_required_import():
    """Keras prints it where the package is not imported."""
    config = keras.saving.serialize_keras_object(Backbone(PRETRAINED))
    assert len(repr(config)) < 3500
    assert "import transfer before keras.models.load_model" in repr(config)


def test_max_pooling_takes_maximum_over_height_and_width(model, images):
    raw = Backbone(load_meta_graph(model), "pool2", pooling=None)(images)
    pooled = Backbone(load_meta_graph(model), "pool2", pooling="max")
    expected = keras.layers.GlobalMaxPooling2D()(raw)
    np.testing.assert_array_equal(pooled(images), expected)
    np.testing.assert_array_equal(Backbone.from_config(pooled.get_config()).pooling, "max")
    with pytest.raises(ValueError, match="pooling='sum' is not known; choose from: 'avg', 'max'"):
        Backbone(load_meta_graph(model), "pool2", pooling="sum")


def test_tap_defaults_to_that_of_the_card(tmp_path, images):
    path = save_vgg(tmp_path / "m", card=Card(tap="fc6:0"))
    expected = Backbone(load_meta_graph(path), "fc6")(images)
    for graph in (load_meta_graph(path), path, str(path), f"{path}.meta"):
        np.testing.assert_array_equal(Backbone(graph)(images), expected)
    assert Backbone(save_vgg(tmp_path / "other")).network.output == "fc7:0"
    with pytest.raises(TypeError, match="graph is of type int; expected"):
        Backbone(3)


def test_tf1_graph_is_rejected_with_alternative(model):
    backbone = Backbone(load_meta_graph(model))
    with tf.Graph().as_default():
        x = tf1.placeholder(tf.float32, [None, 16, 16, 3])
        for use in (lambda: Backbone(load_meta_graph(model)), lambda: backbone(x), lambda: Head(2)):
            with pytest.raises(RuntimeError, match=r"import_meta_graph .* build_head"):
                use()


@pytest.mark.slow
@pytest.mark.parametrize("convolutional", [False, True], ids=["dense", "conv"])
def test_full_size_vgg16_equals_plain_tensorflow_session(tmp_path, stock_session, convolutional):
    architecture = architectures.ARCHITECTURES["vgg16"]
    prefix = save_vgg(tmp_path / "vgg16", architecture, convolutional=convolutional)
    images = np.random.default_rng(0).random((2, 224, 224, 3), np.float32)
    expected = stock_session(prefix).run("fc7:0", {"images:0": images})
    features = Backbone(load_meta_graph(prefix))(images)
    assert features.shape == (2, 4096)
    assert_close(features, expected.reshape(2, 4096))


def test_third_party_meta_graphs_equal_plain_tensorflow_session(shared_wild, stock_session):
    """All that have weights: TF 0.10 to 1.14, V1 and V2, queues, devices, dropout."""
    cases = [c for c in json.loads((shared_wild / "cases.json").read_text()) if c["weights"]]
    assert cases
    for case in cases:
        graph = load_meta_graph(shared_wild / case["case"] / case["prefix"])
        shape = _some_shape(graph.node(case["input"]))
        images = np.random.default_rng(0).random(shape, np.float32)
        backbone = Backbone(
            graph, case["tap"], input=case["input"], feeds=case["feeds"], pooling=None
        )
        with tf.Graph().as_default(), tf1.Session() as session:
            meta = tf1.MetaGraphDef()
            meta.ParseFromString(graph.prefix.with_name(graph.prefix.name + ".meta").read_bytes())
            meta.collection_def.clear()  # one refers to a missing operation
            saver = tf1.train.import_meta_graph(meta, clear_devices=True)
            saver.restore(session, str(graph.prefix))
            expected = session.run(case["tap"], {case["input"]: images, **case["feeds"]})
        assert expected.shape[-1] == case["feature_width"], case["case"]
        assert_close(backbone(images), expected)


def _some_shape(node):
    from transfer.graph import static_shape

    return [dim or 4 for dim in static_shape(node)]


@pytest.mark.slow
def test_third_party_meta_graphs_can_be_trained(shared_wild):
    """Full fine-tuning with active dropout: every weight before the tap changes."""
    cases = [c for c in json.loads((shared_wild / "cases.json").read_text()) if c["weights"]]
    for case in cases:
        graph = load_meta_graph(shared_wild / case["case"])
        backbone = Backbone(graph, case["tap"])
        shape = backbone.network.input_shape
        images = np.random.default_rng(0).random([6, *shape[1:]], np.float32)
        model = keras.Sequential([backbone, keras.layers.Dense(2)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(1e-3), loss)
        model.build(images.shape)
        before = [v.numpy() for v in backbone.trainable_variables]
        history = model.fit(images, np.arange(6) % 2, epochs=3, batch_size=3, verbose=0)
        assert np.isfinite(history.history["loss"]).all(), case["case"]
        for variable, old in zip(backbone.trainable_variables, before, strict=True):
            assert (variable.numpy() != old).any(), f"{case['case']}: {variable.name}"


def test_digest_depends_on_graph_and_weights(tiny_vgg):
    graph = load_meta_graph(tiny_vgg)
    first, again = Backbone(graph), Backbone(graph)
    assert first.digest() == again.digest()
    assert first.split("pool1")[0].digest() != first.split("conv1_1/Relu")[0].digest()
    prefix, _ = again.split("pool1")
    before = prefix.digest()
    again.graph_variables[-1].assign_add(tf.ones(again.graph_variables[-1].shape))
    assert first.digest() != again.digest()
    assert prefix.digest() == before
    again.graph_variables[0].assign_add(tf.ones(again.graph_variables[0].shape))
    assert prefix.digest() != before


def test_freeze_leaves_the_weights_after_a_tensor_trainable(model):
    backbone = Backbone(load_meta_graph(model))
    backbone.freeze(until="pool1")
    frozen = {"conv1_1/weights", "conv1_1/biases"}
    trained = {
        name
        for name, variable in zip(backbone.variable_names, backbone.graph_variables, strict=True)
        if variable.trainable
    }
    assert trained == {*backbone.variable_names} - frozen
    assert len(backbone.trainable_variables) == len(trained)
    backbone.freeze(until="tap")
    assert not backbone.trainable_variables
    backbone.freeze(until="none")
    assert len(backbone.trainable_variables) == len(backbone.variable_names)


def test_blocks_are_the_weights_between_cuts(model):
    backbone = Backbone(load_meta_graph(model))
    shapes = {name: [tuple(v.shape)[-1] for v in vs] for name, vs in backbone.blocks().items()}
    assert shapes == {
        "pool1": [8, 8],
        "pool2": [8, 8, 16, 16],
        "fc6/Relu": [32, 32],
        "fc7": [32, 32],
    }
