"""Open graphs in all formats that TensorFlow has written."""

import os
import re
import shutil

import keras
import numpy as np
import pytest
import strangers
import tensorflow as tf
from conftest import StockSession, save_vgg
from google.protobuf import text_format
from stock import assert_close, images
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from transfer import Backbone, load_meta_graph
from transfer.core import wire
from transfer.graph import ancestors
from transfer.models import formats
from transfer.models.formats import open_model

tf1 = tf.compat.v1
TWO = np.array([[2.0]], np.float32)


@pytest.fixture
def meta(tmp_path):
    """Prefix of a meta graph in its own folder."""
    return save_vgg(tmp_path / "vgg" / "model.ckpt-1000")


def frozen_graph(prefix):
    stock = StockSession(prefix)
    return tf1.graph_util.convert_variables_to_constants(
        stock.session, stock.graph.as_graph_def(), ["prob"]
    )


@pytest.fixture
def frozen(meta):
    """A frozen graph in its own folder."""
    path = meta.parents[1] / "frozen" / "inception.v1.pb"
    path.parent.mkdir()
    path.write_bytes(frozen_graph(meta).SerializeToString())
    return path


@pytest.mark.parametrize("suffix", ["", ".meta", ".index", ".data-00000-of-00001", ".json"])
def test_meta_graph_opens_by_any_of_its_files(meta, suffix):
    found = open_model(meta.with_name(meta.name + suffix))
    assert (found.format, found.prefix, found.checkpoint_prefix) == ("meta graph", meta, meta)
    assert "fc7" in {node.name for node in found.meta.graph_def.node}


def save(prefix, **saver_args):
    with tf.Graph().as_default(), tf1.Session() as session:
        w = tf1.get_variable("w", initializer=[[1.0, 2.0]], use_resource=False)
        b = tf1.get_variable("b", initializer=[3.0, 4.0], use_resource=False)
        x = tf1.placeholder(tf.float32, [None, 1], name="x")
        tf.add(tf.matmul(x, w), b, name="tap")
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver(**saver_args).save(session, str(prefix))
    return prefix


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
def test_v1_checkpoint_is_found(tmp_path, sharded):
    prefix = save(tmp_path / "m", write_version=1, sharded=sharded)
    file = tmp_path / ("m-00000-of-00001" if sharded else "m")
    assert file.is_file()
    for path in (prefix, file, tmp_path / "m.meta", tmp_path):
        found = open_model(path)
        assert (found.prefix, found.checkpoint_prefix) == (prefix, prefix), path
    assert Backbone(load_meta_graph(file), tap="tap")(TWO).numpy().tolist() == [[5.0, 8.0]]


def test_meta_graph_in_text_format_is_read(meta):
    path = meta.with_name(meta.name + ".meta")
    binary = open_model(path)
    path.write_text(text_format.MessageToString(binary.meta))
    assert open_model(path) == binary


def test_meta_graph_without_checkpoint_is_read(meta):
    for path in meta.parent.iterdir():
        if path.suffix != ".meta":
            path.unlink()
    assert open_model(meta).checkpoint_prefix is None


def test_folder_with_one_model_is_opened(meta):
    assert open_model(meta.parent).prefix == meta


def test_state_file_chooses_among_steps(tmp_path):
    for step in (1000, 2000, 3000):
        save(tmp_path / f"model.ckpt-{step}")
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/old/run/model.ckpt-2000"\n')
    found = open_model(tmp_path)
    assert found.prefix == found.checkpoint_prefix == tmp_path / "model.ckpt-2000"
    (tmp_path / "checkpoint").unlink()
    with pytest.raises(ValueError, match="holds 3 graphs"):
        open_model(tmp_path)


def test_a_state_file_does_not_choose_between_models(tmp_path):
    for name in ("cats-10", "dogs-10"):
        save(tmp_path / name)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "dogs-10"\n')
    with pytest.raises(ValueError, match=r"holds 2 graphs \(cats-10.meta, dogs-10.meta\)"):
        open_model(tmp_path)


