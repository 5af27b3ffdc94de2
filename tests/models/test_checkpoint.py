"""Read checkpoints written by all kinds of TensorFlow savers."""

import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from stock import control_flow_v1

from transfer import load_meta_graph
from transfer.graph import Variable
from transfer.models import checkpoint
from transfer.models.checkpoint import Checkpoint, MismatchError

tf1 = tf.compat.v1
A = np.arange(12, dtype=np.float32).reshape(4, 3)
B = np.array([5.0, 7.0], np.float32)
VARIABLES = (Variable("a", tf.float32, (4, 3)), Variable("b", tf.float32, (2,)))


def save(prefix: Path, *, use_resource: bool = False, names: dict | None = None, **saver_args):
    """A graph with variables ``a`` and ``b``, saved by TensorFlow's own saver."""
    with tf.Graph().as_default(), tf1.Session() as session:
        a = tf1.get_variable("a", initializer=A, use_resource=use_resource)
        b = tf1.get_variable("b", initializer=B, use_resource=use_resource)
        step = tf1.get_variable("global_step", initializer=np.int64(3))
        session.run(tf1.global_variables_initializer())
        variables = {names["a"]: a, names["b"]: b} if names else [a, b, step]
        tf1.train.Saver(variables, **saver_args).save(session, str(prefix))
    return prefix


