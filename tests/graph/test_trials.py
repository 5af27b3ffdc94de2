"""Graphs with hidden shapes are guarded and tried in a child process, without crashing this one."""

import os
import signal

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef

from transfer.graph import extract, free_batch, infer, trials
from transfer.layers.graph_layer import GraphLayer

tf1 = tf.compat.v1
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


def hide(x, values):
    """An int32 constant that is unknown to shape inference."""
    return tf.constant(values) + tf.cast(tf.minimum(tf.reduce_sum(tf.abs(x)), 0.0), tf.int32)


def of_hidden_rank(x, tensor, shape):
    sizes = tf.constant([*shape, 1])
    return tf.reshape(tensor, tf.slice(sizes, [0], hide(x, [len(shape)])))


def layer_of(build, shape=(None, 8, 8, 3)):
    """The layer of ``images + sum(build(images))``."""
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.float32, shape, name="images")
        tf.add(x, tf.reduce_sum(build(x)), name="tap")
    network = extract(graph.as_graph_def(), "tap", "images", tf.float32, input_shape=shape)
    network = free_batch(network)
    constants = {node.name: node for node in graph.as_graph_def().node if node.op == "Const"}
    values = {
        variable.name: tf.constant(tf.make_ndarray(constants[variable.name].attr["value"].tensor))
        for variable in network.variables
    }
    return GraphLayer(network, values)


@pytest.fixture
def children(monkeypatch):
    """Records the calls tried in a child process, which always succeeds."""
    tried = []
    monkeypatch.setattr(trials, "_tried", {})
    monkeypatch.setattr(trials, "run_child", lambda call: tried.append(call) or "")
    return tried


raw = tf.raw_ops
POOL = {"strides": [1, 1, 1, 1], "padding": "VALID"}
CRASHING = {
    "rank of a convolution": lambda x: raw.Conv2D(
        input=of_hidden_rank(x, x, [384]), filter=tf.ones([1, 1, 3, 3]), **POOL
    ),
    "rank of a kernel": lambda x: raw.Conv2D(
        input=x, filter=of_hidden_rank(x, tf.ones([9]), [3, 3]), **POOL
    ),
    "rank of volumes": lambda x: raw.MaxPool3D(
        input=of_hidden_rank(x, tf.ones([16]), [1, 8, 1, 2]),
        ksize=[1, 2, 2, 1, 1],
        strides=[1, 3, 3, 3, 1],
        padding="SAME",
    ),
    "window larger than the image": lambda x: raw.MaxPool(
        input=tf.reshape(x, hide(x, [-1, 8, 1, 3])), ksize=[1, 1, 3, 1], **POOL
    ),
    "an image without pixels": lambda x: raw.AvgPool(
        value=tf.reshape(tf.zeros([0]), hide(x, [1, 0, 4, 3])), ksize=[1, 1, 1, 1], **POOL
    ),
}


@pytest.mark.parametrize("case", CRASHING)
def test_invalid_hidden_shapes_raise(case, children):
    layer = layer_of(CRASHING[case])
    with pytest.raises(tf.errors.InvalidArgumentError, match="guard_"):
        layer(IMAGES)
    assert len(children) == 1


def test_valid_hidden_shapes_keep_values_and_gradients(children):
    def pooled(hidden):
        def build(x):
            x = of_hidden_rank(x, x, [2, 8, 8, 3]) if hidden else x
            return raw.MaxPool(input=x, ksize=[1, 3, 3, 1], **POOL)

        layer, images = layer_of(build), tf.constant(IMAGES)
        with tf.GradientTape() as tape:
            tape.watch(images)
            output = layer(images)
        return output, tape.gradient(output, images)

    for ours, plain in zip(pooled(True), pooled(False), strict=True):
        np.testing.assert_array_equal(ours, plain)
    assert len(children) == 1


def test_known_shapes_need_no_child_and_no_guards(children):
    kernel = np.ones([3, 3, 3, 4], np.float32)
    layer = layer_of(lambda x: tf.nn.max_pool2d(tf.nn.conv2d(x, kernel, 1, "SAME"), 2, 2, "SAME"))
    layer(IMAGES)
    layer(IMAGES[:1], training=True)
    spec = tf.TensorSpec([None, 8, 8, 3])
    assert trials.checked_graph(layer.network, spec, [tf.TensorSpec([3, 3, 3, 4])]) is (
        layer.network.graph_def
    )
    assert children == []


def test_images_of_any_size_are_guarded_without_a_child(children):
    """A window may be larger than the image, whose size is the only unknown."""
    any_size = (None, None, None, 3)
    layer = layer_of(lambda x: tf.nn.max_pool2d(x, 5, 1, "VALID"), any_size)
    call = tf.function(layer, input_signature=[tf.TensorSpec(any_size)])
    np.testing.assert_allclose(call(IMAGES), layer(IMAGES))
    with pytest.raises(tf.errors.InvalidArgumentError, match="guard_"):
        call(IMAGES[:, :4])
    assert children == []


@pytest.mark.parametrize("hidden", [False, True])
def test_tensors_that_exhaust_memory_together_are_rejected(hidden, children):
    def build(x):
        size = hide(x, [2**26]) if hidden else [2**26]
        fills = [tf.fill(size, tf.reduce_sum(x) + i) for i in range(5)]
        return tf.add_n([tf.reduce_sum(fill) for fill in fills])

    if hidden:  # only the child can tell
        trials.checked_graph(layer_of(build).network, tf.TensorSpec([2, 8, 8, 3]), [])
        assert len(children) == 1
        return
    with pytest.raises(ValueError, match=r"[\d,]+ elements together, more than 268,435,456"):
        infer(layer_of(build).network)


def network_of_known_crash(monkeypatch):
    """A graph that crashes its process, without guards."""
    monkeypatch.setattr(trials, "_tried", {})
    monkeypatch.setattr(trials, "with_guards", lambda graph_def, shapes: graph_def)
    return layer_of(CRASHING["rank of a convolution"])


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "1", reason="crashes oneDNN")
def test_crash_of_child_is_error_with_its_signal(monkeypatch, tmp_path):
    (tmp_path / "transfer.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    layer = network_of_known_crash(monkeypatch)
    for _ in range(2):  # the second time without a child
        with pytest.raises(ValueError, match=r"died with SIGABRT \(.*Check failed.*'call|Conv2D"):
            layer(IMAGES)
        monkeypatch.setattr(trials, "run_child", lambda call: pytest.fail("tried again"))


def test_signals_and_timeouts_are_distinguished(monkeypatch):
    call = trials.Call(GraphDef(), ("x:0",), (), (), ())
    programs = {
        "died with SIGSEGV": f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})",
        "took over 15 s": "import sys; sys.stderr.write('Timeout (0:00:15)!'); sys.exit(1)",
        "failed (MemoryError)": "import sys; sys.exit('MemoryError')",
        "": "pass",
    }
    for expected, program in programs.items():
        monkeypatch.setattr(trials, "_SCRIPT", program)
        assert trials.run_child(call) == expected
