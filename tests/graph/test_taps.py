"""Short names of tensors, and ranking of taps."""

import json

import numpy as np
import pytest
import tensorflow as tf
from conftest import graph_def_of

from transfer import Backbone, load_meta_graph, save_meta_graph
from transfer.graph import VARIABLES, taps
from transfer.graph import variable as graph_variable
from transfer.models.checkpoint import Checkpoint

tf1 = tf.compat.v1


def dense(x, width, *, relu=True):
    """With the names of tf.layers and slim."""
    weights = tf1.get_variable("weights", [x.shape[-1], width], use_resource=False)
    biases = tf1.get_variable("biases", [width], use_resource=False)
    x = tf.nn.bias_add(tf.matmul(x, weights), biases, name="BiasAdd")
    return tf.nn.relu(x, name="Relu") if relu else x


def slim(scope="vgg_16", reuse=None, x=None):
    """A network with the names of slim's VGG."""
    if x is None:
        x = tf1.placeholder(tf.float32, [None, 8, 8, 3], name="images")
    with tf1.variable_scope(scope, reuse=reuse):
        for number in (1, 4):
            with tf1.variable_scope(f"conv{number}"):
                kernel = tf1.get_variable("weights", [3, 3, x.shape[-1], 4], use_resource=False)
                x = tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME", name="Conv2D"), name="Relu")
            with tf1.variable_scope(f"pool{number}"):
                x = tf.nn.max_pool2d(x, 2, 2, "SAME", name="MaxPool")
        x = tf.reshape(x, [-1, 16])
        for name in ("fc6", "fc7"):
            with tf1.variable_scope(name):
                x = dense(x, 5)
        with tf1.variable_scope("fc8"):
            x = dense(x, 3, relu=False)
    return tf.nn.softmax(x, name=f"{scope}_prob")


def find(build, name):
    return taps.find(graph_def_of(build).node, name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vgg_16/fc7/Relu", "vgg_16/fc7/Relu:0"),
        ("vgg_16/fc7/Relu:0", "vgg_16/fc7/Relu:0"),
        ("vgg_16/fc7", "vgg_16/fc7/Relu:0"),
        ("fc7/Relu", "vgg_16/fc7/Relu:0"),
        ("fc7", "vgg_16/fc7/Relu:0"),
        ("fc7:0", "vgg_16/fc7/Relu:0"),
        ("fc8", "vgg_16/fc8/BiasAdd:0"),
        ("pool4", "vgg_16/pool4/MaxPool:0"),
        ("images", "images:0"),
        ("vgg_16_prob", "vgg_16_prob:0"),
    ],
)
def test_short_name_is_output_of_scope(name, expected):
    assert find(slim, name) == [expected]


def test_short_name_repeated_within_its_scope():
    """As built by tf.layers.dense(name="fc7") with an activation of the same name."""

    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        with tf1.variable_scope("fc7"):
            h = tf.nn.relu(dense(x, 5, relu=False), name="fc7")
        tf.nn.softmax(h)

    assert find(build, "fc7") == ["fc7/fc7:0"]


def test_operation_name_takes_precedence_over_scope():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        with tf1.variable_scope("fc7"):
            h = dense(x, 5)
        tf.nn.softmax(tf.identity(h, name="fc7/"))

    assert find(build, "fc7") == ["fc7:0"]


def test_short_name_matches_reopened_scope():
    """TensorFlow numbers the scope of the operations, but not that of the variables."""

    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        with tf1.variable_scope("fc7"):
            tf1.get_variable("weights", [4, 5])
        with tf1.variable_scope("fc7", reuse=True):
            h = tf.nn.relu(tf.matmul(x, tf1.get_variable("weights", [4, 5])), name="Relu")
        tf.nn.softmax(h)

    assert find(build, "fc7") == ["fc7_1/Relu:0"]


def test_two_copies_of_a_network_are_both_found():
    def build():
        x = tf1.placeholder(tf.float32, [None, 8, 8, 3], name="images")
        slim("vgg_16", x=x)
        slim("vgg_19", x=x)

    assert find(build, "fc7") == ["vgg_16/fc7/Relu:0", "vgg_19/fc7/Relu:0"]
    assert find(build, "vgg_19/fc7") == ["vgg_19/fc7/Relu:0"]


def test_partial_path_component_does_not_match():
    assert find(slim, "fc") == find(slim, "c7") == find(slim, "gg_16/fc7") == []


def test_gradients_savers_and_summaries_do_not_match():
    def build():
        prob = slim()
        loss = -tf.reduce_mean(tf.math.log(prob))
        tf1.train.GradientDescentOptimizer(0.1).minimize(loss)
        tf1.summary.histogram("activations/fc7", prob)
        tf1.train.Saver()

    assert find(build, "fc7") == ["vgg_16/fc7/Relu:0"]
    assert find(build, "conv4") == ["vgg_16/conv4/Relu:0"]


def test_input_of_dropout_is_output_of_layer():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        with tf1.variable_scope("fc7"):
            h = dense(x, 5)
        with tf1.variable_scope("dropout7"):
            h = tf1.nn.dropout(h, rate=tf1.placeholder(tf.float32))
        with tf1.variable_scope("fc8"):
            dense(h, 3, relu=False)

    assert find(build, "fc7") == ["fc7/Relu:0"]
    (dropout,) = find(build, "dropout7")
    assert dropout.startswith("dropout7/")


