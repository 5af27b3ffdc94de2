"""Checkpoint retention compared with TensorFlow's own Saver."""

import random
from pathlib import Path

import pytest
import tensorflow as tf

from transfer import save_meta_graph

tf1 = tf.compat.v1

VALUES = {"w": 1.0}


def graph_of_one():
    graph = tf.Graph()
    with graph.as_default():
        tf1.get_variable("w", [], use_resource=False)
    return graph


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def saved(folder):
    return sorted(path.stem for path in folder.glob("*.index"))


def listed(folder):
    state = tf.train.get_checkpoint_state(str(folder))
    return [Path(path).name for path in state.all_model_checkpoint_paths]


@pytest.fixture
def clock(monkeypatch):
    now = [1_000_000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    return now


@pytest.fixture
def stock(tmp_path):
    """``stock(max_to_keep=...)`` saves with TensorFlow's Saver to a separate folder."""
    folder = tmp_path / "stock"
    folder.mkdir()
    with graph_of_one().as_default() as graph, tf1.Session(graph=graph) as session:
        session.run(tf1.global_variables_initializer())

        def make(**options):
            saver = tf1.train.Saver(**options)
            return lambda step, **kind: saver.save(session, str(folder / "m"), step, **kind)

        yield make


@pytest.mark.slow_variants
@pytest.mark.parametrize("seed", range(6))
def test_retention_equals_tensorflow_at_irregular_times(tmp_path, clock, stock, seed):
    """Repeated steps, pauses, and intervals that are no divisor of an hour."""
    chance = random.Random(seed)
    keep, hours = chance.randint(1, 4), chance.choice([0, 0.3, 1, 2.5, 10_000])
    options = {"max_to_keep": keep, "keep_checkpoint_every_n_hours": hours}
    save, graph, step = stock(**options), graph_of_one(), 0
    for _ in range(25):
        save(step, write_meta_graph=True)
        save_meta_graph(graph, tmp_path / "m", VALUES, step=step, write_meta_graph=True, **options)
        ours = [name for name in files(tmp_path) if name != "stock"]
        assert ours == files(tmp_path / "stock"), f"step {step}, {options}"
        assert listed(tmp_path) == listed(tmp_path / "stock")
        step += chance.choice([0, 1, 1, 1, 10])
        clock[0] += chance.choice([1, 600, 1800, 3600, 3 * 3600, 40 * 3600])


def test_all_checkpoints_are_kept_without_limit(tmp_path, stock):
    save = stock(max_to_keep=0)
    for step in range(7):
        save(step, write_meta_graph=False)
        save_meta_graph(graph_of_one(), tmp_path / "m", VALUES, step=step)
    assert saved(tmp_path) == saved(tmp_path / "stock")
    assert listed(tmp_path) == listed(tmp_path / "stock") == ["m-6"]
    save_meta_graph(graph_of_one(), tmp_path / "m", VALUES, step=7, max_to_keep=1)
    assert saved(tmp_path) == [f"m-{step}" for step in (0, 1, 2, 3, 4, 5, 7)]


def test_limit_can_be_reduced_later(tmp_path):
    for step in range(5):
        save_meta_graph(graph_of_one(), tmp_path / "m", VALUES, step=step, max_to_keep=5)
    save_meta_graph(graph_of_one(), tmp_path / "m", VALUES, step=5, max_to_keep=2)
    assert saved(tmp_path) == listed(tmp_path) == ["m-4", "m-5"]


def test_checkpoints_of_tensorflow_saver_are_continued(tmp_path, stock):
    """Its state file has absolute paths, and no times."""
    save = stock(max_to_keep=5)
    for step in range(3):
        save(step)
    folder = tmp_path / "stock"
    assert str(folder) in (folder / "checkpoint").read_text()
    save_meta_graph(graph_of_one(), folder / "m", VALUES, step=3, max_to_keep=2)
    assert listed(folder) == ["m-2", "m-3"]
    assert [name for name in files(folder) if "data" not in name] == [
        "checkpoint", "m-2.index", "m-2.meta", "m-3.index", "m.meta",
    ]  # fmt: skip
    assert str(folder) not in (folder / "checkpoint").read_text()


def test_tensorflow_saver_continues_our_checkpoints(tmp_path):
    for step in range(3):
        save_meta_graph(graph_of_one(), tmp_path / "m", VALUES, step=step, max_to_keep=3)
    with tf.Graph().as_default(), tf1.Session() as session:
        saver = tf1.train.import_meta_graph(str(tmp_path / "m.meta"))
        state = tf.train.get_checkpoint_state(str(tmp_path))
        saver.restore(session, state.model_checkpoint_path)
        saver.recover_last_checkpoints(state.all_model_checkpoint_paths)
        saver.save(session, str(tmp_path / "m"), global_step=3, write_meta_graph=False)
    assert saved(tmp_path) == listed(tmp_path) == ["m-1", "m-2", "m-3"]


def test_prefixes_in_a_folder_are_counted_separately(tmp_path):
    for step in range(6):
        save_meta_graph(graph_of_one(), tmp_path / "last", VALUES, step=step, max_to_keep=2)
        if step % 2:
            save_meta_graph(graph_of_one(), tmp_path / "best", VALUES, step=step, max_to_keep=1)
    assert saved(tmp_path) == ["best-5", "last-4", "last-5"]
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(tmp_path / "best-5")


def test_similar_names_are_not_deleted(tmp_path):
    alike = ["m-1.txt", "m-1.json", "m-1.index.bak", "m-10.index", "m-1-2.index", "mm-1.index"]
    for name in alike:
        (tmp_path / name).write_text("mine")
    save_meta_graph(graph_of_one(), tmp_path / "m-1", VALUES, step=2)
    for step in (1, 2):
        save_meta_graph(graph_of_one(), tmp_path / "m", VALUES, step=step, max_to_keep=1)
    assert not (tmp_path / "m-1.index").exists()
    assert set(alike) < set(files(tmp_path))


@pytest.mark.parametrize("place", ["../m-1", "{tmp}/other/m-1", "sub/m-1", "*-1", "m-1*", "."])
def test_checkpoints_in_other_folders_are_not_deleted(tmp_path, place):
    """The state file is untrusted."""
    for folder in ("here/sub", "other", "."):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "m-1.index").write_text("not ours")
    here = tmp_path / "here"
    (here / "m-1.index").write_text("not listed")
    place = place.format(tmp=tmp_path)
    (here / "checkpoint").write_text(
        f'model_checkpoint_path: "{place}"\nall_model_checkpoint_paths: "{place}"\n'
    )
    before = set(tmp_path.rglob("*"))
    for step in (2, 3):
        save_meta_graph(graph_of_one(), here / "m", VALUES, step=step, max_to_keep=1)
    assert before < set(tmp_path.rglob("*"))
    assert listed(here) == ["m-3"]


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"nonsense",
        b'all_model_checkpoint_paths: "m-1"\n',
        b'model_checkpoint_path: "C:\\me\\m-1"\n',
    ],
    ids=["empty", "binary", "text", "no newest", "windows"],
)
def test_invalid_state_file_is_replaced(tmp_path, content):
    (tmp_path / "m-1.index").write_text("not to be deleted")
    (tmp_path / "checkpoint").write_bytes(content)
    save_meta_graph(graph_of_one(), tmp_path / "m", VALUES, step=2, max_to_keep=1)
    assert saved(tmp_path) == ["m-1", "m-2"]
    assert listed(tmp_path) == ["m-2"]


