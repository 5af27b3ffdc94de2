"""Checkpoints that stock savers of all kinds wrote, read by us."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from transfer import checkpoint, load_meta_graph
from transfer.surgery import Variable

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
def test_reads_what_stock_savers_write(tmp_path, use_resource, saver_args):
    prefix = save(tmp_path / "m", use_resource=use_resource, **saver_args)
    values = load_meta_graph(prefix).read(VARIABLES)
    assert values.keys() == {"a", "b"}
    np.testing.assert_array_equal(values["a"], A)
    np.testing.assert_array_equal(values["b"], B)


def test_reads_the_parts_of_a_partitioned_variable(tmp_path):
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


def test_all_that_does_not_fit_is_listed_at_once(tmp_path):
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


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected m.index with its data files"):
        checkpoint.Checkpoint(tmp_path / "m")


@pytest.mark.parametrize("name", ["run [1]", "what?", "a*"])
def test_a_path_that_tensorflow_takes_for_a_pattern_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"it takes \* \? \[ \] in a path for a pattern"):
        checkpoint.Checkpoint(tmp_path / name / "m")


def test_a_truncated_data_file_is_reported(tmp_path):
    save(tmp_path / "m")
    data = tmp_path / "m.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:20])
    with pytest.raises(ValueError, match="its data have 20 bytes, and what is to be read needs 56"):
        load_meta_graph(tmp_path / "m").read(VARIABLES)


def test_a_damaged_index_is_reported(tmp_path):
    save(tmp_path / "m")
    (tmp_path / "m.index").write_bytes(b"not an index")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.Checkpoint(tmp_path / "m")


def test_write_is_read_by_tensorflow(tmp_path):
    values = {"x/y": (A, tf.float32), "z": (tf.constant(B), tf.float32)}
    checkpoint.write(tmp_path / "w", values)
    reader = tf.train.load_checkpoint(str(tmp_path / "w"))
    np.testing.assert_array_equal(reader.get_tensor("x/y"), A)
    np.testing.assert_array_equal(reader.get_tensor("z"), B)


@pytest.mark.parametrize(
    ("written", "full", "expected"),
    [("", (4, 3), (4, 3)), ("4 3 0,2:-", (4, 3), (2, 3)), ("4 3 2,2:0,3", (4, 3), (2, 3))],
)
def test_shape_of_a_slice(written, full, expected):
    assert checkpoint.Entry("k", written).shape(full) == expected
