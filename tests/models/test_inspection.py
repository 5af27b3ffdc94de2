"""Inspection of models compared with known facts."""

import json

import numpy as np
import pytest
import strangers
import tensorflow as tf
from commands import flags_of, planned
from conftest import NUM_CLASSES, TINY, save_vgg

from transfer import Card, load_meta_graph, save_meta_graph
from transfer.graph import infer
from transfer.models.inspection import inspect
from transfer.models.plan import plan
from transfer.vgg import architectures

tf1 = tf.compat.v1


def test_inspection_of_vgg(model):
    found = inspect(load_meta_graph(model))
    assert (found.format, found.tensorflow_version) == ("meta graph", tf.__version__)
    assert (found.inputs[0].name, found.inputs[0].shape) == ("images:0", (None, 16, 16, 3))
    assert (found.taps[0].name, found.taps[0].shape) == ("fc7_dropout/SelectV2:0", (None, TINY.fc))
    parameters = architectures.num_parameters(TINY, NUM_CLASSES)
    assert (found.variables.parameters, found.variables.count) == (parameters, 12)
    assert found.checkpoint.matched == 12
    assert (found.checkpoint.missing, found.checkpoint.extra) == ([], [])
    assert [(feed.tensor, feed.kind, feed.inference) for feed in found.feeds] == [
        ("keep_prob:0", "keep_prob", 1.0)
    ]
    assert found.hazards == []


def test_inspection_works_without_weights(own_model):
    for path in own_model.parent.glob("tiny.data*"):
        path.unlink()
    found = inspect(load_meta_graph(own_model))
    assert found.checkpoint.matched == 12
    assert "lacks its data: tiny.data-00000-of-00001" in found.hazards[0]
    own_model.with_name("tiny.index").unlink()
    found = inspect(load_meta_graph(own_model))
    assert "no checkpoint" in found.checkpoint.problem
    assert found.taps[0].shape == (None, TINY.fc)


def test_variables_missing_in_checkpoint_are_listed(tmp_path):
    graph = architectures.build_graph(TINY, NUM_CLASSES)
    values = architectures.random_weights(TINY, NUM_CLASSES)
    save_meta_graph(graph, tmp_path / "whole", values)
    with tf.Graph().as_default(), tf1.Session() as session:
        for name in values:
            if name != "conv1_1/biases":
                tf1.get_variable(name, initializer=values[name])
        tf1.get_variable("step", initializer=np.float32(1))
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver().save(session, str(tmp_path / "whole"), write_meta_graph=False)
    found = inspect(load_meta_graph(tmp_path / "whole"))
    assert found.checkpoint.matched == 11
    assert found.checkpoint.missing == ["conv1_1/biases"]
    assert found.checkpoint.extra == ["step"]
    assert any(
        "lacks 1 of the tap's variables: conv1_1/biases" in hazard for hazard in found.hazards
    )


def test_hazards_are_listed(tmp_path):
    graph = tf.Graph()
    with graph.as_default(), tf1.device("/gpu:3"):
        x = tf1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        strength = tf1.placeholder(tf.float32, [], name="strength")
        net = x * strength + tf1.random.normal([8, 8, 3])
        net = tf1.nn.dropout(tf.reshape(net, [-1, 192]), rate=0.5, name="dropped")
        for name in ("train", "eval"):
            w = tf1.get_variable(f"{name}/w", [192, 4])
            tf.nn.softmax(tf.matmul(net, w), name=name)
        tf1.add_to_collection("gone", x)
    values = {"train/w": np.ones([192, 4]), "eval/w": np.ones([192, 4])}
    save_meta_graph(graph, tmp_path / "m", values)
    found = inspect(load_meta_graph(tmp_path / "m"))
    hazards = "; ".join(found.hazards)
    assert found.unknown_feeds == ["strength:0"]
    assert "--feed strength:0=1.0" in found.command
    assert "pinned to devices (/device:GPU:3)" in hazards
    assert "random numbers before the tap" in hazards
    assert "the preprocessing of the images is unknown" in hazards


def test_forbidden_operation_is_reported(tmp_path):
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        net = tf.numpy_function(lambda v: v, [x], tf.float32)
        net = tf.nn.relu(tf.matmul(tf.ensure_shape(net, [None, 4]), tf1.get_variable("v", [4, 3])))
        tf.nn.softmax(tf.matmul(net, tf1.get_variable("w", [3, 2])))
    save_meta_graph(graph, tmp_path / "m", {"v": np.ones([4, 3]), "w": np.ones([3, 2])})
    found = inspect(load_meta_graph(tmp_path / "m"))
    assert "PyFunc" in found.tap_error
    assert found.command is None


