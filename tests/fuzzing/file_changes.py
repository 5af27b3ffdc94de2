"""Changes to the contents of model files that keep them parseable."""

from __future__ import annotations

from common import Base, Generator, Message, pick
from graph_changes import change_graph
from protobufs import STRINGS, serialized, some_field


def change_saver_def(saver_def: Message, graph: Message, rng: Generator) -> str:
    if rng.random() < 0.5:
        return some_field(saver_def, rng)
    saver_def.restore_op_name = pick([*STRINGS, *(node.name for node in graph.node)], rng)
    return "SaverDef.restore_op_name"


def change_collections(meta: Message, rng: Generator) -> str:
    for name in sorted(meta.collection_def):
        if rng.random() < 0.5:
            values = meta.collection_def[name]
            if values.bytes_list.value and rng.random() < 0.5:
                values.bytes_list.value[0] = rng.bytes(20)
            elif rng.random() < 0.3:
                values.node_list.value.append(pick(STRINGS, rng))
            else:
                some_field(values, rng)
    return "collections"


def change_meta(content: bytes, base: Base, rng: Generator) -> tuple[bytes, str]:
    from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef

    meta = MetaGraphDef.FromString(content)
    choice = rng.random()
    if choice < 0.1:
        done = change_saver_def(meta.saver_def, meta.graph_def, rng)
    elif choice < 0.15:
        done = some_field(meta, rng)
    elif choice < 0.2:
        done = change_collections(meta, rng)
    else:
        done = change_graph(meta.graph_def, base.tap, rng)
    return serialized(meta), done


def change_pb(content: bytes, base: Base, rng: Generator) -> tuple[bytes, str]:
    from tensorflow.core.framework.graph_pb2 import GraphDef

    graph = GraphDef.FromString(content)
    done = change_graph(graph, base.tap, rng)
    return serialized(graph), done


def change_pbtxt(content: bytes, base: Base, rng: Generator) -> tuple[bytes, str]:
    from google.protobuf import text_format
    from tensorflow.core.framework.graph_pb2 import GraphDef

    if rng.random() < 0.2:
        field, depth = pick(("node {", "library {", "node { attr { value { "), rng), 10**5
        nested = {"node {": "attr{value{list{func{attr{value{"}.get(field, field)
        return (field + nested * depth).encode(), "nested"
    graph = text_format.Parse(content.decode(), GraphDef())
    done = change_graph(graph, base.tap, rng)
    return text_format.MessageToString(graph).encode(), done


def change_objects(objects: Message, rng: Generator) -> str:
    """Change the object graph of a TensorFlow 2 program, in a SavedModel or in its checkpoint."""
    if rng.random() < 0.3:
        return some_field(objects, rng)
    if rng.random() < 0.3:  # deeply nested
        for number in range(len(objects.nodes), len(objects.nodes) + 20_000):
            objects.nodes[-1].children.add(node_id=number, local_name="x")
            objects.nodes.add()
        return "objects_nested"
    for node in objects.nodes:
        for child in node.children:
            if rng.random() < 0.5:
                child.node_id = pick((-1, 0, 1, 2, 2**31 - 1), rng)
            if rng.random() < 0.2:
                child.local_name = pick(STRINGS, rng)
    return "objects_changed"


def change_saved_model(content: bytes, base: Base, rng: Generator) -> tuple[bytes, str]:
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    model = SavedModel.FromString(content)
    meta = model.meta_graphs[0]
    choice = rng.random()
    if choice < 0.1:
        done = change_saver_def(meta.saver_def, meta.graph_def, rng)
    elif choice < 0.2:
        done = some_field(model, rng)
    elif choice < 0.25:
        model.meta_graphs.append(meta)
        done = "graph_twice"
    elif choice < 0.35 and meta.object_graph_def.nodes:
        done = change_objects(meta.object_graph_def, rng)
    elif choice < 0.3:
        meta.meta_info_def.tags[:] = pick(([], ["train"], ["\0"], ["serve"] * 1000), rng)
        done = "tags"
    else:
        done = change_graph(meta.graph_def, base.tap, rng)
    return serialized(model), done
