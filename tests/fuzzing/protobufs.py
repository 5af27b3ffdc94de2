"""Change protobufs at random places; find and make parts of graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from common import Generator, Message, pick

INTEGERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**40, 2**63 - 1)


FLOATS = (0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), float("-inf"))


STRINGS = ("", "^", ":", "x:0:0", "a//b", "../../etc/passwd", "\0", "é", "x:-1", "N" * 10000)


DTYPES = (0, 1, 2, 3, 4, 7, 8, 9, 10, 14, 19, 20, 21, 23, 63, 101, 107, 120, 121, 4096)


_SHAPES = ([2**40], [2**20] * 2, [2**31] * 3, [-1], [-5, 2], [0], [1] * 300, [2**62, 2], [])


def _messages(message: Message, depth: int = 0) -> Iterator[Message]:
    """A message and its submessages; of long repeated fields, the first ones."""
    yield message
    for descriptor, value in message.ListFields() if depth < 12 else ():
        if descriptor.message_type is None:
            continue
        if descriptor.message_type.GetOptions().map_entry:
            inner = [value[key] for key in sorted(value)]
            inner = [item for item in inner if hasattr(item, "ListFields")]
        else:
            inner = list(value) if _repeated(value) else [value]
        for item in inner[:300]:
            yield from _messages(item, depth + 1)


def _repeated(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str | bytes)


def some_field(message: Message, rng: Generator) -> str:
    """Give a random field an extreme value of its type, remove it or repeat it."""
    inner = pick((m for m in _messages(message) if m.DESCRIPTOR.fields), rng)
    descriptor = pick(inner.DESCRIPTOR.fields, rng)
    value = getattr(inner, descriptor.name)
    name = f"{inner.DESCRIPTOR.name}.{descriptor.name}"
    try:
        if rng.random() < 0.15:
            inner.ClearField(descriptor.name)
        elif descriptor.message_type is not None:
            if _repeated(value) and len(value) and hasattr(value, "extend"):
                value.extend([pick(value, rng)] * int(rng.integers(1, 5)))
            elif not _repeated(value):
                value.SetInParent()
        elif _repeated(value) and hasattr(value, "append"):
            value.append(_scalar(descriptor, rng))
        else:
            setattr(inner, descriptor.name, _scalar(descriptor, rng))
    except (ValueError, TypeError, AttributeError):  # outside the field's range
        inner.ClearField(descriptor.name)
    return name


def _scalar(descriptor: Any, rng: Generator) -> Any:
    if descriptor.cpp_type in (descriptor.CPPTYPE_FLOAT, descriptor.CPPTYPE_DOUBLE):
        return pick(FLOATS, rng)
    if descriptor.cpp_type == descriptor.CPPTYPE_BOOL:
        return bool(rng.integers(2))
    if descriptor.cpp_type == descriptor.CPPTYPE_ENUM:
        return int(pick(DTYPES, rng))
    if descriptor.cpp_type == descriptor.CPPTYPE_STRING:
        text = pick(STRINGS, rng)
        return text.encode() if descriptor.type == descriptor.TYPE_BYTES else text
    return int(pick(INTEGERS, rng))


def operation_of(edge: str) -> str:
    return edge.lstrip("^").rpartition(":")[0] or edge.lstrip("^")


def _upstream(graph: Message, tap: str) -> list[Message]:
    """The nodes that a tap depends on, in which changes have an effect."""
    nodes = {node.name: node for node in graph.node}
    reached, pending = {}, [tap]
    while pending:
        edge = pending.pop()
        for name in (edge, operation_of(edge)):
            if name in nodes and name not in reached:
                reached[name] = nodes[name]
                pending += nodes[name].input
    return list(reached.values())


def pick_node(graph: Message, tap: str, rng: Generator, op: str = "", arity: int = 0) -> Message:
    """A random node, usually upstream of the tap, rarely in a function."""
    bodies = [function.node_def for function in graph.library.function if function.node_def]
    nodes = list(pick(bodies, rng) if bodies and rng.random() < 0.5 else graph.node)
    if rng.random() < 0.8:
        nodes = _upstream(graph, tap) or nodes
    fitting = [node for node in nodes if op in node.op and len(node.input) >= arity]
    return pick(fitting or nodes or [graph.node.add(name="x", op="NoOp")], rng)


def wire(graph: Message, tap: str, node: Message, rng: Generator) -> None:
    """Insert a node into an edge upstream of the tap; the source of the edge becomes its input
    0."""
    user = pick_node(graph, tap, rng, arity=1)
    if not user.input:
        return
    position = int(rng.integers(len(user.input)))
    node.input.insert(0, user.input[position].lstrip("^"))
    user.input[position] = node.name
    graph.node.append(node)


def new_node(graph: Message, name: str, op: str, inputs: Sequence[str] = (), **types: int) -> Any:
    node = type(graph)().node.add(name=name, op=op, input=inputs)
    for key, value in types.items():
        node.attr[key].type = value
    return node


def add_constant(graph: Message, name: str, values: Sequence[int], dtype: int = 9) -> str:
    """Add a Const of int64, or zeros of int32 or float32."""
    node = graph.node.add(name=name, op="Const")
    node.attr["dtype"].type = dtype
    tensor = node.attr["value"].tensor
    tensor.dtype = dtype
    tensor.tensor_shape.dim.add(size=len(values))
    {9: tensor.int64_val, 3: tensor.int_val, 1: tensor.float_val}[dtype].extend(values)
    return name


def free_scope(graph: Message) -> str:
    """An unused name."""
    return f"fuzz{len(graph.node)}_{len(graph.library.function)}"


def change_shape(shape: Message, rng: Generator) -> None:
    del shape.dim[:]
    shape.unknown_rank = bool(rng.random() < 0.15)
    for size in pick(_SHAPES, rng):
        shape.dim.add(size=size)


def serialized(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)