def test_moving_averages_are_reported(tmp_path):
    with tf.Graph().as_default(), tf1.Session() as session:
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        w = tf1.get_variable("w", [4, 2])
        tf.nn.softmax(tf.matmul(x, w))
        tf1.train.ExponentialMovingAverage(0.9).apply([w])
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver().save(session, str(tmp_path / "m"))
    found = inspect(load_meta_graph(tmp_path / "m"))
    assert any("use_ema=True" in hazard for hazard in found.hazards)


@pytest.mark.parametrize("case", range(26))
def test_third_party_meta_graphs_are_inspected(shared_wild, case):
    """Inputs, feeds and best tap equal those determined by hand."""
    expected = json.loads((shared_wild / "cases.json").read_text())[case]
    found = inspect(load_meta_graph(shared_wild / expected["case"] / expected["prefix"]))
    assert found.taps[0].name == expected["tap"]
    assert found.input == expected["input"]
    width = expected["feature_width"]
    assert width is None or found.taps[0].shape[-1] == width
    recognised = {feed.tensor: feed.inference for feed in found.feeds}
    assert {name: recognised.get(name) for name in expected["feeds"]} == expected["feeds"]
    assert found.unknown_feeds == []
    assert found.checkpoint.matched > 0
    assert found.checkpoint.missing == found.checkpoint.different == []
    assert (found.checkpoint.problem is None) == expected["weights"]
    is_loop = "while" in expected["hazard"]
    assert ("while loop" in (found.tap_error or "")) == is_loop
    if found.command is not None:
        assert expected["weights"]
        assert planned(flags_of(found.command)).tap == expected["tap"]
    elif not expected["weights"]:
        assert ("while loop" if is_loop else "lacks its data") in found.command_problem
    else:
        assert found.command_problem


def test_a_frozen_graph_needs_no_checkpoint(tmp_path):
    prefix = save_vgg(tmp_path / "tiny", card=Card(preprocess="unit"))
    with tf.Graph().as_default() as graph, tf1.Session() as session:
        saver = tf1.train.import_meta_graph(f"{prefix}.meta")
        saver.restore(session, str(prefix))
        from tensorflow.python.framework.convert_to_constants import (
            convert_variables_to_constants_from_session_graph as freeze,
        )

        frozen = freeze(session, graph.as_graph_def(), ["prob"])
    (tmp_path / "frozen.pb").write_bytes(frozen.SerializeToString())
    found = inspect(load_meta_graph(tmp_path / "frozen.pb"))
    assert found.format == "frozen graph"
    assert found.checkpoint.prefix is None
    assert found.taps[0].shape == (None, TINY.fc)
    assert found.tap_variables.count == 10


def test_hazards_name_stopped_gradients_and_towers(tmp_path):
    found = inspect(load_meta_graph(strangers.save(strangers.gradients_that_stop, tmp_path / "m")))
    (hazard,) = [h for h in found.hazards if "stops gradients at 'frozen:0'" in h]
    assert "conv1/weights, conv1/biases" in hazard
    found = inspect(load_meta_graph(strangers.save(strangers.towers_of_a_split, tmp_path / "t")))
    assert any("split between towers" in hazard for hazard in found.hazards)


def test_missing_weights_are_reported_with_the_command(own_model):
    for path in own_model.parent.glob("tiny.data*"):
        path.unlink()
    found = inspect(load_meta_graph(own_model))
    assert found.command is None
    assert "lacks its data" in found.command_problem
    assert f"With it: vgg-transfer finetune --model {own_model}" in found.command_problem


def test_meta_graph_gives_what_inspect_lists(model):
    graph = load_meta_graph(model)
    found = inspect(graph)
    assert graph.taps() == found.taps
    assert graph.inputs() == found.inputs
    assert graph.cuts(found.taps[0].name) == found.cuts
    assert graph.inputs()[0].about == "takes the images"
    network = plan(graph, "all").network
    assert sum(found.all_taps.values()) == infer(network)[network.output][-1]
    assert [cut.tensor for cut in graph.cuts(["pool1", "fc7"])] == ["pool1:0", "features:0"]