def test_checkpoint_without_meta_graph_is_reported(tmp_path):
    save(tmp_path / "m", write_version=2)
    (tmp_path / "m.meta").unlink()
    for path in ("m", "m.index", "m.data-00000-of-00001"):
        with pytest.raises(FileNotFoundError, match="no network, put its .meta beside it"):
            open_model(tmp_path / path)


@pytest.mark.parametrize("name", ["my vgg.h5", "vgg.weights.h5", "vgg.onnx", "vgg.pth", "vgg.npz",
                                  "vgg.weights", "vgg.index", "model.json"])  # fmt: skip
def test_file_of_weights_names_the_command_that_converts_it(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"weights")
    command = f"vgg-transfer convert '?{re.escape(str(path))}'? --out models/"
    with pytest.raises(FileNotFoundError, match=command):
        open_model(path)


def test_missing_model_is_reported(tmp_path):
    save(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no meta graph .*graphs in that folder: other"):
        open_model(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="graphs in that folder: none"):
        open_model(tmp_path / "no" / "such" / "folder")


@pytest.mark.parametrize("path", ["", "inception.v1.pb", "inception.v1"])
def test_frozen_graph_opens_by_any_of_its_paths(frozen, path):
    found = open_model(frozen.parent / path)
    assert (found.format, found.checkpoint_prefix) == ("frozen graph", None)
    assert found.prefix == frozen.with_suffix("")
    assert "fc7" in {node.name for node in found.meta.graph_def.node}


@pytest.mark.parametrize("name", ["graph.pb", "graph.pbtxt"])
def test_frozen_graph_in_text_format_is_read(frozen, name):
    binary = open_model(frozen)
    path = frozen.parent / "text" / name
    path.parent.mkdir()
    path.write_text(text_format.MessageToString(binary.meta.graph_def))
    for given in (path, path.parent, path.with_suffix("")):
        assert open_model(given).meta == binary.meta


def test_checkpoint_beside_frozen_graph_is_used(tmp_path):
    """As written by ``tf.train.write_graph`` and a saver."""
    prefix = save(tmp_path / "m")
    meta = open_model(prefix).meta
    (tmp_path / "m.meta").unlink()
    (tmp_path / "m.pbtxt").write_text(text_format.MessageToString(meta.graph_def))
    found = open_model(tmp_path)
    assert (found.format, found.checkpoint_prefix) == ("frozen graph", prefix)
    assert Backbone(load_meta_graph(tmp_path), tap="tap")(TWO).numpy().tolist() == [[5.0, 8.0]]


def test_meta_graph_takes_precedence_over_frozen_graph(meta, frozen):
    shutil.copy(frozen, meta.parent)
    assert open_model(meta.parent).format == "meta graph"


NAMES = pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("m.meta", "meta graph"),
        ("m.pb", "frozen graph"),
        ("m.pbtxt", "frozen graph"),
        ("saved_model.pb", "SavedModel"),
    ],
)


@NAMES
def test_empty_file_is_rejected(tmp_path, name, kind):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"is empty; expected a {kind}"):
        open_model(tmp_path / name)


@NAMES
def test_git_lfs_pointer_is_reported(tmp_path, name, kind):
    (tmp_path / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )
    with pytest.raises(ValueError, match="is a pointer of Git LFS, .* git lfs pull"):
        open_model(tmp_path / name)


@NAMES
def test_a_file_that_is_too_large_is_not_read(tmp_path, name, kind):
    path = tmp_path / name
    with path.open("wb") as file:
        os.truncate(file.fileno(), 2**40)
    with pytest.raises(ValueError, match=f"has 1,099,511,627,776 bytes; a {kind} has at most"):
        open_model(path)


@NAMES
@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_are_rejected(tmp_path, name, kind, seed):
    (tmp_path / name).write_bytes(np.random.default_rng(seed).bytes(1000))
    with pytest.raises(ValueError, match=f"is not a {kind}"):
        open_model(tmp_path / name)


@NAMES
@pytest.mark.parametrize("text", ["{}", "node {", "<html>404 Not Found</html>", "node { op: 3 }"])
def test_other_text_files_are_rejected(tmp_path, name, kind, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"is not a {kind}"):
        open_model(tmp_path / name)


