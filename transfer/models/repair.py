"""Repair meta graphs so that ``tf.compat.v1.train.import_meta_graph`` accepts them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from google.protobuf.message import DecodeError
from tensorflow.core.framework.variable_pb2 import VariableDef
from tensorflow.core.protobuf.control_flow_pb2 import CondContextDef, WhileContextDef
from tensorflow.core.protobuf.meta_graph_pb2 import CollectionDef, MetaGraphDef
from tensorflow.core.protobuf.queue_runner_pb2 import QueueRunnerDef

from transfer.graph import operation_of


def _of_variable(value: bytes) -> Iterable[str]:
    proto = VariableDef.FromString(value)
    return proto.variable_name, proto.initializer_name, proto.snapshot_name


def _of_queue_runner(value: bytes) -> Iterable[str]:
    proto = QueueRunnerDef.FromString(value)
    return proto.queue_name, proto.close_op_name, proto.cancel_op_name, *proto.enqueue_op_name


def _of_cond(value: bytes) -> Iterable[str]:
    proto = CondContextDef.FromString(value)
    return proto.pred_name, proto.pivot_name, *proto.values_def.values


def _of_while(value: bytes) -> Iterable[str]:
    proto = WhileContextDef.FromString(value)
    return proto.pivot_name, *proto.loop_exit_names, *proto.values_def.values


# Collection name to a function that returns the names an entry refers to.
_REFERENCES: dict[str, Callable[[bytes], Iterable[str]]] = {
    "queue_runners": _of_queue_runner,
    "cond_context": _of_cond,
    "while_context": _of_while,
}


def unresolved(meta: MetaGraphDef) -> list[str]:
    """References of collections to operations that the graph does not have, as
    ``collection: name``."""
    operations = {node.name for node in meta.graph_def.node}
    return [
        f"{key}: {name}"
        for key, collection in meta.collection_def.items()
        for _, missing in _entries(key, collection, operations)
        for name in missing
    ]


def variables_of(meta: MetaGraphDef, collections: Iterable[str]) -> set[str]:
    """Names of the variables in the given collections."""
    names = set()
    for key in collections:
        for value in (
            meta.collection_def[key].bytes_list.value if key in meta.collection_def else ()
        ):
            for name in list(_references(_of_variable, value))[:1]:
                names.add(operation_of(name))
    return names


def repaired(meta: MetaGraphDef) -> MetaGraphDef:
    """A copy without devices and without collection entries that do not resolve.

    ``import_meta_graph`` rejects graphs pinned to unavailable devices, and graphs with unresolvable
    collections, as TFLearn writes them. It imports the complete program with all its operations:
    run it only if you trust its source.
    """
    copy = MetaGraphDef()
    copy.CopyFrom(meta)
    for node in copy.graph_def.node:
        node.device = ""
    operations = {node.name for node in copy.graph_def.node}
    for key, collection in meta.collection_def.items():
        kept = [value for value, missing in _entries(key, collection, operations) if not missing]
        kind = collection.WhichOneof("kind")
        if kind == "node_list":
            copy.collection_def[key].node_list.value[:] = kept
        elif kind == "bytes_list":
            copy.collection_def[key].bytes_list.value[:] = kept
    return copy


def _entries(
    key: str, collection: CollectionDef, operations: set[str]
) -> list[tuple[str | bytes, list[str]]]:
    """Each entry of a node list or bytes list, with the unresolved names that it refers to."""
    if collection.WhichOneof("kind") == "node_list":
        names: list[tuple[str | bytes, Iterable[str]]] = [
            (value, [value]) for value in collection.node_list.value
        ]
    elif collection.WhichOneof("kind") == "bytes_list":
        refers = _REFERENCES.get(key, _of_variable if "variables" in key else lambda _: ())
        names = [(value, _references(refers, value)) for value in collection.bytes_list.value]
    else:
        return []
    return [
        (value, [n for n in referred if n and operation_of(n) not in operations])
        for value, referred in names
    ]


def _references(refers: Callable[[bytes], Iterable[str]], value: bytes) -> Iterable[str]:
    try:
        return refers(value)
    except DecodeError:
        return ["(what cannot be read)"]