@pytest.mark.parametrize("use_resource", [False, True], ids=["reference", "resource"])
@pytest.mark.parametrize(
    "saver_args",
    [
        {"write_version": 2},
        {"write_version": 1},
        {"write_version": 2, "sharded": True},
        {"write_version": 1, "sharded": True},
        {"names": {"a": "model/weights", "b": "model/biases"}},
    ],
    ids=["v2", "v1", "v2-sharded", "v1-sharded", "renamed"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_checkpoints_of_tensorflow_saver_are_read(tmp_path, use_resource, saver_args):
    prefix = save(tmp_path / "m", use_resource=use_resource, **saver_args)
    values = load_meta_graph(prefix).read(VARIABLES)
    assert values.keys() == {"a", "b"}
    np.testing.assert_array_equal(values["a"], A)
    np.testing.assert_array_equal(values["b"], B)


def test_partitioned_variable_is_read(tmp_path):
    prefix = tmp_path / "m"
    with tf.Graph().as_default(), tf1.Session() as session:
        with tf1.variable_scope("", partitioner=tf1.fixed_size_partitioner(2)):
            whole = tf.convert_to_tensor(tf1.get_variable("a", [4, 3], use_resource=False))
        session.run(tf1.global_variables_initializer())
        expected = session.run(whole)
        tf1.train.Saver().save(session, str(prefix))
    parts = tuple(Variable(f"a/part_{i}", tf.float32, (2, 3)) for i in range(2))
    values = load_meta_graph(prefix).read(parts)
    np.testing.assert_array_equal(np.concatenate([values[v.name] for v in parts]), expected)


def test_mismatch_error_lists_all_variables(tmp_path):
    source = checkpoint.Checkpoint(save(tmp_path / "m"))
    wanted = (
        Variable("a", tf.float32, (4, 4)),
        Variable("b", tf.float16, (2,)),
        Variable("c", tf.float32, (1,)),
    )
    with pytest.raises(ValueError, match="1 of 3 variables missing") as error:
        source.match(wanted, {})
    for part in ("(c)", "2 different", "a (graph (4, 4) float32, checkpoint (4, 3) float32)"):
        assert part in str(error.value)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_missing_data_file_is_named(tmp_path, shards):
    save(tmp_path / "m")
    data = tmp_path / "m.data-00000-of-00001"
    if shards == 2:
        data.rename(tmp_path / "m.data-00000-of-00002")
    else:
        data.unlink()
    last = f"m.data-{shards - 1:05d}-of-{shards:05d}"
    with pytest.raises(FileNotFoundError, match=f"lacks its data: {last}"):
        checkpoint.Checkpoint(tmp_path / "m")


def test_missing_checkpoint_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected m.index with its data files"):
        checkpoint.Checkpoint(tmp_path / "m")


@pytest.mark.parametrize("name", ["run [1]", "what?", "a*"])
def test_path_with_glob_characters_is_rejected(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"it takes \* \? \[ \] in a path as a pattern"):
        checkpoint.Checkpoint(tmp_path / name / "m")


def test_a_truncated_data_file_is_reported(tmp_path):
    save(tmp_path / "m")
    data = tmp_path / "m.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:20])
    with pytest.raises(ValueError, match="its data have 20 bytes, but reading needs 56"):
        load_meta_graph(tmp_path / "m").read(VARIABLES)


def test_a_damaged_index_is_reported(tmp_path):
    save(tmp_path / "m")
    (tmp_path / "m.index").write_bytes(b"not an index")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.Checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    ("written", "full", "expected"),
    [("", (4, 3), (4, 3)), ("4 3 0,2:-", (4, 3), (2, 3)), ("4 3 2,2:0,3", (4, 3), (2, 3))],
)
def test_slice_shape(written, full, expected):
    assert checkpoint.Entry("k", written).shape(full) == expected


def save_averages(prefix: Path, scope: str = "", name: str = "ExponentialMovingAverage") -> None:
    """``w`` is 1 and its average 0.5; ``b`` is 2 and has none."""
    with tf.Graph().as_default(), tf1.Session() as session:
        w = tf1.get_variable("layer/w", initializer=np.ones(3, np.float32), use_resource=False)
        tf1.get_variable("layer/b", initializer=np.full(3, 2, np.float32), use_resource=False)
        x = tf1.placeholder(tf.float32, [None, 3], name="x")
        tf.add(x * w, tf1.global_variables()[1], name="tap")
        with tf1.variable_scope(scope), control_flow_v1():
            average = tf1.train.ExponentialMovingAverage(0.5, zero_debias=False, name=name)
            update = average.apply([w])
        session.run(tf1.global_variables_initializer())
        session.run(tf1.assign(average.average(w), np.zeros(3)))
        session.run(update)
        tf1.train.Saver().save(session, str(prefix))


@pytest.mark.parametrize("scope", ["", "tower_0"])
@pytest.mark.parametrize("name", ["ExponentialMovingAverage", "moving_average", "ema"])
def test_moving_averages_are_read(tmp_path, scope, name):
    save_averages(tmp_path / "m", scope, name)
    graph = load_meta_graph(tmp_path / "m")
    variables = graph.network("tap").variables
    plain, averaged = (graph.read(variables, use_ema) for use_ema in (False, True))
    assert {k: v.numpy().tolist() for k, v in plain.items()} == {
        "layer/w": [1.0] * 3,
        "layer/b": [2.0] * 3,
    }
    assert {k: v.numpy().tolist() for k, v in averaged.items()} == {
        "layer/w": [0.5] * 3,
        "layer/b": [2.0] * 3,
    }


def test_moving_averages_of_partitioned_variables_are_read(tmp_path):
    with tf.Graph().as_default(), tf1.Session() as session:
        w = tf1.get_variable(
            "w",
            [4, 2],
            initializer=tf1.ones_initializer(),
            partitioner=tf1.fixed_size_partitioner(2),
            use_resource=False,
        )
        x = tf1.placeholder(tf.float32, [None, 4], name="x")
        tf.matmul(x, tf.convert_to_tensor(w), name="tap")
        with control_flow_v1():
            average = tf1.train.ExponentialMovingAverage(0.5, zero_debias=False)
            update = average.apply([*w])
        session.run(tf1.global_variables_initializer())
        session.run([tf1.assign(average.average(part), np.zeros((2, 2))) for part in w])
        session.run(update)
        tf1.train.Saver().save(session, str(tmp_path / "m"))
    graph = load_meta_graph(tmp_path / "m")
    found = graph.read(graph.network("tap").variables, use_ema=True)
    assert {np.mean(value) for value in found.values()} == {0.5}


def test_moving_averages_equal_variables_to_restore(tmp_path):
    with tf.Graph().as_default(), tf1.Session() as session:
        w = tf1.get_variable("w", initializer=A, use_resource=False)
        average = tf1.train.ExponentialMovingAverage(0.9)
        with control_flow_v1():
            update = average.apply([w])
        session.run(tf1.global_variables_initializer())
        session.run(tf1.assign(w, A + 1.0))
        session.run(update)
        expected = session.run(average.average(w))
        tf1.train.Saver().save(session, str(tmp_path / "m"))
        (key,) = (k for k, v in average.variables_to_restore([w]).items() if v is w)
    graph = load_meta_graph(tmp_path / "m")
    source = checkpoint.Checkpoint(tmp_path / "m")
    assert checkpoint.average_entries(["w"], source) == {"w": checkpoint.Entry(key)}
    variables = [Variable("w", tf.float32, (4, 3))]
    np.testing.assert_array_equal(graph.read(variables, use_ema=True)["w"], expected)


def test_missing_moving_averages_are_reported(tmp_path):
    graph = load_meta_graph(save(tmp_path / "m"))
    with pytest.raises(ValueError, match="has no moving averages: no entry is named like"):
        graph.read(VARIABLES, use_ema=True)


@pytest.mark.parametrize(
    ("shape", "parts", "axis"),
    [([4, 3], 2, 0), ([5, 3], 2, 0), ([4, 6], 3, 1), ([2, 2], 2, 1), ([7], 4, 0), ([3, 2], 1, 0)],
)
def test_partitions_are_derived_from_shapes_without_saver(tmp_path, shape, parts, axis):
    with tf.Graph().as_default(), tf1.Session() as session:
        x = tf1.placeholder(tf.float32, shape, name="x")
        partitioner = tf1.fixed_size_partitioner(parts, axis)
        w = tf1.get_variable("s/w", shape, partitioner=partitioner, use_resource=False)
        tf.add(x, tf.convert_to_tensor(w), name="tap")
        session.run(tf1.global_variables_initializer())
        tf1.train.export_meta_graph(str(tmp_path / "m.meta"))
        tf1.train.Saver().save(session, str(tmp_path / "m"), write_meta_graph=False)
        expected = session.run(tf.convert_to_tensor(w))
    graph = load_meta_graph(tmp_path / "m")
    assert not [name for name in graph.nodes if name.startswith("save")]
    values = graph.read(graph.network("tap", "x").variables)
    assert list(values) == [f"s/w/part_{i}" for i in range(parts)]
    found = list(values.values())
    np.testing.assert_array_equal(np.concatenate(found, axis), expected)


def test_partitions_with_inconsistent_shapes_are_missing(tmp_path):
    variables = tuple(Variable(f"a/part_{i}", tf.float32, (2, 3)) for i in range(3))
    nodes = []
    for variable in variables:
        node = tf1.NodeDef(name=variable.name, op="VariableV2")
        node.attr["shape"].shape.CopyFrom(tf.TensorShape(variable.shape).as_proto())
        nodes.append(node)
    source = checkpoint.Checkpoint(save(tmp_path / "m"))
    assert len(checkpoint.partition_entries(nodes[:2], source.shapes)) == 2
    assert checkpoint.partition_entries(nodes, source.shapes) == {}
    _, missing, _ = source.compare(variables, {})
    assert missing == [variable.name for variable in variables]


def write(prefix: Path, values: dict[str, np.ndarray]) -> None:
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=list(values.values()),
    )


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_data_is_reported_as_such(tmp_path, share):
    prefix = tmp_path / "m"
    write(prefix, {"a": np.zeros(1000, np.float32), "b": np.zeros(8, np.float32)})
    data = tmp_path / "m.data-00000-of-00001"
    content = data.read_bytes()
    data.write_bytes(content[: int(share * len(content))])
    source = checkpoint.Checkpoint(prefix)
    with pytest.raises(ValueError, match="needs 4,032; it is truncated, get it again"):
        source.read({name: checkpoint.Entry(name) for name in ("a", "b")})