@pytest.mark.parametrize(
    "field", [b"\x12\x02\x0a\x00", b"\x12\x06\x0a\x04\x1a\x00\x1a\x00", b"\x22\x00"]
)
def test_small_file_of_empty_messages_is_refused_before_it_is_parsed(tmp_path, monkeypatch, field):
    """Two bytes in the file take over a hundred in memory."""
    path = tmp_path / "m.meta"
    path.write_bytes(field * (10_000_000 // len(field)))
    monkeypatch.setattr(wire, "MAX_FIELDS", 100_000)
    monkeypatch.setattr(MetaGraphDef, "FromString", lambda content: pytest.fail("parsed"))
    with pytest.raises(ValueError, match="m.meta' is not a meta graph: it has over 100,000 fields"):
        load_meta_graph(path)


def fields_of(message):
    """Number of fields of a serialized message, counted by protobuf."""
    total = 0
    for field, value in message.ListFields():
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        values = [value] if not hasattr(value, "append") and not is_map else list(value)
        packed = not field.message_type and field.type not in (field.TYPE_BYTES, field.TYPE_STRING)
        total += 1 if packed else len(values) + 2 * is_map * len(values)
        for part in [value[key] for key in values] if is_map else values:
            total += fields_of(part) if hasattr(part, "ListFields") else 0
    return total


def test_field_count_equals_that_of_protobuf(meta):
    content = meta.with_name(meta.name + ".meta").read_bytes()
    expected = fields_of(MetaGraphDef.FromString(content))
    assert wire.count_fields(content, MetaGraphDef.DESCRIPTOR) == expected > 1000


def test_too_large_text_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_TEXT_BYTES", 100)
    (tmp_path / "m.pbtxt").write_text("node { op: 'NoOp' name: 'a' }\n" * 10)
    with pytest.raises(ValueError, match="has 300 bytes of text; at most 100 are read"):
        open_model(tmp_path / "m.pbtxt")


# SavedModels, compared with TensorFlow's loader.


def served(folder, x):
    """Outputs of its signature, name to value."""
    signature = tf.saved_model.load(str(folder)).signatures["serving_default"]
    (argument,) = signature.structured_input_signature[1]
    return {k: v.numpy() for k, v in signature(**{argument: tf.constant(x)}).items()}


def assert_serves(folder, x):
    """A layer for each output, by name, which equals that of the served model."""
    graph = load_meta_graph(folder)
    assert graph.format == "SavedModel"
    signature = graph.meta.signature_def["serving_default"]
    (input,) = (info.name for info in signature.inputs.values())
    backbones = {}
    for name, expected in served(folder, x).items():
        tap = signature.outputs[name].name
        assert tap in graph.outputs
        backbones[name] = Backbone(graph, tap=tap, input=input, pooling=None)
        assert_close(backbones[name](x), expected, name)
        assert backbones[name].trainable_variables
    return backbones


def save_simple(folder):
    with tf.Graph().as_default(), tf1.Session() as session:
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        w = tf1.get_variable("w", [4, 3], use_resource=False)
        y = tf.nn.relu(tf.matmul(x, w) + 1.0, name="y")
        session.run(tf1.global_variables_initializer())
        tf1.saved_model.simple_save(session, str(folder), {"images": x}, {"features": y})
    return folder


def test_tensorflow_1_saved_model_is_read(tmp_path):
    folder = save_simple(tmp_path / "saved")
    found = open_model(folder)
    assert (found.format, found.prefix) == ("SavedModel", folder)
    assert found.checkpoint_prefix == folder / "variables" / "variables"
    assert_serves(folder, images(3, 4))


def test_saved_model_opens_by_its_file(tmp_path):
    folder = save_simple(tmp_path / "saved")
    assert open_model(folder / "saved_model.pb") == open_model(folder)


def test_saved_model_in_text_format_is_read(tmp_path):
    folder = save_simple(tmp_path / "saved")
    binary = open_model(folder)
    message = SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    (folder / "saved_model.pb").unlink()
    (folder / "saved_model.pbtxt").write_text(text_format.MessageToString(message))
    assert open_model(folder) == binary == open_model(folder / "saved_model.pbtxt")


@pytest.mark.parametrize("tags", [["serve"], ["train"]])
def test_serving_graph_of_saved_model_is_used(tmp_path, tags):
    builder = tf1.saved_model.Builder(str(tmp_path / "saved"))
    for number, tag in enumerate(["train", *tags]):
        with tf.Graph().as_default(), tf1.Session() as session:
            tf1.get_variable(f"v{number}", [1])
            session.run(tf1.global_variables_initializer())
            if number == 0:
                builder.add_meta_graph_and_variables(session, [tag])
            else:
                builder.add_meta_graph([tag, *["gpu"] * (tag == "train")])
    builder.save()
    if tags == ["serve"]:
        names = {node.name for node in open_model(tmp_path / "saved").meta.graph_def.node}
        assert "v1" in names
    else:
        with pytest.raises(ValueError, match="holds 2 graphs, tagged train, .*train.*expected one"):
            open_model(tmp_path / "saved")


class Dense(tf.Module):
    def __init__(self, inputs, outputs, seed, name=None):
        super().__init__(name)
        self.w = tf.Variable(images(inputs, outputs, seed=seed), name="w")

    def __call__(self, x):
        return tf.nn.relu(tf.matmul(x, self.w) + 0.1)


class Model(tf.Module):
    """Variables in lists, in dictionaries and in modules within modules; names that collide."""

    def __init__(self):
        super().__init__()
        self.layers = [Dense(4, 5, 1, "same"), Dense(5, 5, 2, "same")]
        self.biases = {"first/one": tf.Variable(images(5, seed=3)), ".odd_": tf.Variable(2.0)}
        self.nested = tf.Module()
        self.nested.deep = {"list": [tf.Variable(images(5, 3, seed=4), name="a/b")]}
        self.shared = self.layers[0]

    @tf.function(input_signature=[tf.TensorSpec([None, 4], name="pixels")])
    def serve(self, x):
        h = self.layers[1](self.shared(x)) + self.biases["first/one"] * self.biases[".odd_"]
        return {"features": h, "logits": tf.matmul(h, self.nested.deep["list"][0])}


def test_saved_model_of_tf_modules_equals_program(tmp_path):
    model = Model()
    tf.saved_model.save(model, str(tmp_path / "saved"), signatures=model.serve)
    backbones = assert_serves(tmp_path / "saved", images(3, 4))
    assert backbones.keys() == {"features", "logits"}
    shapes = sorted(tuple(v.shape) for v in backbones["logits"].graph_variables)
    assert shapes == [(), (4, 5), (5,), (5, 3), (5, 5)]


def test_gradients_of_saved_model_equal_those_of_program(tmp_path):
    model = Model()
    tf.saved_model.save(model, str(tmp_path / "saved"), signatures=model.serve)
    graph = load_meta_graph(tmp_path / "saved")
    signature = graph.meta.signature_def["serving_default"]
    backbone = Backbone(graph, tap=signature.outputs["logits"].name)
    x = tf.constant(images(3, 4))
    gradients = []
    for apply, variables in (
        (lambda: backbone(x), [v.value for v in backbone.graph_variables]),
        (lambda: model.serve(x)["logits"], model.trainable_variables),
    ):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(apply()))
        found = tape.gradient(loss, variables)
        gradients.append(sorted((g.numpy() for g in found), key=lambda g: (g.shape, g.sum())))
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs)


