from pathlib import Path

import pytest
import tensorflow as tf

from transfer import ForbiddenOpError
from transfer.graph import extract, inline, policy
from transfer.graph.network_function import as_function

tf1 = tf.compat.v1


def harmful(kind: str, x: tf.Tensor, path: Path) -> tf.Tensor:
    """A tensor with a forbidden side effect that forwards ``x``."""
    if kind == "ReadFile":
        return x + tf.cast(tf.strings.length(tf.io.read_file(str(path / "secret"))), tf.float32)
    if kind == "WriteFile":
        with tf.control_dependencies([tf.io.write_file(str(path / "written"), "gotcha")]):
            return tf.identity(x)
    if kind == "MatchingFiles":
        return x + tf.cast(tf.size(tf.raw_ops.MatchingFiles(pattern="/*")), tf.float32)
    if kind == "PyFunc":
        return tf.ensure_shape(tf.numpy_function(lambda v: v, [x], tf.float32), [None, 4])
    if kind == "Print":
        return tf1.Print(x, [x])
    if kind == "Assign":
        return tf1.assign(tf1.get_variable("v", [], use_resource=False), 1.0) + x
    if kind == "QueueDequeue":
        with tf1.device("/job:elsewhere/task:7"):
            queue = tf.raw_ops.FIFOQueueV2(component_types=[tf.float32], shared_name="theirs")
            return x + tf.raw_ops.QueueDequeueV2(handle=queue, component_types=[tf.float32])[0]
    if kind == "DataService":
        dataset = tf.raw_ops.RangeDataset(
            start=tf.constant(0, tf.int64),
            stop=tf.constant(1, tf.int64),
            step=tf.constant(1, tf.int64),
            output_types=[tf.int64],
            output_shapes=[[]],
        )
        value = tf.raw_ops.DatasetToSingleElement(
            dataset=dataset, output_types=[tf.int64], output_shapes=[[]]
        )
        return x + tf.cast(value[0], tf.float32)
    if kind == "DecodeRaw":
        return x + tf.io.decode_raw(tf.constant("aaaa"), tf.float32)[0]
    raise AssertionError(kind)


def graph_with(kind: str, path: Path, where: str) -> tf1.GraphDef:
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        if where == "upstream":
            net = harmful(kind, x, path)
        elif where == "aside":
            harmful(kind, x, path)
            net = x
        elif where == "function":
            inner = tf.function(lambda y: harmful(kind, y, path), autograph=False)
            outer = tf.function(lambda y: inner(y) + 1.0, autograph=False)
            net = outer(x)
        else:
            predicate = {
                "branch": tf.reduce_sum(x) > 0,
                "branch taken": tf.constant(True),
                "branch not taken": tf.constant(False),
            }[where.removeprefix("v1 ")]
            if where.startswith("v1"):
                tf1.disable_control_flow_v2()
            try:
                net = tf1.cond(predicate, lambda: harmful(kind, x, path), lambda: x * 1.0)
            finally:
                tf1.enable_control_flow_v2()
        tf.nn.relu(net, name="tap")
    return inline(graph.as_graph_def())


KINDS = ["ReadFile", "MatchingFiles", "PyFunc", "Print", "DecodeRaw", "QueueDequeue", "DataService"]
REACHED = ["upstream", "function", "branch", "branch taken", "v1 branch", "v1 branch taken"]


@pytest.mark.parametrize("where", REACHED)
@pytest.mark.parametrize("kind", KINDS)
def test_forbidden_ops_are_rejected_by_name(kind, where, tmp_path):
    op = {"DataService": "DatasetToSingleElement"}.get(kind, kind)
    with pytest.raises(ForbiddenOpError, match=rf"{op}\w* \(node "):
        extract(graph_with(kind, tmp_path, where), "tap", "x")


@pytest.mark.parametrize("where", ["aside", "branch not taken", "v1 branch not taken"])
@pytest.mark.parametrize("kind", [*KINDS, "WriteFile"])
def test_forbidden_ops_outside_of_tap_are_ignored(kind, where, tmp_path):
    network = extract(graph_with(kind, tmp_path, where), "tap", "x")
    ops = {node.op for node in network.graph_def.node}
    assert ops <= {"Relu", "Mul", "Const", "Identity", "IdentityN"}


@pytest.mark.parametrize("where", ["upstream", "aside", "function", "branch", "v1 branch"])
def test_side_effects_in_control_dependencies_do_not_run(where, tmp_path):
    network = extract(graph_with("WriteFile", tmp_path, where), "tap", "x")
    assert "WriteFile" not in {node.op for node in network.graph_def.node}
    as_function(network)(tf.ones([1, 4]), [], None)
    assert list(tmp_path.iterdir()) == []


