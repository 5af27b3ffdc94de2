"""Checkpoint keys of the variables of a TensorFlow 2 SavedModel."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

from transfer import load_meta_graph
from transfer.graph import VARIABLES
from transfer.models import object_keys

KEY = object_keys.KEY


def variable(value, name="same"):
    return tf.Variable(np.float32(value), name=name)


class Model(tf.Module):
    """All variables have different values and the same name."""

    def __init__(self):
        super().__init__()
        self.listed = [variable(1.0), [variable(2.0)]]
        self.keyed = {"a/b": variable(3.0), "a.b": variable(4.0), "": variable(5.0)}
        self.inner = tf.Module()
        self.inner.inner = tf.Module()
        self.inner.inner.v = variable(6.0)
        self.first = self.second = variable(7.0)
        self.unused = variable(8.0)

    def used(self):
        listed, keyed = self.listed, self.keyed
        return [
            *(listed[0], listed[1][0], keyed["a/b"], keyed["a.b"], keyed[""]),
            *(self.inner.inner.v, self.first),
        ]

    @tf.function(input_signature=[tf.TensorSpec([None, 1])])
    def serve(self, x):
        return tf.add_n([x * v for v in self.used()])


@pytest.fixture
def saved(tmp_path):
    """A SavedModel, and the values of its checkpoint keys."""
    model = Model()
    tf.saved_model.save(model, str(tmp_path / "m"), signatures=model.serve)
    reader = tf.train.load_checkpoint(str(tmp_path / "m" / "variables" / "variables"))
    return load_meta_graph(tmp_path / "m"), reader


def test_paths_go_from_the_root_to_the_variable(saved):
    graph, _ = saved
    assert sorted(object_keys.variable_paths(graph.meta).values()) == [
        ("first",),
        ("inner", "inner", "v"),
        ("keyed", ""),
        ("keyed", "a.b"),
        ("keyed", "a/b"),
        ("listed", "0"),
        ("listed", "1", "0"),
    ]


def test_every_variable_gets_its_own_key(saved):
    graph, reader = saved
    paths = object_keys.variable_paths(graph.meta)
    keys = object_keys.checkpoint_keys(paths, reader.get_tensor(KEY))
    values = {paths[name]: float(reader.get_tensor(key)) for name, key in keys.items()}
    assert values == {
        ("listed", "0"): 1.0,
        ("listed", "1", "0"): 2.0,
        ("keyed", "a/b"): 3.0,
        ("keyed", "a.b"): 4.0,
        ("keyed", ""): 5.0,
        ("inner", "inner", "v"): 6.0,
        ("first",): 7.0,
    }


def test_values_are_read_by_object_keys(saved):
    graph, _ = saved
    network = graph.network(graph.outputs[0])
    values = graph.read(network.variables)
    assert sorted(float(value) for value in values.values()) == [1, 2, 3, 4, 5, 6, 7]


def test_tensorflow_1_graph_has_no_objects():
    assert object_keys.variable_paths(MetaGraphDef()) == {}


def test_missing_children_are_ignored(saved):
    graph, _ = saved
    meta = MetaGraphDef()
    meta.CopyFrom(graph.meta)
    for number in (-1, 10**6):
        meta.object_graph_def.nodes[0].children.add(node_id=number, local_name="gone")
    assert object_keys.variable_paths(meta) == object_keys.variable_paths(graph.meta)


def test_cyclic_objects_are_handled(saved):
    graph, _ = saved
    meta = MetaGraphDef()
    meta.CopyFrom(graph.meta)
    for number, node in enumerate(meta.object_graph_def.nodes):
        node.children.add(node_id=0, local_name="root")
        node.children.add(node_id=number, local_name="self")
    assert object_keys.variable_paths(meta) == object_keys.variable_paths(graph.meta)


def test_variable_missing_in_checkpoint_has_no_key(saved):
    graph, reader = saved
    paths = object_keys.variable_paths(graph.meta)
    gone = {name: (*path, "gone") for name, path in paths.items()}
    assert object_keys.checkpoint_keys(gone, reader.get_tensor(KEY)) == {}


def test_missing_objects_of_checkpoint_are_ignored(saved):
    graph, reader = saved
    damaged = TrackableObjectGraph.FromString(reader.get_tensor(KEY))
    for node in damaged.nodes:
        for child in node.children:
            child.node_id = 10**6
    paths = object_keys.variable_paths(graph.meta)
    assert object_keys.checkpoint_keys(paths, damaged.SerializeToString()) == {}


def test_invalid_object_graph_is_rejected():
    with pytest.raises(ValueError, match=f"the checkpoint is damaged at {KEY}"):
        object_keys.checkpoint_keys({"v": ("v",)}, b"\xff\xff\xff")


def test_variables_keep_the_graphs_names(saved):
    graph, _ = saved
    nodes = [node.name for node in graph.meta.graph_def.node if node.op in VARIABLES]
    assert set(graph.objects) <= set(nodes)
    assert len(nodes) == 8
