"""Changes to graphs that keep them parseable."""

from __future__ import annotations

from common import Generator, Message, pick
from protobufs import (
    DTYPES,
    FLOATS,
    INTEGERS,
    STRINGS,
    add_constant,
    change_shape,
    free_scope,
    new_node,
    operation_of,
    pick_node,
    some_field,
    wire,
)


def self_loop(graph: Message, tap: str, rng: Generator) -> None:
    node = pick_node(graph, tap, rng, arity=1)
    if node.input:
        node.input[int(rng.integers(len(node.input)))] = node.name


def cycle(graph: Message, tap: str, rng: Generator) -> None:
    node = pick_node(graph, tap, rng, arity=1)
    if node.input:
        later = tap if rng.random() < 0.5 else pick_node(graph, tap, rng).name
        node.input[int(rng.integers(len(node.input)))] = later


def edge_changed(graph: Message, tap: str, rng: Generator) -> None:
    node = pick_node(graph, tap, rng, arity=1)
    if not node.input:
        return
    position = int(rng.integers(len(node.input)))
    edge = node.input[position]
    choice = int(rng.integers(7))
    if choice == 0:
        del node.input[position]
    elif choice == 1:
        node.input.append(edge)
    elif choice == 2:
        node.input[position] = f"{operation_of(edge)}:{pick((1, 2**31, 10**25), rng)}"
    elif choice == 3:
        node.input[position] = pick(STRINGS, rng)
    elif choice == 4:
        node.input[position] = f"^{operation_of(edge)}"
    elif choice == 5:
        node.input[position] = pick_node(graph, tap, rng).name
    else:
        node.input.extend([edge] * 1000)


def same_name(graph: Message, tap: str, rng: Generator) -> None:
    pick_node(graph, tap, rng).name = pick_node(graph, tap, rng).name


def odd_name(graph: Message, tap: str, rng: Generator) -> None:
    node, name = pick_node(graph, tap, rng), pick(STRINGS, rng)
    if rng.random() < 0.5:
        for user in graph.node:
            for position, edge in enumerate(user.input):
                if edge == node.name:
                    user.input[position] = name
    node.name = name


def nodes_dropped(graph: Message, tap: str, rng: Generator) -> None:
    share = rng.choice([0.01, 0.1, 0.9])
    kept = [node for node in graph.node if rng.random() > share]
    del graph.node[:]
    graph.node.extend(kept)


def nodes_shuffled(graph: Message, tap: str, rng: Generator) -> None:
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes[i] for i in rng.permutation(len(nodes)))


def attribute_lost(graph: Message, tap: str, rng: Generator) -> None:
    node = pick_node(graph, tap, rng)
    if node.attr:
        del node.attr[pick(sorted(node.attr), rng)]


def attribute_changed(graph: Message, tap: str, rng: Generator) -> None:
    """Give an attribute a value of another kind, or an extreme value of the same kind."""
    node = pick_node(graph, tap, rng)
    if not node.attr:
        return
    attribute = node.attr[pick(sorted(node.attr), rng)]
    kind = attribute.WhichOneof("value")
    choice = pick(("s", "i", "f", "b", "type", "shape", "tensor", "list", "func", kind), rng)
    if choice == "i":
        attribute.i = pick(INTEGERS, rng)
    elif choice == "s":
        attribute.s = pick((b"SAME", b"VALID", b"NCHW", b"\xff", b""), rng)
    elif choice == "type":
        attribute.type = pick(DTYPES, rng)
    elif choice == "list" and kind == "list":
        some_field(attribute.list, rng)
        for position in range(len(attribute.list.i)):
            attribute.list.i[position] = pick(INTEGERS, rng)
    elif choice == "shape":
        change_shape(attribute.shape, rng)
    elif choice == "func":
        attribute.func.name = pick(("x", "", node.op), rng)
    elif choice == "f":
        attribute.f = pick(FLOATS, rng)
    else:
        some_field(attribute, rng)


def constant_changed(graph: Message, tap: str, rng: Generator) -> None:
    node = pick_node(graph, tap, rng, op="Const")
    _change_tensor(node, rng)


def _change_tensor(node: Message, rng: Generator) -> None:
    tensor = node.attr["value"].tensor
    choice = int(rng.integers(6))
    if choice <= 1:
        change_shape(tensor.tensor_shape, rng)
        if choice and not tensor.string_val:
            tensor.tensor_content = b""
            tensor.float_val.append(1.0)
            tensor.int_val.append(1)
    elif choice == 2:
        tensor.tensor_content = tensor.tensor_content[: int(rng.integers(9))] or b"\1"
    elif choice == 3:
        tensor.dtype = pick(DTYPES, rng)
    elif choice == 4:
        node.attr["dtype"].type = tensor.dtype = pick(DTYPES, rng)
    else:
        some_field(tensor, rng)


