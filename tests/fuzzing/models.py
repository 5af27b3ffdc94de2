"""Original models of every kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from common import Base, Message
from protobufs import serialized
from weights import weights_bases

from transfer.graph import dtype_of, split_tensor_name, static_shape


def make_bases(root: Path, wild: Path | None) -> list[Base]:
    """Make small models of every kind, and collect those from the wild."""
    import tensorflow as tf

    bases = [*_made_bases(root), *weights_bases(root)]
    if wild is not None:
        bases += _wild_bases(wild)
    tf.keras.backend.clear_session()
    return bases


def _made_bases(root: Path) -> Iterator[Base]:
    import tensorflow as tf
    from google.protobuf import text_format
    from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    from transfer import Card, save_meta_graph
    from transfer.vgg import architectures

    tf1 = tf.compat.v1
    tiny = architectures.Architecture(blocks=((4,), (4, 8)), fc=16, image_size=16)
    shape, data = (2, 16, 16, 3), ".data-00000-of-00001"

    def rewrite(path: Path, message: Message) -> None:
        path.write_bytes(serialized(message.FromString(path.read_bytes())))

    for name, convolutional, use_resource in (("dense", False, False), ("conv", True, True)):
        options = {"convolutional": convolutional, "use_resource": use_resource}
        prefix = root / name / "tiny"
        values = architectures.random_weights(tiny, 10, convolutional=convolutional)
        card = Card(input="images:0", tap="fc7:0", image_size=16, preprocess="unit")
        save_meta_graph(architectures.build_graph(tiny, 10, **options), prefix, values, card)
        rewrite(prefix.with_name("tiny.meta"), MetaGraphDef)
        base = Base("meta", name, prefix.parent, "tiny", ("tiny.meta",), "fc7", "images", shape)
        yield base
        yield replace(base, kind="index", targets=("tiny.index",))
        yield replace(base, kind="data", targets=(f"tiny{data}",))
        yield replace(base, kind="card", targets=("tiny.json",), input=None)

        graph = architectures.build_graph(tiny, 10, **options)
        with graph.as_default(), tf1.Session() as session:
            for variable in tf1.global_variables():
                variable.load(values[variable.op.name], session)
            frozen = tf1.graph_util.convert_variables_to_constants(
                session, graph.as_graph_def(), ["prob"]
            )
            exported = root / f"{name}-exported"
            tensors = {n: graph.get_tensor_by_name(f"{n}:0") for n in ("images", "prob")}
            tf1.saved_model.simple_save(
                session, str(exported), {"x": tensors["images"]}, {"y": tensors["prob"]}
            )
        files = ("saved_model.pb", "variables/variables.index", f"variables/variables{data}")
        rewrite(exported / files[0], SavedModel)
        yield Base("savedmodel", name, exported, ".", files, "fc7", "images", shape)
        folder = root / f"{name}-frozen"
        folder.mkdir()
        (folder / "tiny.pb").write_bytes(serialized(frozen))
        yield Base("pb", name, folder, "tiny.pb", ("tiny.pb",), "fc7", "images", shape)
        folder = root / f"{name}-text"
        folder.mkdir()
        (folder / "tiny.pbtxt").write_text(text_format.MessageToString(frozen))
        yield Base("pbtxt", name, folder, "tiny.pbtxt", ("tiny.pbtxt",), "fc7", "images", shape)

        if name == "dense":  # V1 checkpoint format
            folder = root / "dense-v1"
            with graph.as_default(), tf1.Session() as session:
                for variable in tf1.global_variables():
                    variable.load(values[variable.op.name], session)
                folder.mkdir()
                saver = tf1.train.Saver(write_version=tf1.train.SaverDef.V1)
                saver.save(session, str(folder / "tiny"))
            rewrite(folder / "tiny.meta", MetaGraphDef)
            yield Base("v1", name, folder, "tiny.meta", ("tiny",), "fc7", "images", shape)

    folder = root / "steps"
    folder.mkdir()
    shutil.copy(root / "dense" / "tiny.meta", folder / "tiny.meta")
    for step in (1000, 2000):
        for suffix in (".index", data):
            shutil.copy(root / "dense" / f"tiny{suffix}", folder / f"tiny-{step}{suffix}")
    (folder / "checkpoint").write_text(
        'model_checkpoint_path: "/elsewhere/tiny-2000"\n'
        'all_model_checkpoint_paths: "/elsewhere/tiny-1000"\n'
    )
    yield Base("state", "steps", folder, "tiny", ("checkpoint",), "fc7", "images", shape)

    class Module(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            start = tf.random.stateless_normal((3, 3, 3, 4), (0, 0))
            self.kernel = tf.Variable(start, name="kernel")
            self.bias = tf.Variable(tf.zeros(4), name="bias")

        @tf.function(input_signature=[tf.TensorSpec((None, 16, 16, 3), tf.float32, "images")])
        def __call__(self, images: tf.Tensor) -> tf.Tensor:
            net = tf.nn.bias_add(tf.nn.conv2d(images, self.kernel, 2, "SAME"), self.bias)
            net = tf.cond(tf.size(net) > 0, lambda: tf.nn.relu(net), lambda: net)
            return tf.reduce_mean(net, (1, 2))

    exported = root / "module"
    tf.saved_model.save(Module(), str(exported))
    rewrite(exported / files[0], SavedModel)
    tap, input = "StatefulPartitionedCall", "serving_default_images"
    yield Base("savedmodel", "module", exported, ".", files, tap, input, shape)


def _wild_bases(wild: Path) -> Iterator[Base]:
    from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef

    for case in json.loads((wild / "cases.json").read_text()):
        folder, prefix = wild / case["case"], case["prefix"]
        meta = MetaGraphDef.FromString((folder / f"{prefix}.meta").read_bytes())
        input = case["input"]
        shape, dtype = (2, 28, 28, 1), "float32"
        if input is not None:
            operation, index = split_tensor_name(input)
            node = next(node for node in meta.graph_def.node if node.name == operation)
            known = static_shape(node, index)
            if known:
                shape = (known[0] or 2, *(size or 28 for size in known[1:]))
            found = dtype_of(node, index)
            dtype = found.name if found is not None else dtype
        path, tap, feeds = f"{prefix}.meta", case["tap"], case["feeds"]
        base = Base("meta", case["case"], folder, path, (path,), tap, input, shape, dtype, feeds)
        base = replace(base, complete=case["weights"])
        yield base
        if (folder / "graph.pbtxt").is_file():
            text = ("graph.pbtxt",)
            yield replace(base, kind="pbtxt", path=text[0], targets=text, complete=False)
        if not case["weights"]:
            continue
        if (folder / f"{prefix}.index").is_file():
            yield replace(base, kind="index", targets=(f"{prefix}.index",))
            data = sorted(path.name for path in folder.glob(f"{prefix}.data-*"))
            yield replace(base, kind="data", targets=tuple(data))
        else:
            yield replace(base, kind="v1", targets=(prefix,))