def test_saved_model_can_be_saved_again_after_training(tmp_path):
    """Values are read from the checkpoint, not from the traced graph."""
    model = Model()
    model.serve(images(1, 4))
    for variable in model.trainable_variables:
        variable.assign(variable * 2.0)
    tf.saved_model.save(model, str(tmp_path / "saved"), signatures=model.serve)
    assert_serves(tmp_path / "saved", images(3, 4))


def test_saved_model_with_conditionals_equals_program(tmp_path):
    class Conditional(tf.Module):
        def __init__(self):
            super().__init__()
            self.w = tf.Variable(images(4, 4), name="w")
            self.v = tf.Variable(images(4, 4, seed=2), name="v")

        @tf.function(input_signature=[tf.TensorSpec([None, 4])])
        def serve(self, x):
            return tf.cond(
                tf.reduce_sum(x) > 0.0,
                lambda: tf.matmul(x, self.w),
                lambda: tf.nn.relu(tf.matmul(x, self.v)) + 1.0,
            )

    model = Conditional()
    tf.saved_model.save(model, str(tmp_path / "saved"), signatures=model.serve)
    for sign in (1, -1):
        assert_serves(tmp_path / "saved", sign * np.abs(images(3, 4)))


def keras_model():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )


def trained(model):
    """Far from its initial values, statistics included."""
    for variable in model.variables:
        if variable.dtype == "float32":
            variable.assign(np.abs(images(*variable.shape, seed=1)) * 0.3)
    return model


