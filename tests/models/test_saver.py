import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import NUM_CLASSES, TINY, save_vgg

from transfer import Backbone, Card, load_meta_graph, save_meta_graph
from transfer.vgg import architectures

tf1 = tf.compat.v1


def test_saved_checkpoint_restores_in_plain_tensorflow(tmp_path, stock_session, images):
    values = architectures.random_weights(TINY, NUM_CLASSES)
    save_meta_graph(architectures.build_graph(TINY, NUM_CLASSES), tmp_path / "m", values)
    stock = stock_session(tmp_path / "m")
    np.testing.assert_array_equal(stock.run("fc7/weights:0"), values["fc7/weights"])
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint", "m.data-00000-of-00001", "m.index", "m.meta",
    ]  # fmt: skip


def test_save_records_the_hashes(tmp_path):
    import hashlib

    save_vgg(tmp_path / "m", card=Card(preprocess="unit"))
    card = json.loads((tmp_path / "m.json").read_text())
    assert card["preprocess"] == "unit"
    for name, digest in card["sha256"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    assert len(card["sha256"]) == 3


def test_save_rejects_values_of_wrong_shape(tmp_path):
    values = architectures.random_weights(TINY, NUM_CLASSES)
    del values["fc6/biases"]
    values["fc7/biases"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"no value for fc6/biases; .* fc7/biases \(graph \(32,\)"):
        save_meta_graph(architectures.build_graph(TINY, NUM_CLASSES), tmp_path / "m", values)
    assert not list(tmp_path.iterdir())


W = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}


def small_graph():
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.float32, [None, 2], name="x")
        w, b = (tf1.get_variable(name, v.shape, use_resource=False) for name, v in W.items())
        tf.add(tf.matmul(x, w), b, name="y")
    return graph


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_meta_graph_is_written_once_for_all_steps(tmp_path):
    graph = small_graph()
    for step in (10, 20):
        saved = save_meta_graph(graph, tmp_path / "m", {**W, "b": W["b"] * step}, step=step)
        assert saved == tmp_path / f"m-{step}"
        if step == 10:
            written = (tmp_path / "m.meta").stat().st_mtime_ns
    assert (tmp_path / "m.meta").stat().st_mtime_ns == written
    assert [name for name in files(tmp_path) if name.endswith("meta")] == ["m.meta"]
    with tf.Graph().as_default(), tf1.Session() as session:
        saver = tf1.train.import_meta_graph(str(tmp_path / "m.meta"))
        saver.restore(session, tf.train.latest_checkpoint(str(tmp_path)))
        assert session.run("b:0").tolist() == [20.0] * 3
    graph = load_meta_graph(tmp_path)
    assert graph.checkpoint_prefix == tmp_path / "m-20"


def test_write_meta_graph_false_writes_only_checkpoint(tmp_path):
    options = {"step": 1, "write_meta_graph": False}
    save_meta_graph(small_graph(), tmp_path / "m", W, Card(source="me"), **options)
    assert files(tmp_path) == ["checkpoint", "m-1.data-00000-of-00001", "m-1.index"]


def test_changed_graph_replaces_meta_graph(tmp_path):
    """New values beside an old graph would be read without an error."""
    save_meta_graph(small_graph(), tmp_path / "m", W, step=1)
    graph = small_graph()
    with graph.as_default():
        tf.negative(graph.get_tensor_by_name("y:0"), name="z")
    save_meta_graph(graph, tmp_path / "m", W, step=2)
    assert "z" in load_meta_graph(tmp_path / "m").nodes


def test_write_meta_graph_true_writes_one_per_step(tmp_path, stock_session):
    """Like Saver's: deleted with their step, together with the card; other files are kept."""
    (tmp_path / "m-0.json").write_text('{"figures": "of mine"}')
    options = {"write_meta_graph": True, "max_to_keep": 2}
    for step in range(4):
        values = {**W, "b": W["b"] * step}
        save_meta_graph(small_graph(), tmp_path / "m", values, step=step, **options)
        assert stock_session(tmp_path / f"m-{step}").run("b:0").tolist() == [step] * 3
    shown = [name for name in files(tmp_path) if "data" not in name]
    assert shown == [
        "checkpoint", "m-0.json", "m-2.index", "m-2.meta", "m-3.index", "m-3.meta",
    ]  # fmt: skip
    assert load_meta_graph(tmp_path / "m-2").checkpoint_prefix == tmp_path / "m-2"
    for step in range(4, 7):
        save_meta_graph(
            small_graph(), tmp_path / "m", W, Card(source="me"), step=step, **options
        )  # fmt: skip
    assert [name for name in files(tmp_path) if name.endswith("json")] == [
        "m-0.json", "m-5.json", "m-6.json",
    ]  # fmt: skip
    assert load_meta_graph(tmp_path / "m-6").card.source == "me"