def operation_changed(graph: Message, tap: str, rng: Generator) -> None:
    from transfer.graph.policy import ALLOWED_OPS

    others = ("WriteFile", "ReadFile", "PyFunc", "NoSuchOp", "", "Enter", "VariableV2", "If")
    node = pick_node(graph, tap, rng)
    node.op = pick(sorted(ALLOWED_OPS) if rng.random() < 0.9 else others, rng)


def type_changed(graph: Message, tap: str, rng: Generator) -> None:
    node = pick_node(graph, tap, rng)
    types = [key for key in sorted(node.attr) if node.attr[key].WhichOneof("value") == "type"]
    if types:
        node.attr[pick(types, rng)].type = pick(DTYPES, rng)


def variable_changed(graph: Message, tap: str, rng: Generator) -> None:
    node = pick_node(graph, tap, rng, op="Var")
    if rng.random() < 0.6:
        change_shape(node.attr["shape"].shape, rng)
    else:
        node.attr["dtype"].type = pick(DTYPES, rng)


def placeholder_changed(graph: Message, tap: str, rng: Generator) -> None:
    node = pick_node(graph, tap, rng, op="Placeholder")
    if rng.random() < 0.6:
        change_shape(node.attr["shape"].shape, rng)
    else:
        node.attr["dtype"].type = pick(DTYPES, rng)


def versions_changed(graph: Message, tap: str, rng: Generator) -> None:
    graph.versions.producer = pick((-1, 0, 1, 8, 20, 27, 10**9), rng)
    if rng.random() < 0.3:
        graph.versions.min_consumer = pick((-1, 10**9), rng)
    if rng.random() < 0.3:
        graph.versions.bad_consumers.extend(range(3000))


def huge_result(graph: Message, tap: str, rng: Generator) -> None:
    """Make the tap depend on the sum of a tensor with too many elements for memory."""
    scope = free_scope(graph)
    sizes = pick(([2**20], [2**33], [2**40], [2**31, 2**31], [2**62, 2**62], [-1], [0]), rng)
    dims = add_constant(graph, f"{scope}/dims", sizes)
    one = add_constant(graph, f"{scope}/one", [1.0], dtype=1)
    axes = add_constant(graph, f"{scope}/axes", list(range(len(sizes))), dtype=3)
    if rng.random() < 0.5:
        axis = add_constant(graph, f"{scope}/axis", [0], dtype=3)
        scalar = new_node(graph, f"{scope}/scalar", "Mean", [one, axis], T=1, Tidx=3)
        huge = new_node(graph, f"{scope}/huge", "Fill", [dims, scalar.name], T=1, index_type=9)
        graph.node.append(scalar)
    else:
        ones = add_constant(graph, f"{scope}/ones", [1] * len(sizes))
        cube = new_node(graph, f"{scope}/cube", "Reshape", [one, ones], T=1, Tshape=9)
        huge = new_node(graph, f"{scope}/huge", "Tile", [cube.name, dims], T=1, Tmultiples=9)
        graph.node.append(cube)
    mean = new_node(graph, f"{scope}/mean", "Mean", [huge.name, axes], T=1, Tidx=3)
    graph.node.extend([huge, mean])
    wire(graph, tap, new_node(graph, f"{scope}/add", "AddV2", [mean.name], T=1), rng)


def long_chain(graph: Message, tap: str, rng: Generator) -> None:
    """A chain of thousands of operations: recursive code overflows the stack."""
    scope = free_scope(graph)
    length = int(pick((500, 1500), rng))
    first = new_node(graph, f"{scope}/0", "Identity", T=1)
    user = pick_node(graph, tap, rng, arity=1)
    if not user.input:
        return
    first.input.append(user.input[0].lstrip("^"))
    graph.node.append(first)
    for number in range(1, length):
        graph.node.append(
            new_node(graph, f"{scope}/{number}", "Identity", [f"{scope}/{number - 1}"], T=1)
        )
    user.input[0] = f"{scope}/{length - 1}"


def many_outputs(graph: Message, tap: str, rng: Generator) -> None:
    """A node with more outputs than fit in memory."""
    scope = free_scope(graph)
    op, count = pick((("Split", "num_split"), ("Unpack", "num"), ("IdentityN", "")), rng)
    node = new_node(graph, f"{scope}/outputs", op, T=1)
    if op == "IdentityN":
        node.attr["T"].list.type.extend([1] * 100_000)
    else:
        node.attr[count].i = pick((2**20, 2**31 - 1, 2**40, -1), rng)
    wire(graph, tap, node, rng)


