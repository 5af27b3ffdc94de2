"""Inlined function calls compared with a session that calls them."""

import numpy as np
import pytest
import tensorflow as tf
from stock import Program, assert_close, assert_equals_stock, images
from tensorflow.core.framework.types_pb2 import DT_FLOAT
from tensorflow.python.framework import function as legacy

from transfer import ForbiddenOpError
from transfer.graph import extract, inline

tf1 = tf.compat.v1


def function(python, **options):
    return tf.function(python, autograph=False, **options)


def x_of(width=4):
    return tf1.placeholder(tf.float32, [None, width], name="x")


def calls(graph_def):
    names = {f.signature.name for f in graph_def.library.function}
    return [n.op for n in graph_def.node if n.op in names or "Call" in n.op or "If" in n.op]


def test_nested_calls_are_inlined():
    def build():
        w = tf1.get_variable("w", [4, 3], use_resource=True)
        innermost = function(lambda y: tf.tanh(y) * 2.0)
        inner = function(lambda y: tf.matmul(innermost(y), w) + 1.0)
        outer = function(lambda y: tf.nn.relu(inner(y)))
        tf.identity(outer(x_of()), name="tap")

    program = Program(build)
    assert {n.op for n in program.graph.as_graph_def().node} & {"StatefulPartitionedCall"}
    assert calls(program.graph_def) == []
    assert_equals_stock(program, images(3, 4))


def test_calls_without_variables_are_inlined():
    def build():
        inner = function(lambda y: tf.exp(-y))
        tf.identity(function(lambda y: inner(y) + inner(2.0 * y))(x_of()), name="tap")

    program = Program(build)
    assert {n.op for n in program.graph.as_graph_def().node} & {"PartitionedCall"}
    assert_equals_stock(program, images(3, 4))


def test_function_called_twice_is_inlined_twice():
    def build():
        w = tf1.get_variable("w", [4, 4], use_resource=True)
        layer = function(lambda y: tf.nn.relu(tf.matmul(y, w)))
        tf.identity(layer(layer(x_of())), name="tap")

    assert_equals_stock(Program(build), images(3, 4))


def test_operation_named_like_function_is_a_call():
    @legacy.Defun(tf.float32, tf.float32, func_name="ScaledSum")
    def scaled_sum(a, b):
        return 3.0 * a + b, a - b

    def build():
        x = x_of()
        left, right = scaled_sum(x, tf.square(x))
        tf.multiply(left, right, name="tap")

    program = Program(build)
    assert "ScaledSum" in {n.op for n in program.graph.as_graph_def().node}
    assert calls(program.graph_def) == []
    assert_equals_stock(program, images(3, 4))


def test_second_result_of_call_is_available():
    def build():
        both = function(lambda y: (tf.nn.relu(y), tf.tanh(y)))
        tf.identity(both(x_of())[1], name="tap")

    assert_equals_stock(Program(build), images(3, 4))


def test_list_outputs_inside_function_are_resolved():
    def build():
        def body(y):
            first, second, third = tf.split(y, 3, axis=1)
            top, indices = tf.math.top_k(second, 2)
            pieces = tf.unstack(third, axis=1)
            return first * tf.cast(indices, tf.float32), top + pieces[1][:, None]

        first, second = function(body)(x_of(6))
        tf.concat([second, first], axis=1, name="tap")

    assert_equals_stock(Program(build), images(3, 6))


def test_function_may_return_its_argument():
    def build():
        swapped = function(lambda a, b: (b, a))
        x = x_of()
        first, second = swapped(x, tf.exp(x))
        tf.subtract(first, second, name="tap")

    assert_equals_stock(Program(build), images(3, 4))


def test_tap_inside_function():
    def build():
        inner = function(lambda y: tf.exp(tf.tanh(y, name="deep"), name="deeper"))
        tf.identity(function(lambda y: inner(y))(x_of()), name="tap")

    program = Program(build)
    (tap,) = [n.name for n in program.graph_def.node if n.name.endswith("/deep")]
    layer = program.layer(tap=tap)
    x = images(3, 4)
    assert_close(layer(x), np.tanh(x))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("kind", ["If", "StatelessIf"])
def test_data_dependent_if_equals_program(kind, sign):
    def build():
        x = x_of()
        stateful = kind == "If"
        w = tf1.get_variable("w", [4, 4], use_resource=True)
        v = tf1.get_variable("v", [4, 4], use_resource=True) if stateful else tf.fill([4, 4], 2.0)
        weights = w if stateful else tf.convert_to_tensor(w)
        y = tf1.cond(
            tf.reduce_sum(x) > 0,
            lambda: tf.matmul(x, weights),
            lambda: tf.nn.relu(tf.matmul(x, v) + 1.0),
        )
        tf.identity(y, name="tap")

    program = Program(build, conds="v2")
    assert kind in {n.op for n in program.graph.as_graph_def().node}
    assert calls(program.graph_def) == []
    assert_equals_stock(program, sign * np.abs(images(3, 4)))


