import numpy as np
import pytest
import tensorflow as tf

from transfer import load_meta_graph, save_meta_graph
from transfer.models import repair

tf1 = tf.compat.v1


@pytest.fixture
def broken(tmp_path):
    """A meta graph that ``import_meta_graph`` rejects: a collection does not resolve."""
    graph = tf.Graph()
    with graph.as_default(), tf1.device("/job:ps"):
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        w = tf1.get_variable("w", [4, 2])
        tf.matmul(x, w, name="y")
        tf1.add_to_collection("kept", x)
    save_meta_graph(graph, tmp_path / "m", {"w": np.ones([4, 2])})
    meta = tf1.MetaGraphDef.FromString((tmp_path / "m.meta").read_bytes())
    meta.collection_def["trainops"].node_list.value.append("Adam")
    gone = tf1.MetaGraphDef.FromString((tmp_path / "m.meta").read_bytes())
    text = gone.collection_def["variables"].bytes_list.value[0].replace(b"w", b"q")
    meta.collection_def["variables"].bytes_list.value.append(text)
    (tmp_path / "m.meta").write_bytes(meta.SerializeToString())
    return tmp_path / "m"


def test_import_meta_graph_accepts_repaired_graph(broken):
    with tf.Graph().as_default(), pytest.raises(KeyError, match="Adam|q"):
        tf1.train.import_meta_graph(f"{broken}.meta")
    with tf.Graph().as_default() as graph, tf1.Session() as session:
        saver = tf1.train.import_meta_graph(load_meta_graph(broken).repaired())
        saver.restore(session, str(broken))
        assert session.run("y:0", {"x:0": np.ones([1, 4])}).tolist() == [[4, 4]]
        assert [v.op.name for v in tf1.global_variables()] == ["w"]
        assert tf1.get_collection("kept") == [graph.get_tensor_by_name("x:0")]


def test_unresolved_references_are_listed(broken):
    found = repair.unresolved(load_meta_graph(broken).meta)
    assert "trainops: Adam" in found
    assert "variables: q:0" in found


def test_repair_of_valid_meta_graph_only_removes_devices(model):
    graph = load_meta_graph(model)
    assert repair.unresolved(graph.meta) == []
    expected = tf1.MetaGraphDef()
    expected.CopyFrom(graph.meta)
    for node in expected.graph_def.node:
        node.device = ""
    assert graph.repaired() == expected