def test_the_card_has_the_hashes_of_all_files_of_a_step(tmp_path):
    for step in (1, 2):
        save_meta_graph(small_graph(), tmp_path / "m", W, Card(), step=step)
        hashes = load_meta_graph(tmp_path / "m.meta").card.sha256
        assert list(hashes) == [f"m-{step}.data-00000-of-00001", f"m-{step}.index", "m.meta"]


@pytest.mark.parametrize("hours", [None, 2.0, 0.5])
def test_retention_equals_tensorflow_saver(tmp_path, monkeypatch, hours):
    """A checkpoint every 50 minutes, four at a time."""
    clock = [1_000_000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    ours, theirs, graph = tmp_path / "ours", tmp_path / "theirs", small_graph()
    with small_graph().as_default() as stock, tf1.Session(graph=stock) as session:
        session.run(tf1.global_variables_initializer())
        saver = tf1.train.Saver(max_to_keep=4, keep_checkpoint_every_n_hours=hours or 10_000)
        theirs.mkdir()
        for step in range(12):
            saver.save(session, str(theirs / "m"), global_step=step, write_meta_graph=False)
            kept = {"max_to_keep": 4, "keep_checkpoint_every_n_hours": hours}
            save_meta_graph(graph, ours / "m", W, step=step, write_meta_graph=False, **kept)
            assert files(ours) == files(theirs), f"after step {step}"
            clock[0] += 50 * 60
    state = [tf.train.get_checkpoint_state(str(folder)) for folder in (ours, theirs)]
    names = [[Path(p).name for p in s.all_model_checkpoint_paths] for s in state]
    assert names[0] == names[1]


def test_unlisted_checkpoints_are_not_deleted(tmp_path):
    save_meta_graph(small_graph(), tmp_path / "other", W, step=1)
    save_meta_graph(small_graph(), tmp_path / "m", W)
    for step in range(3):
        save_meta_graph(small_graph(), tmp_path / "m", W, step=step, max_to_keep=1)
    saved = {name.split(".")[0] for name in files(tmp_path)}
    assert saved == {"checkpoint", "m", "m-2", "other", "other-1"}


def test_the_state_file_has_relative_paths_only(tmp_path):
    save_meta_graph(small_graph(), tmp_path / "m", W, step=1, max_to_keep=3)
    save_meta_graph(small_graph(), tmp_path / "m", W, step=2, max_to_keep=3)
    assert str(tmp_path) not in (tmp_path / "checkpoint").read_text()
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert tf.train.latest_checkpoint(str(moved)) == str(moved / "m-2")


def test_variables_selects_what_is_saved(tmp_path):
    save_meta_graph(small_graph(), tmp_path / "m", {"w": W["w"]}, variables=["w"])
    assert list(tf.train.load_checkpoint(str(tmp_path / "m")).get_variable_to_shape_map()) == ["w"]
    with tf.Graph().as_default() as graph, tf1.Session() as session:
        saver = tf1.train.import_meta_graph(str(tmp_path / "m.meta"))
        session.run(graph.get_operation_by_name("b/Assign"))
        saver.restore(session, str(tmp_path / "m"))
        np.testing.assert_array_equal(session.run("w:0"), W["w"])
    with pytest.raises(ValueError, match="cannot save q: the graph's variables are w, b"):
        save_meta_graph(small_graph(), tmp_path / "m", W, variables=["q"])


def test_saver_in_meta_graph_has_same_options(tmp_path):
    save_meta_graph(
        small_graph(), tmp_path / "m", W, max_to_keep=3, keep_checkpoint_every_n_hours=2
    )  # fmt: skip
    saver = load_meta_graph(tmp_path / "m").meta.saver_def
    assert (saver.max_to_keep, saver.keep_checkpoint_every_n_hours) == (3, 2.0)


def test_saving_does_not_modify_graph(tmp_path):
    graph = small_graph()
    graph.finalize()
    before = graph.as_graph_def(add_shapes=True)
    for step in range(3):
        save_meta_graph(graph, tmp_path / "m", W, step=step)
    assert graph.as_graph_def(add_shapes=True) == before


@pytest.mark.parametrize("use_resource", [False, True])
def test_partitioned_variables_are_saved_as_slices(tmp_path, stock_session, use_resource):
    """Saver restores them as slices of the full variable."""
    parts = tf1.fixed_size_partitioner(2)
    with tf.Graph().as_default() as graph:
        x = tf1.placeholder(tf.float32, [None, 5], name="x")
        w = tf1.get_variable("w", [5, 2], partitioner=parts, use_resource=use_resource)
        tf.matmul(x, tf.convert_to_tensor(w), name="y")
    whole = np.arange(10, dtype=np.float32).reshape(5, 2)
    values = {"w/part_0": whole[:3], "w/part_1": whole[3:]}
    save_meta_graph(graph, tmp_path / "m", values)
    assert tf.train.list_variables(str(tmp_path / "m")) == [("w", [5, 2])]
    images = np.eye(5, dtype=np.float32)
    np.testing.assert_array_equal(stock_session(tmp_path / "m").run("y:0", {"x:0": images}), whole)
    layer = Backbone(load_meta_graph(tmp_path / "m"), tap="y")
    np.testing.assert_array_equal(layer(images), whole)


@pytest.mark.parametrize("use_resource", [False, True])
def test_graph_imported_into_scope_can_be_saved(tmp_path, stock_session, use_resource):
    with tf.Graph().as_default() as graph:
        tf1.get_variable("w", [2, 3], use_resource=use_resource)
    save_meta_graph(graph, tmp_path / "m", W)
    with tf.Graph().as_default() as graph:
        tf1.train.import_meta_graph(str(tmp_path / "m.meta"), import_scope="net")
    save_meta_graph(graph, tmp_path / "scoped", {"net/w": W["w"]})
    restored = stock_session(tmp_path / "scoped")
    with restored.graph.as_default():
        (variable,) = tf1.global_variables()
        np.testing.assert_array_equal(restored.run(variable), W["w"])


def test_variable_of_unknown_shape_can_be_saved(tmp_path, stock_session):
    with tf.Graph().as_default() as graph:
        value = tf1.placeholder_with_default(tf.zeros([4]), None)
        tf1.get_variable("w", initializer=value, validate_shape=False, use_resource=False)
    save_meta_graph(graph, tmp_path / "m", {"w": W["w"]})
    np.testing.assert_array_equal(stock_session(tmp_path / "m").run("w:0"), W["w"])


KINDS = ["bfloat16", "bool", "complex64", "float16", "float64", "int64", "string", "uint8"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [3, 2**20], ids=["small", "big"])
def test_values_of_all_types_can_be_saved(tmp_path, kind, length):
    dtype = tf.as_dtype(kind)
    with tf.Graph().as_default() as graph:
        tf1.get_variable("w", [length, 2], dtype, tf1.zeros_initializer())
    value = (np.arange(length * 2) % 2).reshape(length, 2)
    value = value.astype("S1").astype(object) if kind == "string" else value
    value = value.astype(dtype.as_numpy_dtype)
    save_meta_graph(graph, tmp_path / "m", {"w": value})
    options = {"tensor_names": ["w"], "shape_and_slices": [""], "dtypes": [dtype]}
    (read,) = tf.raw_ops.RestoreV2(prefix=str(tmp_path / "m"), **options)
    np.testing.assert_array_equal(read.numpy(), value)


def arrays():
    big = np.random.default_rng(0).random((512, 1024)).astype(np.float32)
    locked = big.copy()
    locked.flags.writeable = False
    shifted = np.zeros(big.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(big.shape)
    shifted[:] = big
    return big, {
        "float64": big.astype(np.float64),
        "read-only": locked,
        "not aligned": shifted,
        "of columns": np.asfortranarray(big),
        "a view": np.repeat(big, 2, axis=0)[::2],
        "a tensor": tf.constant(big),
        "a variable": tf.Variable(big),
        "a list": big.tolist(),
    }


@pytest.mark.parametrize("kind", arrays()[1])
def test_arrays_of_all_memory_layouts_can_be_saved(tmp_path, kind):
    expected, kinds = arrays()
    with tf.Graph().as_default() as graph:
        tf1.get_variable("w", expected.shape)
    save_meta_graph(graph, tmp_path / "m", {"w": kinds[kind]})
    read = tf.train.load_checkpoint(str(tmp_path / "m")).get_tensor("w")
    np.testing.assert_array_equal(read, expected)


def test_value_of_wrong_dtype_writes_nothing(tmp_path):
    with tf.Graph().as_default() as graph:
        tf1.get_variable("w", [2**20], tf.int32)
    with pytest.raises(TypeError, match="float64.*int32"):
        save_meta_graph(graph, tmp_path / "m", {"w": np.ones(2**20)})
    assert not files(tmp_path)


def test_relative_path_is_supported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for prefix in ("m", "./m", "sub/m"):
        for step in (1, 2):
            save_meta_graph(small_graph(), prefix, W, step=step, max_to_keep=1)
        assert tf.train.latest_checkpoint(str(Path(prefix).parent)).endswith("m-2")
        assert 'path: "m-2"' in Path(prefix).with_name("checkpoint").read_text()
    assert sorted(path.stem for path in tmp_path.rglob("*.index")) == ["m-2", "m-2"]


@pytest.mark.parametrize("step", [np.int64(7), np.array(7), tf.constant(7), 7])
def test_step_may_be_any_integer_type(tmp_path, step):
    assert save_meta_graph(small_graph(), tmp_path / "m", W, step=step).name == "m-7"


def test_invalid_arguments_are_rejected(tmp_path):
    graph = small_graph()
    with graph.as_default():
        step = tf1.train.get_or_create_global_step()

    def refused(kind, message, name="m", graph=graph, **options):
        with pytest.raises(kind, match=message):
            save_meta_graph(graph, tmp_path / name, W, **options)

    refused(TypeError, r"step is <tf.Variable.*; expected an integer.* Session.run", step=step)
    refused(TypeError, r"step is 1.5; expected an integer", step=1.5)
    refused(ValueError, r"step is -1; expected an integer of at least 0", step=-1)
    refused(TypeError, r"the string 'w'; expected several .* write \['w'\]", variables="w")
    refused(ValueError, r"save w:0: the graph's .* w, b, global_step; name", variables=["w:0"])
    refused(ValueError, r"of 3 variables in the graph none is to be saved", variables=[])
    refused(ValueError, r"of 0 variables in the graph none .* make one", graph=tf.Graph())
    refused(ValueError, r"checkpoint is the file that lists .* another name", "checkpoint")
    with tf.Graph().as_default() as many:
        for number in range(40):
            tf1.get_variable(f"layer_{number}/weights", [])
    near = r"layer_99/weights: the graph's variables are layer_9/weights, .* \(40 in all\); name"
    refused(ValueError, near, graph=many, variables=["layer_99/weights"])
    assert not files(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["tf", "tf.disable_v2_behavior"])
def test_values_are_not_copied(tmp_path, style):
    """In a TF1 program, where saving used to copy all values."""
    program = f"""
import numpy as np
import tensorflow.compat.v1 as tf
if {style!r} != "tf":
    tf.disable_v2_behavior()
from transfer import save_meta_graph
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))
with tf.Graph().as_default() as graph, tf.Session():
    for number in range(8):
        tf.get_variable(f"w{{number}}", [4_000_000])
    values = {{f"w{{number}}": np.ones(4_000_000, np.float32) for number in range(8)}}
    save_meta_graph(graph, {str(tmp_path / "first")!r}, values, variables=["w0"])
    before = peak()
    save_meta_graph(graph, {str(tmp_path / "m")!r}, values)
    print(peak() - before)
"""
    if not Path("/proc/self/status").is_file():
        pytest.skip("reads the peak of its memory from /proc")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout) < 128 / 4, "MB; the values have 128"


@pytest.mark.slow
def test_save_works_without_eager_execution(tmp_path):
    program = f"""
import numpy as np
import tensorflow.compat.v1 as tf
tf.disable_eager_execution()
from transfer import save_meta_graph
w = tf.get_variable("w", [2, 3])
save_meta_graph(tf.get_default_graph(), {str(tmp_path / "m")!r}, {{"w": np.ones([2, 3])}})
with tf.Session() as session:
    tf.train.Saver().restore(session, {str(tmp_path / "m")!r})
    print(session.run(w).sum())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "6.0", result.stderr[-2000:]