@pytest.mark.parametrize("predicate", [True, False])
def test_known_if_keeps_one_branch(predicate):
    def build():
        x = x_of()
        known = tf1.placeholder_with_default(predicate, [], name="known")
        tf.identity(tf1.cond(known, lambda: tf.exp(x), lambda: tf.tanh(x)), name="tap")

    program = Program(build, conds="v2")
    network = program.network(feeds={"known": predicate})
    ops = {n.op for n in network.graph_def.node}
    assert ops & {"Exp", "Tanh", "SelectV2"} == {"Exp" if predicate else "Tanh"}
    assert_equals_stock(program, images(3, 4), {"known:0": predicate}, network)


@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_nested_ifs_equal_program(shift):
    def build():
        x = x_of()
        total = tf.reduce_sum(x)

        def inner():
            return tf1.cond(total > 10, lambda: (x * 2.0, tf.exp(-x)), lambda: (x, tf.tanh(x)))

        first, second = tf1.cond(total > 0, inner, lambda: (-x, tf.zeros_like(x)))
        tf.add(first, 2.0 * second, name="tap")

    assert_equals_stock(Program(build, conds="v2"), images(3, 4) + shift)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_if_inside_function_equals_program(sign):
    def build():
        w = tf1.get_variable("w", [4, 4], use_resource=True)

        def body(y):
            return tf1.cond(tf.reduce_sum(y) > 0, lambda: tf.matmul(y, w), lambda: y)

        tf.identity(function(body)(x_of()), name="tap")

    assert_equals_stock(Program(build, conds="v2"), sign * np.abs(images(3, 4)))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_call_inside_tensorflow_1_branch_equals_program(sign):
    def build():
        x = x_of()
        double = function(lambda y: 2.0 * y)
        y = tf1.cond(tf.reduce_sum(x) > 0, lambda: double(x), lambda: tf.constant(1.0) - x)
        tf.identity(y, name="tap")

    assert_equals_stock(Program(build), sign * np.abs(images(3, 4)))


def test_case_op_is_rejected_by_name():
    def build():
        x = x_of()
        index = tf.cast(tf.reduce_sum(x), tf.int32)
        y = tf.switch_case(index, [lambda: x, lambda: 2.0 * x, lambda: 3.0 * x])
        tf.identity(y, name="tap")

    with pytest.raises(ForbiddenOpError, match="Case"):
        Program(build, conds="v2").network()


def test_loop_inside_function_is_rejected():
    def build():
        def body(y):
            return tf.while_loop(
                lambda v: tf.reduce_sum(v) < 100, lambda v: (v * 2.0,), (tf.abs(y) + 1.0,)
            )[0]

        tf.identity(function(body)(x_of()), name="tap")

    with pytest.raises(ValueError, match="inside of, or depends on, a while loop"):
        Program(build, conds="v2").network()


def test_graph_without_functions_is_returned_unchanged():
    graph_def = Program(lambda: tf.nn.relu(x_of(), name="tap")).graph.as_graph_def()
    assert inline(graph_def) == graph_def


def test_inline_does_not_modify_graph():
    def build():
        tf.identity(function(lambda y: y + 1.0)(x_of()), name="tap")

    graph_def = Program(build).graph.as_graph_def()
    before = graph_def.SerializeToString(deterministic=True)
    inline(graph_def)
    assert graph_def.SerializeToString(deterministic=True) == before


def test_unneeded_function_may_contain_forbidden_ops(tmp_path):
    def build():
        def body(y):
            secret = tf.strings.length(tf.io.read_file(str(tmp_path / "secret")))
            return tf.tanh(y), y + tf.cast(secret, tf.float32)

        harmless, _ = function(body)(x_of())
        tf.identity(harmless, name="tap")

    program = Program(build)
    tanh = next(n.name for n in program.graph_def.node if n.op == "Tanh")
    network = program.network(tap=tanh)
    assert {n.op for n in network.graph_def.node} == {"Tanh"}


@pytest.mark.parametrize("conds", ["v1", "v2"])
def test_forbidden_op_in_branch_of_function_is_rejected(conds, tmp_path):
    def build():
        x = x_of()

        def body(y):
            return tf1.cond(
                tf.reduce_sum(y) > 0,
                lambda: tf.numpy_function(lambda v: v, [y], tf.float32),
                lambda: y,
            )

        tf.identity(function(body)(x), name="tap")

    with pytest.raises(ForbiddenOpError, match="PyFunc"):
        Program(build, conds=conds).network()


# Malicious graphs.