def test_manually_deleted_checkpoints_are_tolerated(tmp_path):
    for step in range(3):
        save_meta_graph(graph_of_one(), tmp_path / "m", VALUES, step=step, max_to_keep=2)
        for path in tmp_path.glob("m-1.*"):
            path.unlink()
    save_meta_graph(graph_of_one(), tmp_path / "m", VALUES, step=3, max_to_keep=2)
    assert saved(tmp_path) == ["m-2", "m-3"]


def test_checkpoint_without_step_is_kept(tmp_path):
    save_meta_graph(graph_of_one(), tmp_path / "m", VALUES, max_to_keep=1)
    for step in range(3):
        save_meta_graph(graph_of_one(), tmp_path / "m", VALUES, step=step, max_to_keep=1)
    assert saved(tmp_path) == ["m", "m-2"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_to_keep": -1}, "max_to_keep is -1; expected how many .* give a number, or None"),
        (
            {"max_to_keep": 2, "keep_checkpoint_every_n_hours": -0.5},
            "every_n_hours is -0.5; expected a number of hours: give one, or None",
        ),
        ({"keep_checkpoint_every_n_hours": float("nan")}, "every_n_hours is nan; expected"),
    ],
)
def test_invalid_options_are_rejected(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        save_meta_graph(graph_of_one(), tmp_path / "new" / "m", VALUES, step=1, **option)
    assert not files(tmp_path)
