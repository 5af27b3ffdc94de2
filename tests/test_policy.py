from pathlib import Path

import pytest
import tensorflow as tf

from transfer import ForbiddenOpError, policy, surgery

tf1 = tf.compat.v1


def harmful(kind: str, x: tf.Tensor, path: Path) -> tf.Tensor:
    """A tensor that does what no model should, and passes ``x`` on."""
    if kind == "ReadFile":
        return x + tf.cast(tf.strings.length(tf.io.read_file(str(path / "secret"))), tf.float32)
    if kind == "WriteFile":
        with tf.control_dependencies([tf.io.write_file(str(path / "written"), "gotcha")]):
            return tf.identity(x)
    if kind == "MatchingFiles":
        return x + tf.cast(tf.size(tf.raw_ops.MatchingFiles(pattern="/*")), tf.float32)
    if kind == "PyFunc":
        return tf.numpy_function(lambda v: v, [x], tf.float32)
    if kind == "Print":
        return tf1.Print(x, [x])
    if kind == "Assign":
        return tf1.assign(tf1.get_variable("v", [], use_resource=False), 1.0) + x
    if kind == "DecodeRaw":
        return x + tf.io.decode_raw(tf.constant("aaaa"), tf.float32)[0]
    raise AssertionError(kind)


def graph_with(kind: str, path: Path, where: str) -> tf1.GraphDef:
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        if where == "upstream":
            tf.nn.relu(harmful(kind, x, path), name="tap")
        elif where == "aside":
            harmful(kind, x, path)
            tf.nn.relu(x, name="tap")
        else:
            body = tf.function(lambda y: harmful(kind, y, path), autograph=False)
            tf.nn.relu(body(x), name="tap")
    return graph.as_graph_def()


KINDS = ["ReadFile", "MatchingFiles", "PyFunc", "Print", "DecodeRaw"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_arithmetic_is_refused_by_name(kind, tmp_path):
    with pytest.raises(ForbiddenOpError, match=rf"{kind} \(node "):
        surgery.extract(graph_with(kind, tmp_path, "upstream"), "tap", "x")


@pytest.mark.parametrize("kind", [*KINDS, "WriteFile"])
def test_calls_of_functions_are_refused(kind, tmp_path):
    with pytest.raises(ForbiddenOpError, match=r"PartitionedCall \(node .* call no functions"):
        surgery.extract(graph_with(kind, tmp_path, "function"), "tap", "x")


def test_a_function_in_an_attribute_is_refused(tmp_path):
    """TensorFlow would look its name up among all functions that the process knows."""
    graph_def = graph_with("Print", tmp_path, "aside")
    node = next(n for n in graph_def.node if n.name == "tap")
    node.attr["f"].func.name = "somebody_elses"
    with pytest.raises(ForbiddenOpError, match=r"Relu \(node 'tap'\)"):
        surgery.extract(graph_def, "tap", "x")


def test_a_side_effect_that_the_tap_waits_for_is_left_out(tmp_path):
    network = surgery.extract(graph_with("WriteFile", tmp_path, "upstream"), "tap", "x")
    assert {node.op for node in network.graph_def.node} == {"Identity", "Relu"}


@pytest.mark.parametrize("kind", ["ReadFile", "PyFunc", "Print"])
def test_what_the_tap_does_not_need_is_left_out(kind, tmp_path):
    network = surgery.extract(graph_with(kind, tmp_path, "aside"), "tap", "x")
    assert [node.op for node in network.graph_def.node] == ["Relu"]


def test_an_operation_that_nobody_knows_is_refused(tmp_path):
    graph_def = graph_with("Print", tmp_path, "aside")
    node = next(n for n in graph_def.node if n.name == "tap")
    node.op = "FrobnicateV7"
    with pytest.raises(ForbiddenOpError, match=r"FrobnicateV7 \(node 'tap'\)"):
        surgery.extract(graph_def, "tap", "x")


def test_all_that_is_allowed_exists():
    known = set(dir(tf.raw_ops))
    assert sorted(op for op in policy.ALLOWED_OPS if op not in known) == []


@pytest.mark.parametrize(
    "op", ["ReadFile", "WriteFile", "PyFunc", "EagerPyFunc", "Assign", "AssignVariableOp", "Save"]
)
def test_never_allowed(op):
    assert op not in policy.ALLOWED_OPS