@pytest.mark.parametrize("how", ["export", "save"])
def test_keras_saved_model_equals_program(tmp_path, how):
    model = trained(keras_model())
    if how == "export":
        model.export(tmp_path / "saved", verbose=False)
    else:
        serve = tf.function(lambda x: model(x, training=False), autograph=False)
        signature = serve.get_concrete_function(tf.TensorSpec([None, 8, 8, 3], name="pictures"))
        tf.saved_model.save(model, str(tmp_path / "saved"), signatures=signature)
    x = np.abs(images(3, 8, 8, 3))
    (backbone,) = assert_serves(tmp_path / "saved", x).values()
    assert_close(backbone(x), model(x))
    frozen = {tuple(v.shape) for v in backbone.graph_variables if not v.trainable}
    assert frozen == {(4,)}
    assert len(backbone.trainable_weights) == len(model.trainable_weights)


def test_inner_layer_of_keras_saved_model_can_be_tapped(tmp_path):
    model = trained(keras_model())
    model.export(tmp_path / "saved", verbose=False)
    x = np.abs(images(3, 8, 8, 3))
    graph = load_meta_graph(tmp_path / "saved")
    served = ancestors(graph.nodes.values(), graph.outputs[0])
    (tanh,) = [node.name for node in served if node.op == "Tanh"]
    expected = keras.Sequential(model.layers[:-1])(x)
    assert_close(Backbone(graph, tap=tanh)(x), expected)


def test_saved_model_without_variables_is_read(tmp_path):
    model = tf.Module()
    model.serve = tf.function(lambda x: tf.exp(x), [tf.TensorSpec([None, 4])], autograph=False)
    tf.saved_model.save(model, str(tmp_path / "saved"), signatures=model.serve)
    graph = load_meta_graph(tmp_path / "saved")
    x = images(3, 4)
    assert_close(Backbone(graph, tap=graph.outputs[0])(x), np.exp(x))


def test_saved_model_with_missing_weights_is_reported(tmp_path):
    folder = save_simple(tmp_path / "saved")
    shutil.rmtree(folder / "variables")
    graph = load_meta_graph(folder)
    with pytest.raises(FileNotFoundError, match="no checkpoint .*expected variables.index with"):
        Backbone(graph, tap="y")


def test_folder_without_model_is_rejected(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match=r"holds 0 graphs \(none\); expected one"):
        open_model(tmp_path)


@pytest.mark.parametrize("path", ["", ".meta", ".index", ".data-00000-of-00001"])
def test_files_without_stem_belong_to_their_folder(tmp_path, path):
    """As written by ``saver.save(session, "model/")``."""
    prefix = strangers.save(strangers.vectors, f"{tmp_path}/model/")
    assert (tmp_path / "model" / ".meta").is_file()
    graph = load_meta_graph(tmp_path / "model" / path)
    assert graph.checkpoint_prefix == graph.prefix == tmp_path / "model"
    x = images(3, 256)
    with tf.Graph().as_default(), tf1.Session() as session:
        tf1.train.import_meta_graph(f"{prefix}.meta").restore(session, prefix)
        expected = session.run("fc7/relu:0", {"images:0": x})
    assert_close(Backbone(graph, "fc7/relu")(x), expected)
    (tmp_path / "model" / ".data-00000-of-00001").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks its data: \.data-00000-of-00001"):
        Backbone(graph, "fc7/relu")


def test_weights_in_a_folder_without_a_graph_lead_to_convert(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(FileNotFoundError, match=r"To use its model\.safetensors, convert it first"):
        open_model(tmp_path)