def functions_added(graph: Message, tap: str, rng: Generator) -> None:
    """Recursive functions, or functions whose expansion exhausts memory, upstream of the tap."""
    scope = free_scope(graph)
    form = pick(("self", "mutual", "doubling", "deep", "heavy", "arguments", "if"), rng)
    depth = {"self": 1, "mutual": 2, "doubling": 40, "heavy": 12}.get(form, 3)
    depth = int(pick((50, 1000, 5000), rng)) if form == "deep" else depth

    def call(function: Message, name: str, called: str, argument: str) -> str:
        if form == "if":
            node = function.node_def.add(name=name, op="If", input=["c:output:0", argument])
            node.attr["Tcond"].type = 10
            node.attr["then_branch"].func.name = node.attr["else_branch"].func.name = called
        else:
            node = function.node_def.add(name=name, op="PartitionedCall", input=[argument])
            node.attr["f"].func.name = called
        node.attr["Tin"].list.type.append(1)
        node.attr["Tout"].list.type.append(1)
        return f"{name}:output:0"

    for number in range(depth + 1):
        function = graph.library.function.add()
        function.signature.name = f"{scope}_{number}"
        function.signature.input_arg.add(name="x", type=1)
        function.signature.output_arg.add(name="y", type=1)
        following = (number + 1) % depth if form in ("self", "mutual") else number + 1
        if number == depth and form not in ("self", "mutual"):
            node = function.node_def.add(name="i", op="Identity", input=["x"])
            node.attr["T"].type = 1
            if form == "heavy":
                node = function.node_def.add(name="c", op="Const")
                node.attr["dtype"].type = node.attr["value"].tensor.dtype = 1
                node.attr["value"].tensor.tensor_shape.dim.add(size=2**18)
                node.attr["value"].tensor.tensor_content = bytes(2**20)
            function.ret["y"] = "i:output:0"
            continue
        if form == "if":
            node = function.node_def.add(name="c", op="Const")
            node.attr["dtype"].type = node.attr["value"].tensor.dtype = 10
            node.attr["value"].tensor.bool_val.append(True)
            node.attr["value"].tensor.tensor_shape.SetInParent()
        result = call(function, "a", f"{scope}_{following}", "x")
        if form in ("doubling", "heavy"):
            result = call(function, "b", f"{scope}_{following}", result)
        function.ret["y"] = result
    outer = new_node(graph, f"{scope}_call", "PartitionedCall")
    outer.attr["f"].func.name = f"{scope}_0"
    outer.attr["Tin"].list.type.append(1)
    outer.attr["Tout"].list.type.append(1)
    if form == "arguments":
        outer.input.append(graph.node[0].name)
    wire(graph, tap, outer, rng)


def function_changed(graph: Message, tap: str, rng: Generator) -> None:
    if not graph.library.function:
        return functions_added(graph, tap, rng)
    function = pick(graph.library.function, rng)
    choice = int(rng.integers(5))
    if choice == 0 and function.ret:
        function.ret[pick(sorted(function.ret), rng)] = pick(STRINGS, rng)
    elif choice == 1 and function.ret:
        del function.ret[pick(sorted(function.ret), rng)]
    elif choice == 2:
        graph.library.function.remove(function)
    elif choice == 3:
        some_field(function.signature, rng)
    else:
        function.signature.name = pick(graph.library.function, rng).signature.name
    return None


def saver_changed(graph: Message, tap: str, rng: Generator) -> None:
    """Change keys and slices in the saver's operations."""
    nodes = {node.name: node for node in graph.node}
    restores = [node for node in graph.node if node.op in ("RestoreV2", "RestoreSlice")]
    if not restores:
        return
    restore = pick(restores, rng)
    told = [nodes[operation_of(e)] for e in restore.input[1:] if operation_of(e) in nodes]
    told = [node for node in told if node.op == "Const"]
    choice = int(rng.integers(5))
    if choice == 0:
        del restore.input[int(rng.integers(len(restore.input) + 1)) :]
    elif choice == 1:
        restore.op = pick(("Restore", "RestoreV2", "RestoreSlice", "Identity"), rng)
    elif choice == 2 and told:
        _change_tensor(pick(told, rng), rng)
    elif told:
        strings = pick(told, rng).attr["value"].tensor.string_val
        odd = (b"\xff", b"2 0,1", b"2 x", b"3 3 0,1:-", b"9 0,99999999999999999999", b" ", b":")
        for position in range(len(strings)):
            if rng.random() < 0.5:
                strings[position] = pick((*odd, b"1" * 5000, strings[position]), rng)


_OFTEN_IN_GRAPHS = (edge_changed, attribute_changed, constant_changed, operation_changed)


_LESS_OFTEN_IN_GRAPHS = (
    type_changed,
    *(self_loop, cycle, same_name, odd_name, nodes_dropped, attribute_lost, functions_added),
    *(function_changed, saver_changed, variable_changed, placeholder_changed, huge_result),
)


_RARE_IN_GRAPHS = (nodes_shuffled, versions_changed, long_chain, many_outputs)


GRAPH_CHANGES = (*_OFTEN_IN_GRAPHS * 3, *_LESS_OFTEN_IN_GRAPHS * 2, *_RARE_IN_GRAPHS)


def change_graph(graph: Message, tap: str, rng: Generator) -> str:
    done = []
    for _ in range(int(rng.choice([1, 1, 2, 5]))):
        if rng.random() < 0.15:
            done.append(some_field(graph, rng))
        else:
            change = pick(GRAPH_CHANGES, rng)
            change(graph, tap, rng)
            done.append(change.__name__)
    return "+".join(done)