def test_huge_missing_tensor_allocates_no_memory(tmp_path):
    """The index lists it, but the data file has one byte."""
    prefix = tmp_path / "m"
    write(prefix, {"a": np.zeros(10**7, np.float32)})
    (tmp_path / "m.data-00000-of-00001").write_bytes(b"x")
    with pytest.raises(ValueError, match="have 1 bytes, but reading needs 40,000,000"):
        checkpoint.Checkpoint(prefix).read({"a": checkpoint.Entry("a")})


def test_corrupted_data_is_reported(tmp_path):
    prefix = save(tmp_path / "m")
    data = tmp_path / "m.data-00000-of-00001"
    data.write_bytes(bytes(byte ^ 1 for byte in data.read_bytes()))
    with pytest.raises(ValueError, match="is damaged: .*[Cc]hecksum"):
        checkpoint.Checkpoint(prefix).read({"a": checkpoint.Entry("a")})


def test_mismatch_error_lists_unused_entries(tmp_path):
    source = checkpoint.Checkpoint(save(tmp_path / "m"))
    with pytest.raises(ValueError) as error:
        source.match([Variable("A", tf.float32, (4, 3)), VARIABLES[1]], {})
    for part in (
        "1 of 2 variables missing (A)",
        "0 different (none)",
        "2 that the tap does not need (a, global_step)",
    ):
        assert part in str(error.value)


