"""Fixed batch sizes are removed where that is exact, otherwise batches are padded."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from stock import Program, assert_close, images

from transfer import Backbone, load_meta_graph, save_meta_graph
from transfer.graph import extract, free_batch, infer, shapes

tf1 = tf.compat.v1
BATCH = 7


def old_dropout(x, keep_prob):
    shape = [int(size) for size in x.shape]
    return x / keep_prob * tf.floor(keep_prob + tf1.random_uniform(shape))


def with_reshapes():
    x = tf1.placeholder(tf.float32, [BATCH, 4, 4, 2], name="x")
    h = tf.nn.relu(tf.nn.conv2d(x, tf1.get_variable("kernel", [3, 3, 2, 3]), 1, "SAME"))
    h = tf.reshape(h, [BATCH, -1])
    h = tf.matmul(h, tf1.get_variable("w", [48, 12]))
    h = tf.reshape(h, [BATCH, 2, 2, 3])
    tf.nn.max_pool2d(h, 2, 1, "SAME", name="tap")


def test_fixed_batch_size_in_reshapes_is_removed():
    program = Program(with_reshapes)
    network = free_batch(program.network())
    assert network.batch_size is None
    x = images(BATCH, 4, 4, 2)
    expected = program.run(x)
    layer = program.layer(network)
    for count in (1, 3, BATCH):
        assert_close(layer(x[:count]), expected[:count])
    assert_close(layer(np.concatenate([x, x])), np.concatenate([expected, expected]))


def test_gradients_without_fixed_batch_equal_those_of_program():
    program = Program(with_reshapes)
    network = free_batch(program.network())
    layer, x = program.layer(network), tf.constant(images(BATCH, 4, 4, 2))
    with tf.GradientTape() as tape:
        tape.watch(x)
        found = layer(x)
    weights = [v.value for v in layer.graph_variables]
    upstream = images(*found.shape, seed=1)
    ours = tape.gradient(found, [x, *weights], upstream)
    for our, their in zip(ours, program.gradients(network, x.numpy(), {}, upstream), strict=True):
        assert_close(our, their)


def test_fixed_batch_size_of_placeholder_is_removed():
    def build():
        x = tf1.placeholder(tf.float32, [BATCH, 4], name="x")
        tf.matmul(x, tf1.get_variable("w", [4, 3]), name="tap")

    program = Program(build)
    network = free_batch(program.network())
    assert network.batch_size is None
    x = images(BATCH, 4)
    assert_close(program.layer(network)(x[:2]), program.run(x)[:2])


def test_batch_size_fixed_only_in_reshape_is_removed():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4, 4], name="x")
        h = tf.reshape(x, [BATCH, 16])
        tf.matmul(h, tf1.get_variable("w", [16, 3]), name="tap")

    program = Program(build)
    x = images(BATCH, 4, 4)
    assert_close(program.layer()(x), program.run(x))
    assert_close(program.layer()(x[:2]), program.run(x)[:2])


def test_fixed_batch_size_of_dropout_masks_is_removed():
    def build():
        x = tf1.placeholder(tf.float32, [BATCH, 50], name="x")
        tf.identity(old_dropout(tf.exp(x), tf1.placeholder(tf.float32, name="p")), name="tap")

    layer = Program(build).layer()
    assert layer.network.batch_size is None
    x = np.zeros([30, 50], np.float32)
    np.testing.assert_array_equal(layer(x), np.ones_like(x))
    dropped = layer(x, training=True).numpy()
    assert set(np.unique(dropped)) == {0.0, 2.0}
    assert np.mean(dropped == 0.0) == pytest.approx(0.5, abs=0.05)
    assert not (dropped[:BATCH] == dropped[BATCH : 2 * BATCH]).all()


def test_positions_that_share_a_dropout_mask_still_do():
    def build():
        x = tf1.placeholder(tf.float32, [BATCH, 3, 50], name="x")
        keep = tf1.placeholder(tf.float32, name="p")
        dropped = tf1.nn.dropout(tf.exp(x), keep_prob=keep, noise_shape=[BATCH, 1, 50])
        tf.reshape(dropped, [BATCH, 150], name="tap")

    layer = Program(build).layer()
    assert layer.network.batch_size is None
    dropped = layer(np.zeros([30, 3, 50], np.float32), training=True).numpy().reshape(30, 3, 50)
    assert (dropped == dropped[:, :1]).all()
    assert set(np.unique(dropped)) == {0.0, 2.0}


def test_mean_over_batch_is_unchanged():
    def build():
        x = tf1.placeholder(tf.float32, [BATCH, 4], name="x")
        tf.reduce_mean(tf.reshape(x, [BATCH, 2, 2]), name="tap")

    program = Program(build)
    network = free_batch(program.network())
    assert network.batch_size is None
    x = images(BATCH, 4)
    assert_close(program.layer(network)(x), program.run(x))


def test_network_without_fixed_batch_is_unchanged():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        tf.reshape(tf.matmul(x, tf1.get_variable("w", [4, 6])), [-1, 2, 3], name="tap")

    network = Program(build).network()
    assert free_batch(network) is network


def test_free_batch_does_not_modify_network():
    network = Program(with_reshapes).network()
    before = network.graph_def.SerializeToString(deterministic=True)
    assert free_batch(network) is not network
    assert network.graph_def.SerializeToString(deterministic=True) == before


def with_added_constant():
    x = tf1.placeholder(tf.float32, [BATCH, 4], name="x")
    h = tf.matmul(x, tf1.get_variable("w", [4, 3]))
    places = tf.reshape(tf.range(BATCH * 3, dtype=tf.float32), [BATCH, 3])
    tf.tanh(h + 0.01 * places, name="tap")


def test_required_batch_size_is_recorded():
    assert free_batch(Program(with_added_constant).network()).batch_size == BATCH


def test_inferred_shapes_equal_those_of_tensorflow():
    def build():
        x = tf1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        h = tf.nn.conv2d(x, tf1.get_variable("kernel", [3, 3, 3, 5]), 2, "SAME", name="conv")
        tf.reshape(h, [-1, 80], name="tap")

    program = Program(build)
    found = infer(program.network())
    for name in ("x:0", "conv:0", "tap:0"):
        assert list(found[name]) == program.graph.get_tensor_by_name(name).shape.as_list()
    assert found["kernel:0"] == (3, 3, 3, 5)


def test_graph_with_huge_tensors_is_rejected():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        tf.add(x[0, 0], tf.fill([2**20, 2**20], 1.0), name="tap")

    with pytest.raises(ValueError, match="would have 1,099,511,627,776 elements, more than"):
        infer(Program(build).network())


def test_invalid_shapes_are_rejected():
    def build():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        tf.matmul(x, tf1.get_variable("w", [4, 3]), name="tap")

    graph_def = Program(build).graph_def
    node = next(n for n in graph_def.node if n.name == "w")
    node.attr["shape"].shape.dim[0].size = 5
    network = extract(graph_def, "tap", "x", tf.float32, input_shape=(None, 4))
    with pytest.raises(ValueError, match="the graph is damaged: "):
        free_batch(network)


def test_unknown_shape_is_none():
    def build():
        x = tf1.placeholder(tf.float32, name="x")
        tf.nn.relu(x, name="tap")

    network = Program(build).network()
    assert shapes.infer(network)["tap:0"] is None
    assert free_batch(network) is network


@pytest.mark.parametrize("count", [1, BATCH, 10])
def test_incomplete_batches_are_padded(count):
    program = Program(with_added_constant)
    layer = program.layer()
    x = images(count, 4)
    filled = np.resize(x, [-(-count // BATCH) * BATCH, 4])
    expected = np.concatenate(
        [program.run(batch) for batch in np.split(filled, len(filled) // BATCH)]
    )
    assert_close(layer(x), expected[:count])


@pytest.mark.parametrize("count", [1, BATCH, 10])
def test_gradients_of_padded_batches(count):
    program = Program(with_added_constant)
    layer = program.layer()
    x = tf.constant(images(count, 4))
    (w,) = layer.graph_variables
    with tf.GradientTape() as tape:
        tape.watch(x)
        found = layer(x)
    upstream = images(count, 3, seed=1)
    ours = tape.gradient(found, [x, w.value], upstream)
    expected = [np.zeros([count, 4], np.float32), np.zeros([4, 3], np.float32)]
    for start in range(0, count, BATCH):
        rows = slice(start, min(start + BATCH, count))
        batch = np.zeros([BATCH, 4], np.float32)
        batch[: rows.stop - start] = x[rows]
        weight = np.zeros([BATCH, 3], np.float32)
        weight[: rows.stop - start] = upstream[rows]
        of_x, of_w = program.gradients(layer.network, batch, {}, weight)
        expected[0][rows] = of_x[: rows.stop - start]
        expected[1] += of_w
    for name, our, their in zip(("x", "w"), ours, expected, strict=True):
        assert_close(our, their, name)


def test_backbone_with_batch_size_round_trips(tmp_path):
    graph = tf.Graph()
    with graph.as_default():
        with_added_constant()
    save_meta_graph(graph, tmp_path / "m", {"w": images(4, 3)})
    backbone = Backbone(load_meta_graph(tmp_path / "m"), tap="tap")
    model = keras.Sequential([keras.Input((4,)), backbone, keras.layers.Dense(2)])
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    x = images(10, 4)
    np.testing.assert_array_equal(loaded(x), model(x))
    assert loaded.layers[0].network.batch_size == BATCH


def test_empty_batch_gives_empty_features():
    assert Program(with_added_constant).layer()(np.zeros([0, 4], np.float32)).shape == (0, 3)
