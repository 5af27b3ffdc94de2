import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import NUM_CLASSES, TINY, save_vgg

from transfer import Card, load_meta_graph, save_meta_graph, vgg

tf1 = tf.compat.v1


def test_save_and_stock_restore(tmp_path, stock_session, images):
    values = vgg.random_weights(TINY, NUM_CLASSES)
    save_meta_graph(vgg.build_graph(TINY, NUM_CLASSES), tmp_path / "m", values)
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


def test_save_refuses_values_that_do_not_fit(tmp_path):
    values = vgg.random_weights(TINY, NUM_CLASSES)
    del values["fc6/biases"]
    values["fc7/biases"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"no value for fc6/biases; .* fc7/biases \(graph \(32,\)"):
        save_meta_graph(vgg.build_graph(TINY, NUM_CLASSES), tmp_path / "m", values)
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


def test_the_graph_is_written_once_for_all_steps(tmp_path):
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


def test_without_a_meta_graph(tmp_path):
    save_meta_graph(small_graph(), tmp_path / "m", W, step=1, write_meta_graph=False)
    assert files(tmp_path) == ["checkpoint", "m-1.data-00000-of-00001", "m-1.index"]


@pytest.mark.parametrize("hours", [None, 2.0, 0.5])
def test_the_same_is_kept_as_by_tensorflows_saver(tmp_path, monkeypatch, hours):
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


def test_what_others_saved_is_not_deleted(tmp_path):
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


def test_some_variables_only(tmp_path):
    save_meta_graph(small_graph(), tmp_path / "m", {"w": W["w"]}, variables=["w"])
    assert list(tf.train.load_checkpoint(str(tmp_path / "m")).get_variable_to_shape_map()) == ["w"]
    with tf.Graph().as_default() as graph, tf1.Session() as session:
        saver = tf1.train.import_meta_graph(str(tmp_path / "m.meta"))
        session.run(graph.get_operation_by_name("b/Assign"))
        saver.restore(session, str(tmp_path / "m"))
        np.testing.assert_array_equal(session.run("w:0"), W["w"])
    with pytest.raises(ValueError, match="cannot save q: the graph's variables are w, b"):
        save_meta_graph(small_graph(), tmp_path / "m", W, variables=["q"])


def test_the_graph_does_not_grow_and_may_be_finalized(tmp_path):
    graph = small_graph()
    graph.finalize()
    count = len(graph.get_operations())
    for step in range(3):
        save_meta_graph(graph, tmp_path / "m", W, step=step)
    assert len(graph.get_operations()) == count


def test_in_a_program_without_eager_execution(tmp_path):
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
