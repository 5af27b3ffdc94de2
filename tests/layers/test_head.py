"""The head in other programs: in a TF1 graph, in a Keras model, with eager tensors."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from transfer import Backbone, Head, build_head, load_meta_graph

tf1 = tf.compat.v1
FEATURES = np.random.default_rng(0).random((6, 4096), np.float32)


def fc7_graph(shape=(None, 4096)):
    """As after ``import_meta_graph``: a graph with a tensor ``fc7:0``."""
    graph = tf.Graph()
    with graph.as_default():
        tf1.placeholder(tf.float32, shape, name="fc7")
    return graph, graph.get_tensor_by_name("fc7:0")


def test_tf1_graph_names_and_initial_values():
    graph, fc7 = fc7_graph()
    logits, probabilities = build_head(fc7, num_classes=2, return_probabilities=True)
    assert (logits.name, probabilities.name) == ("head/logits:0", "head/probabilities:0")
    with graph.as_default(), tf1.Session() as session:
        variables = tf1.trainable_variables()
        assert [v.op.name for v in variables] == ["head/weights", "head/biases"]
        session.run(tf1.global_variables_initializer())
        weights, biases = session.run(variables)
        found = session.run([logits, probabilities], {fc7: FEATURES})
    np.testing.assert_allclose(biases, 0.05)
    assert np.abs(weights).max() <= 0.1  # truncated at two standard deviations
    assert weights.std() == pytest.approx(0.05 * 0.8796, rel=0.05)  # of a normal cut at 2 sigma
    np.testing.assert_allclose(found[0], FEATURES @ weights + biases, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1].sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_stop_gradient_in_tf1_keras_and_eager(stop_gradient):
    graph, fc7 = fc7_graph()
    logits = build_head(fc7, 2, stop_gradient=stop_gradient)
    with graph.as_default():
        assert (tf1.gradients(logits, fc7)[0] is None) == stop_gradient

    features = tf.constant(FEATURES)
    with tf.GradientTape() as tape:
        tape.watch(features)
        logits = build_head(features, 2, stop_gradient=stop_gradient)
    assert (tape.gradient(logits, features) is None) == stop_gradient

    inputs = keras.Input([4096])
    model = keras.Model(inputs, build_head(inputs, 2, stop_gradient=stop_gradient))
    with tf.GradientTape() as tape:
        tape.watch(features)
        logits = model(features)
    assert (tape.gradient(logits, features) is None) == stop_gradient


def test_tf1_program_trains_and_saves_head(model, stock_session, images, tmp_path):
    """A complete TF1 program: import, tap fc7, stop gradient, new softmax, train, save."""
    stock = stock_session(model)
    with stock.graph.as_default(), stock.session as session:
        fc7 = stock.graph.get_tensor_by_name("fc7:0")
        logits = build_head(fc7, num_classes=2, stop_gradient=True, seed=0)
        loss = tf1.losses.sparse_softmax_cross_entropy(np.array([0, 1, 0, 1, 1]), logits)
        train = tf1.train.AdamOptimizer(0.05).minimize(loss)
        new = [v for v in tf1.global_variables() if not v.op.name.startswith(("conv", "fc"))]
        session.run(tf1.variables_initializer(new))
        frozen = session.run("conv1_1/weights:0")
        before = session.run(loss, {"images:0": images})
        for _ in range(30):
            session.run(train, {"images:0": images})
        assert session.run(loss, {"images:0": images}) < 0.7 * before
        np.testing.assert_array_equal(session.run("conv1_1/weights:0"), frozen)
        tf1.train.Saver().save(session, str(tmp_path / "tuned"))
        expected = session.run(logits, {"images:0": images})
    ours = Backbone(load_meta_graph(tmp_path / "tuned"), tap="head/logits")
    np.testing.assert_allclose(ours(images), expected, rtol=1e-4, atol=1e-5)


def test_tf1_head_has_hidden_layers_and_dropout():
    graph, fc7 = fc7_graph()
    logits = build_head(fc7, 3, hidden=(16, 8), dropout=0.5, seed=1)
    with graph.as_default(), tf1.Session() as session:
        names = {v.op.name: v.shape.as_list() for v in tf1.global_variables()}
        session.run(tf1.global_variables_initializer())
        same = [session.run(logits, {fc7: FEATURES}) for _ in range(2)]
        feeds = {fc7: FEATURES, "head/keep_prob:0": 0.5}
        different = [session.run(logits, feeds) for _ in range(2)]
    assert names["head/hidden_1/weights"] == [4096, 16]
    assert names["head/hidden_2/weights"] == [16, 8]
    assert names["head/weights"] == [8, 3]
    np.testing.assert_array_equal(*same)
    assert (different[0] != different[1]).any()


def test_tf1_second_head_gets_unique_name():
    _, fc7 = fc7_graph()
    assert build_head(fc7, 2).name == "head/logits:0"
    assert build_head(fc7, 5).name == "head_1/logits:0"


def test_names_in_custom_scope_and_of_two_heads_in_keras_model():
    graph, fc7 = fc7_graph()
    with graph.as_default(), tf1.variable_scope("mine"):
        names = [build_head(fc7, 2, name="my/head").name for _ in range(2)]
    assert names == ["mine/my/head/logits:0", "mine/my/head_1/logits:0"]
    inputs = keras.Input([4096])
    model = keras.Model(inputs, [build_head(inputs, 2), build_head(inputs, 3)])
    assert [output.shape for output in model.outputs] == [(None, 2), (None, 3)]


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_logits_are_float32_for_any_feature_dtype(dtype):
    features = tf.cast(FEATURES, dtype)
    assert build_head(features, 2).dtype == tf.float32
    with tf.Graph().as_default():
        assert build_head(tf1.placeholder(dtype, [None, 8]), 2).dtype == tf.float32


@pytest.mark.parametrize("shape", [(None, 4096), (None, 1, 1, 4096), (None, None, None, 4096)])
def test_width_of_logits_for_2d_and_4d_features(shape):
    _, fc7 = fc7_graph(shape)
    assert build_head(fc7, 7).shape.as_list() == [None, 7]
    assert build_head(keras.Input(shape[1:]), 7).shape == (None, 7)
    features = FEATURES if len(shape) == 2 else FEATURES[:, None, None, :]
    assert build_head(tf.constant(features), 7).shape == (6, 7)


def test_4d_features_are_averaged_over_space():
    features = np.random.default_rng(0).random((2, 3, 4, 8), np.float32)
    head = Head(5)
    np.testing.assert_allclose(head(features), head(features.mean((1, 2))), rtol=1e-5)


def test_keras_model_with_head_trains_and_saves(tmp_path):
    inputs = keras.Input([4096])
    logits, probabilities = build_head(inputs, 2, hidden=(8,), return_probabilities=True)
    np.testing.assert_allclose(
        keras.Model(inputs, probabilities)(FEATURES).numpy().sum(-1), 1, 1e-5
    )
    model = keras.Model(inputs, logits)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit(FEATURES, np.arange(6) % 2, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(
        keras.models.load_model(tmp_path / "m.keras")(FEATURES), model(FEATURES)
    )


def test_eager_head_trains_in_custom_loop():
    head = Head(2, stop_gradient=True, seed=0)
    labels = np.arange(6) % 2
    optimizer = keras.optimizers.Adam(0.01)
    losses = []
    for _ in range(10):
        with tf.GradientTape() as tape:
            logits = head(tf.constant(FEATURES), training=True)
            losses.append(
                tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
            )
        variables = [v.value for v in head.trainable_variables]
        optimizer.apply(tape.gradient(losses[-1], variables), head.trainable_variables)
    assert losses[-1] < losses[0] / 2


def test_head_equals_keras_dense_with_the_same_weights():
    head = Head(3)
    logits = head(FEATURES)
    dense = keras.layers.Dense(3)
    dense.build((None, 4096))
    dense.set_weights(head.get_weights())
    np.testing.assert_array_equal(logits, dense(FEATURES))


def test_seed_makes_head_reproducible_and_layers_differ():
    first, second = (build_head(tf.constant(FEATURES), 3, hidden=(3,), seed=5) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    head = Head(4096, hidden=(4096,), seed=5)
    head.build((None, 4096))
    hidden, classifier = head.values()["hidden_1/weights"], head.values()["weights"]
    assert abs(np.corrcoef(hidden.numpy()[0], classifier.numpy()[0])[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"num_classes": 2, "dropout": 1.0}, "dropout must be at least 0 and less than 1, got 1.0"),
        ({"num_classes": 2, "hidden": (0,)}, r"hidden widths must be at least 1, got \(0,\)"),
        ({"num_classes": 2, "weights_stddev": -1}, "weights_stddev must not be negative"),
    ],
)
def test_out_of_range_arguments_are_rejected(arguments, message):
    _, fc7 = fc7_graph()
    for features in (fc7, tf.constant(FEATURES), keras.Input([4096])):
        with pytest.raises(ValueError, match=message):
            build_head(features, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": None}, "num_classes is None of type NoneType; expected an integer"),
        ({"num_classes": True}, "num_classes is True of type bool; expected an integer"),
        ({"num_classes": 2.0}, "num_classes is 2.0 of type float; expected an integer"),
        ({"num_classes": "2"}, "num_classes is '2' of type str; expected an integer"),
        ({"num_classes": 2, "hidden": 64}, r"hidden is 64 of type int; .*e.g. \(64,\)"),
        ({"num_classes": 2, "hidden": "64"}, r"hidden is '64' of type str; expected a sequence"),
        ({"num_classes": 2, "dropout": None}, "dropout is None of type NoneType; expected a num"),
        ({"num_classes": 2, "bias": "0"}, "bias is '0' of type str; expected a number"),
        ({"num_classes": 2, "hidden": (6.5,)}, "a hidden width is 6.5 of type float"),
    ],
)
def test_arguments_of_wrong_type_are_rejected(arguments, message):
    _, fc7 = fc7_graph()
    for features in (fc7, tf.constant(FEATURES)):
        with pytest.raises(TypeError, match=message):
            build_head(features, **arguments)
    with pytest.raises(TypeError, match=message):
        Head(**arguments)


def test_numpy_integers_are_accepted(tmp_path):
    _, fc7 = fc7_graph()
    assert build_head(fc7, np.int64(3), hidden=np.array([4])).shape.as_list() == [None, 3]
    inputs = keras.Input([8])
    model = keras.Model(inputs, Head(np.int64(3), hidden=np.array([4, 5]))(inputs))
    model.save(tmp_path / "m.keras")
    x = FEATURES[:, :8]
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "m.keras")(x), model(x))


def test_logits_are_float32_under_a_mixed_precision_policy():
    expected = Head(2, hidden=(4,), seed=0)(FEATURES)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        head = Head(2, hidden=(4,), seed=0)
        np.testing.assert_array_equal(head(FEATURES), expected)
    finally:
        keras.config.set_dtype_policy("float32")
    assert (head.compute_dtype, head(FEATURES).dtype) == ("float32", tf.float32)
    with pytest.raises(ValueError, match="dtype='float16', but a head computes in float32"):
        Head(2, dtype="float16")


@pytest.mark.parametrize("shape", [(None, 3, 4096), (None, None), None])
def test_features_of_wrong_rank_or_unknown_width_are_rejected(shape):
    _, fc7 = fc7_graph(shape)
    with pytest.raises(ValueError, match=r"features have shape .*; expected \[batch, width\] or"):
        build_head(fc7, 2)


SEVERAL = {
    "maps": np.random.default_rng(1).random((6, 3, 5, 4), np.float32),
    "a_vector": np.random.default_rng(2).random((6, 7), np.float32),
}


def test_features_of_several_taps_are_pooled_and_concatenated():
    vector = np.concatenate([SEVERAL["maps"].mean((1, 2)), SEVERAL["a_vector"]], 1)
    head = Head(num_classes=3, seed=1)
    found = head({name: tf.constant(value) for name, value in SEVERAL.items()})
    kernel, bias = head.classifier.kernel, head.classifier.bias
    np.testing.assert_allclose(found, vector @ kernel + bias, rtol=1e-5)
    swapped = {name: tf.constant(SEVERAL[name]) for name in ("a_vector", "maps")}
    np.testing.assert_array_equal(head(swapped), found)
    with pytest.raises(ValueError, match="of a_vector; this head was built for those of maps, a_v"):
        head({"a_vector": tf.constant(SEVERAL["a_vector"])})


def test_features_of_several_taps_in_tf1_keras_and_eager():
    graph = tf.Graph()
    with graph.as_default():
        inputs = {n: tf1.placeholder(tf.float32, [None, *v.shape[1:]]) for n, v in SEVERAL.items()}
    logits = build_head(inputs, num_classes=2)
    with graph.as_default(), tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        weights, biases = session.run(tf1.trainable_variables())
        found = session.run(logits, {inputs[name]: value for name, value in SEVERAL.items()})
    vector = np.concatenate([SEVERAL["maps"].mean((1, 2)), SEVERAL["a_vector"]], 1)
    np.testing.assert_allclose(found, vector @ weights + biases, rtol=1e-5)
    symbolic = {name: keras.Input(value.shape[1:]) for name, value in SEVERAL.items()}
    assert build_head(symbolic, num_classes=2).shape == (None, 2)
    assert build_head(SEVERAL, num_classes=2).shape == (6, 2)


def test_order_of_taps_survives_saving(tmp_path):
    symbolic = {name: keras.Input(value.shape[1:], name=name) for name, value in SEVERAL.items()}
    model = keras.Model(symbolic, Head(2, name="head")(symbolic))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.get_layer("head").taps == ("maps", "a_vector")
    np.testing.assert_array_equal(loaded(SEVERAL), model(SEVERAL))


def test_tap_with_wrong_rank_is_named():
    with pytest.raises(ValueError, match="tap 'b': features have shape"):
        build_head({"a": tf.ones([2, 3]), "b": tf.ones([2, 3, 4])}, num_classes=2)