def test_calls_of_functions_outside_of_graph_are_rejected(tmp_path):
    """TensorFlow would look them up among all functions registered in the process."""
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        tf.nn.relu(tf.function(lambda y: harmful("Print", y, tmp_path))(x), name="tap")
    graph_def = graph.as_graph_def()
    del graph_def.library.function[:]
    with pytest.raises(ForbiddenOpError, match=r"PartitionedCall \(node .* call no functions"):
        extract(inline(graph_def), "tap", "x")


def test_function_in_attribute_is_rejected(tmp_path):
    """TensorFlow would look it up among all functions registered in the process."""
    graph_def = graph_with("Print", tmp_path, "aside")
    node = next(n for n in graph_def.node if n.name == "tap")
    node.attr["f"].func.name = "somebody_elses"
    with pytest.raises(ForbiddenOpError, match=r"Relu \(node 'tap'\)"):
        extract(graph_def, "tap", "x")


def test_unknown_operation_is_rejected(tmp_path):
    graph_def = graph_with("Print", tmp_path, "aside")
    node = next(n for n in graph_def.node if n.name == "tap")
    node.op = "FrobnicateV7"
    with pytest.raises(ForbiddenOpError, match=r"FrobnicateV7 \(node 'tap'\)"):
        extract(graph_def, "tap", "x")


def test_all_allowed_ops_exist():
    known = set(dir(tf.raw_ops))
    assert sorted(op for op in policy.ALLOWED_OPS if op not in known) == []


@pytest.mark.parametrize(
    "op", ["ReadFile", "WriteFile", "PyFunc", "EagerPyFunc", "Assign", "AssignVariableOp", "Save"]
)
def test_dangerous_ops_are_not_allowed(op):
    assert op not in policy.ALLOWED_OPS


def convolution_with(attribute, values, op="Conv2D"):
    """A convolution with one replaced attribute."""
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        if op == "Conv2D":
            net = tf.nn.conv2d(x, tf.ones([1, 1, 3, 3]), 1, "SAME", name="call")
        elif op == "MaxPool":
            net = tf.nn.max_pool2d(x, 2, 1, "SAME", name="call")
        elif op == "Conv2DBackpropInput":
            net = tf.nn.conv2d_transpose(x, tf.ones([1, 1, 3, 3]), [1, 8, 8, 3], 1, name="call")
        elif op == "Conv3D":
            net = tf.nn.conv3d(x[..., None], tf.ones([1, 1, 1, 1, 1]), [1] * 5, "SAME", name="call")
        elif op == "GatherV2":
            net = tf.gather(x, [0], axis=0, name="call")
        elif op == "LRN":
            net = tf.nn.lrn(x, name="call")
        elif op == "SpaceToDepth":
            net = tf.nn.space_to_depth(x, 2, name="call")
        elif op == "Split":
            net = tf.split(x, 3, axis=3, name="call")[0]
        tf.nn.relu(net, name="tap")
    graph_def = graph.as_graph_def()
    node = next(node for node in graph_def.node if node.op == op)
    if isinstance(values, list):
        node.attr[attribute].list.i[:] = values
    else:
        node.attr[attribute].i = values
    return graph_def


@pytest.mark.parametrize(
    ("op", "attribute", "values"),
    [
        ("Conv2D", "strides", [1, 0, 1, 1]),
        ("Conv2D", "strides", [1, 1]),
        ("Conv2D", "strides", []),
        ("Conv2D", "dilations", [1, 2**31, 1, 1]),
        ("Conv2D", "dilations", [1, 1, 1, 1, 1]),
        ("Conv2D", "explicit_paddings", [0, 0, 1, 1, 1, 1, 0, 0]),
        ("Conv2DBackpropInput", "strides", [1, 2**31, 0, 1]),
        ("Conv2DBackpropInput", "dilations", [2**31, 1, 1, 1]),
        ("Conv3D", "strides", [1, 1, -1, 1, 1]),
        ("MaxPool", "ksize", [1, 0, 2, 1]),
        ("MaxPool", "ksize", [1, 2**62, 2, 1]),
        ("MaxPool", "strides", [1, -(2**63), 1, 1]),
        ("GatherV2", "batch_dims", 2**31 - 1),
        ("GatherV2", "batch_dims", -(2**31)),
        ("LRN", "depth_radius", -1),
        ("SpaceToDepth", "block_size", 2**31),
        ("Split", "num_split", 2**31 - 1),
    ],
)
def test_attributes_that_crash_tensorflow_are_rejected(op, attribute, values):
    with pytest.raises(ValueError, match=rf"'call.*' \({op}\) has .*{attribute}.*expected|split"):
        extract(convolution_with(attribute, values, op), "tap", "x")


def test_attributes_of_ordinary_operations_pass():
    ops = ("Conv2D", "MaxPool", "Conv2DBackpropInput", "Conv3D", "GatherV2", "LRN", "Split")
    for op in ops:
        graph_def = convolution_with("unknown_to_everyone", 5, op)
        assert op in {node.op for node in extract(graph_def, "tap", "x").graph_def.node}