def graph_of(*calls_in_graph):
    graph_def = tf1.GraphDef()
    node = graph_def.node.add(name="x", op="Placeholder")
    node.attr["dtype"].type = DT_FLOAT
    for name, called, arguments in calls_in_graph:
        add_call(graph_def.node, name, called, arguments)
    return graph_def


def add_call(nodes, name, called, arguments):
    node = nodes.add(name=name, op="PartitionedCall", input=arguments)
    node.attr["f"].func.name = called
    node.attr["Tin"].list.type.extend([DT_FLOAT] * len(arguments))
    node.attr["Tout"].list.type.append(DT_FLOAT)


def add_function(graph_def, name, *calls_in_body, arguments=("a",), returns=None):
    """A function with one result, by default that of its last call."""
    added = graph_def.library.function.add()
    added.signature.name = name
    for argument in arguments:
        added.signature.input_arg.add(name=argument, type=DT_FLOAT)
    added.signature.output_arg.add(name="r", type=DT_FLOAT)
    for number, (called, inputs) in enumerate(calls_in_body):
        add_call(added.node_def, f"c{number}", called, inputs)
    added.ret["r"] = returns or f"c{len(calls_in_body) - 1}:output:0"


@pytest.mark.parametrize("length", [1, 2, 3])
def test_recursive_functions_are_rejected(length):
    graph_def = graph_of(("tap", "f0", ["x"]))
    for number in range(length):
        add_function(graph_def, f"f{number}", (f"f{(number + 1) % length}", ["a"]))
    with pytest.raises(ValueError, match="damaged: its function 'f0' calls itself"):
        inline(graph_def)


@pytest.mark.parametrize("arguments", [[], ["x", "x"]])
def test_wrong_number_of_arguments_is_rejected(arguments):
    graph_def = graph_of(("tap", "f", arguments))
    add_function(graph_def, "f", returns="a")
    with pytest.raises(
        ValueError, match=rf"'tap' calls 'f' with {len(arguments)} arguments; it takes 1"
    ):
        inline(graph_def)


@pytest.mark.parametrize("reference", ["gone", "gone:output:0", "c0:nothing:0", "a:output:0"])
def test_unresolved_reference_in_body_is_rejected(reference):
    graph_def = graph_of(("tap", "f", ["x"]))
    add_function(graph_def, "f", ("g", ["a"]), ("g", [reference]))
    add_function(graph_def, "g", returns="a")
    with pytest.raises(ValueError, match=f"damaged: function 'f' refers to '{reference}'"):
        inline(graph_def)


def test_unresolved_result_is_rejected():
    graph_def = graph_of(("tap", "f", ["x"]))
    add_function(graph_def, "f", returns="gone:output:0")
    with pytest.raises(ValueError, match="damaged: function 'f' refers to 'gone:output:0'"):
        inline(graph_def)


def test_long_chain_of_calls_is_inlined():
    graph_def = graph_of(("tap", "f0", ["x"]))
    for number in range(100):
        add_function(graph_def, f"f{number}", (f"f{number + 1}", ["a"]))
    add_function(graph_def, "f100", returns="a")
    network = extract(inline(graph_def), "tap", "x")
    assert {n.op for n in network.graph_def.node} == {"IdentityN"}


def test_functions_of_other_graphs_are_never_called():
    """TensorFlow would find it: a function of that name is registered in the process."""

    def build():
        tf.identity(function(lambda y: y + 1.0)(x_of()), name="tap")

    graph_def = Program(build).graph.as_graph_def()
    del graph_def.library.function[:]
    add_function(graph_def, "unused", returns="a")
    with pytest.raises(ForbiddenOpError, match="PartitionedCall"):
        extract(inline(graph_def), "tap", "x")


@pytest.mark.timeout(300)
def test_exponentially_growing_functions_are_rejected_quickly():
    """2^40 calls in a file of 8 KB."""
    graph_def = graph_of(("tap", "f0", ["x"]))
    for number in range(40):
        name = f"f{number + 1}"
        add_function(graph_def, f"f{number}", (name, ["a"]), (name, ["c0:output:0"]))
    add_function(graph_def, "f40", returns="a")
    with pytest.raises(ValueError, match="the graph is too large"):
        inline(graph_def)


@pytest.mark.timeout(300)
def test_too_many_edges_are_rejected():
    """10^8 edges in a file of 1 MB."""
    graph_def = graph_of(*((f"c{number}", "f", ["x"]) for number in range(10**4)))
    add_function(graph_def, "f", returns="a")
    signature = graph_def.library.function[0]
    for number in range(10**4):
        signature.signature.output_arg.add(name=f"r{number}", type=DT_FLOAT)
        signature.ret[f"r{number}"] = "a"
    with pytest.raises(ValueError, match="the graph is too large"):
        inline(graph_def)