@pytest.fixture
def slim_model(tmp_path):
    graph = tf.Graph()
    with graph.as_default():
        slim()
        shapes = {v.op.name: v.shape for v in tf1.global_variables()}
    generator = np.random.default_rng(0)
    values = {name: generator.standard_normal(shape) for name, shape in shapes.items()}
    save_meta_graph(graph, tmp_path / "m", values)
    return load_meta_graph(tmp_path / "m")


def test_a_backbone_takes_short_names(slim_model):
    x = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    short, full = (Backbone(slim_model, tap=name) for name in ("fc7", "vgg_16/fc7/Relu:0"))
    np.testing.assert_array_equal(short(x), full(x))


@pytest.mark.parametrize("at", ["pool4", "vgg_16/pool4", "conv1", "fc6", "images"])
def test_split_takes_short_names(slim_model, at):
    backbone = Backbone(slim_model, tap="fc7")
    x = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    prefix, suffix = backbone.split(at=at)
    np.testing.assert_array_equal(suffix(prefix(x)), backbone(x))


def test_unknown_name_suggests_similar_names(slim_model):
    with pytest.raises(ValueError, match="no tensor 'vgg_16/fc77/Relu'; did you mean vgg_16/fc7/"):
        slim_model.tensor("vgg_16/fc77/Relu")


def test_ambiguous_copies_are_listed(tmp_path):
    def build():
        x = tf1.placeholder(tf.float32, [None, 8, 8, 3], name="images")
        slim("one", x=x)
        slim("two", x=x)

    graph = tf.Graph()
    with graph.as_default():
        build()
        tf1.train.export_meta_graph(str(tmp_path / "m.meta"))
    with pytest.raises(
        ValueError, match="several tensors 'fc7': one/fc7/Relu:0, two/fc7/Relu:0; name the one"
    ):
        load_meta_graph(tmp_path / "m").tensor("fc7")


def rank(build, covered=lambda names: True, **options):
    return taps.rank(graph_def_of(build).node, covered, **options)


def test_best_tap_is_input_of_last_layer():
    first, second, *_ = rank(slim)
    assert first.tensor == "vgg_16/fc7/Relu:0"
    assert first.shape == (None, 5)
    assert "'vgg_16/fc8/MatMul', the last layer" in first.why
    assert second.tensor == "vgg_16/fc6/Relu:0"


def test_input_ranks_last():
    assert rank(slim)[-1].tensor == "images:0"
    assert "the input itself" in rank(slim)[-1].why


def test_taps_covered_by_checkpoint_rank_first():
    def build():
        x = tf1.placeholder(tf.float32, [None, 8, 8, 3], name="images")
        slim("one", x=x)
        slim("two", x=x)

    best, *_ = rank(build, lambda names: all(name.startswith("one/") for name in names))
    assert best.tensor == "one/fc7/Relu:0"


def test_taps_leading_to_outputs_rank_first():
    def build():
        prob = slim()
        h = prob.graph.get_tensor_by_name("vgg_16/fc6/Relu:0")
        with tf1.variable_scope("aside"):
            h = dense(h, 7)
        with tf1.variable_scope("aside2"):
            dense(h, 7)

    assert rank(build)[0].tensor == "vgg_16/fc7/Relu:0"


def test_training_copy_ranks_after_inference_copy():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        for scope, rate in (("eval", 0.0), ("train", 0.5)):
            with tf1.variable_scope("net", reuse=tf1.AUTO_REUSE), tf1.name_scope(f"{scope}/"):
                h = tf.nn.relu(tf.matmul(x, tf1.get_variable("w", [4, 5])), name="h")
                h = tf1.nn.dropout(h, rate=rate) if rate else h
                h = tf.identity(h, name="tap")
                tf.nn.softmax(tf.matmul(h, tf1.get_variable("v", [5, 3])))

    assert rank(build)[0].tensor == "eval/tap:0"


def test_number_of_taps_is_limited():
    assert len(rank(slim, limit=2)) == 2


def test_a_graph_without_layers_has_no_taps():
    assert rank(lambda: tf.exp(tf1.placeholder(tf.float32, name="x"))) == []


@pytest.mark.slow
def test_best_taps_of_third_party_meta_graphs(shared_wild):
    cases = json.loads((shared_wild / "cases.json").read_text())
    wrong = []
    for case in cases:
        if case["case"] == "seq2seq_while":
            continue
        graph = load_meta_graph(shared_wild / case["case"] / case["prefix"])
        nodes = list(graph.nodes.values())
        covered = covered_by(graph)
        best = taps.rank(nodes, lambda names, c=covered: set(names) <= c, graph.outputs)[0].tensor
        input = graph.find_input(best)
        if (best, input) != (case["tap"], case["input"]):
            wrong.append((case["case"], best, case["tap"], input, case["input"]))
    assert wrong == []


def covered_by(graph):
    """The variables in the checkpoint's index; all if there is no index."""
    variables = [graph_variable(n) for n in graph.nodes.values() if n.op in VARIABLES]
    try:
        source = Checkpoint(graph.checkpoint_prefix or graph.prefix, index_only=True)
    except (OSError, ValueError):
        return {variable.name for variable in variables}
    matched, _, _ = source.compare(variables, graph.entries(source))
    return set(matched)