def test_long_list_of_unused_entries_is_truncated(tmp_path):
    write(tmp_path / "m", {f"v{i:02}": B for i in range(20)})
    with pytest.raises(ValueError, match=r"20 that the tap does not need \(v00, .*, v07, ...\)"):
        checkpoint.Checkpoint(tmp_path / "m").match(VARIABLES, {})


def test_compare_sorts_into_matched_missing_and_different(tmp_path):
    source = checkpoint.Checkpoint(save(tmp_path / "m"))
    wanted = [*VARIABLES, Variable("gone", tf.float32, ()), Variable("a", tf.float32, (3, 4))]
    matched, missing, different = source.compare(wanted[:3], {})
    assert (list(matched), missing, different) == (["a", "b"], ["gone"], [])
    _, _, different = source.compare(wanted[3:], {})
    assert different == ["a (graph (3, 4) float32, checkpoint (4, 3) float32)"]


def test_variable_of_unknown_shape_matches_any_shape(tmp_path):
    source = checkpoint.Checkpoint(save(tmp_path / "m"))
    matched, _, _ = source.compare([Variable("a", tf.float32, None)], {})
    assert list(matched) == ["a"]


@pytest.mark.parametrize(
    ("written", "rename"),
    [
        (lambda name: name.replace("weights", "kernel"), ("weights", "kernel")),
        (lambda name: f"net/vgg/{name}", ("", "net/vgg/")),
        (lambda name: name.removeprefix("tower/"), ("tower/", "")),
        (lambda name: name.replace("tower/fc", "tower/dense_"), ("fc", "dense_")),
    ],
)
def test_rename_that_matches_all_variables_is_suggested(tmp_path, written, rename):
    names = ["tower/fc6/weights", "tower/fc7/weights", "tower/fc7/biases"]
    with tf.Graph().as_default(), tf1.Session() as session:
        x = tf1.placeholder(tf.float32, [None, 3], name="x")
        values = [tf1.get_variable(n, [3, 3] if "w" in n[9:] else [3]) for n in names]
        tf.add(x @ values[0] @ values[1], values[2], name="tap")
        session.run(tf1.global_variables_initializer())
        saver = tf1.train.Saver({written(v.op.name): v for v in values})
        saver.save(session, str(tmp_path / "m"), write_meta_graph=False)
        expected = session.run(values)
        tf1.train.export_meta_graph(str(tmp_path / "m.meta"), clear_extraneous_savers=True)
    graph = load_meta_graph(tmp_path / "m")
    network = graph.network("tap", "x")
    with pytest.raises(MismatchError, match=re.escape(f"rename={dict([rename])} gives")) as error:
        graph.match(network.variables)
    assert error.value.rename == rename
    renamed = load_meta_graph(tmp_path / "m", rename=dict([rename]))
    found = renamed.read(renamed.network("tap", "x").variables)
    for name, value in zip(names, expected, strict=True):
        np.testing.assert_array_equal(found[name], value)
    with pytest.raises(ValueError, match="rename={'gone': 'there'} leads to no entry"):
        load_meta_graph(tmp_path / "m", rename={"gone": "there"}).match(network.variables)


def test_rename_is_not_suggested_if_shapes_differ(tmp_path):
    with tf.Graph().as_default(), tf1.Session() as session:
        saved = tf1.get_variable("kernel", [2, 2])
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver([saved]).save(session, str(tmp_path / "m"), write_meta_graph=False)
    source = Checkpoint(tmp_path / "m")
    with pytest.raises(MismatchError, match="look for the checkpoint") as error:
        source.match([Variable("weights", tf.float32, (3, 3))], {})
    assert error.value.rename is None
