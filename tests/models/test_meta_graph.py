import shutil

import pytest
import tensorflow as tf
from conftest import save_vgg

from transfer import load_meta_graph

tf1 = tf.compat.v1


@pytest.mark.parametrize(
    "path", ["vgg/tiny", "vgg/tiny.meta", "vgg/tiny.index", "vgg/tiny.data-00000-of-00001", "vgg"]
)
def test_load_takes_any_path_of_the_model(tmp_path, path):
    prefix = save_vgg(tmp_path / "vgg" / "tiny")
    graph = load_meta_graph(tmp_path / path)
    assert graph.prefix == prefix
    assert graph.checkpoint_prefix == prefix
    assert graph.tensorflow_version == tf.__version__


def test_load_finds_the_checkpoint_of_a_later_step(tmp_path):
    save_vgg(tmp_path / "tiny")
    for path in tmp_path.glob("tiny.*"):
        if path.suffix != ".meta":
            path.rename(path.with_name(path.name.replace("tiny.", "tiny-1000.")))
    assert load_meta_graph(tmp_path / "tiny.meta").checkpoint_prefix == tmp_path / "tiny-1000"


def test_name_with_a_step_does_not_mean_another_step(tmp_path):
    save_vgg(tmp_path / "tiny-2000")
    shutil.copy(tmp_path / "tiny-2000.meta", tmp_path / "tiny-1000.meta")
    assert load_meta_graph(tmp_path / "tiny-1000").checkpoint_prefix is None


@pytest.mark.parametrize("state", ["tiny-2000", "/gone/with/tiny-2000", r"C:\\models\\tiny-2000"])
def test_load_uses_the_state_file_if_it_matches(tmp_path, state):
    save_vgg(tmp_path / "tiny")
    for step in (1000, 2000):
        for suffix in ("index", "data-00000-of-00001"):
            shutil.copy(tmp_path / f"tiny.{suffix}", tmp_path / f"tiny-{step}.{suffix}")
    (tmp_path / "tiny.index").unlink()
    (tmp_path / "tiny.data-00000-of-00001").unlink()
    (tmp_path / "checkpoint").write_text(f'model_checkpoint_path: "{state}"\n')
    assert load_meta_graph(tmp_path / "tiny").checkpoint_prefix == tmp_path / "tiny-2000"
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "inception_v1"\n')
    assert load_meta_graph(tmp_path / "tiny").checkpoint_prefix is None


def test_load_lists_available_models_if_missing(tmp_path):
    save_vgg(tmp_path / "tiny")
    with pytest.raises(FileNotFoundError, match="graphs in that folder: tiny.meta"):
        load_meta_graph(tmp_path / "vgg16")
    with pytest.raises(FileNotFoundError, match="holds 0 graphs"):
        (tmp_path / "empty").mkdir()
        load_meta_graph(tmp_path / "empty")


def test_load_rejects_ambiguous_folder(tmp_path):
    for name in ("one", "two"):
        save_vgg(tmp_path / name)
    with pytest.raises(ValueError, match=r"holds 2 graphs \(one.meta, two.meta\)"):
        load_meta_graph(tmp_path)


def test_a_truncated_meta_graph_is_refused(tmp_path):
    save_vgg(tmp_path / "tiny")
    meta = tmp_path / "tiny.meta"
    meta.write_bytes(meta.read_bytes()[: meta.stat().st_size // 2])
    with pytest.raises(ValueError, match="is not a meta graph, or it is damaged"):
        load_meta_graph(meta)


def test_tensor_suggests_similar_names(tmp_path):
    graph = load_meta_graph(save_vgg(tmp_path / "tiny"))
    assert graph.tensor("fc7") == graph.tensor("fc7:0") == "fc7:0"
    with pytest.raises(ValueError, match="has no tensor 'fc77'; did you mean fc7"):
        graph.tensor("fc77")


def test_input_is_detected_or_required(tmp_path):
    graph = tf.Graph()
    with graph.as_default():
        a = tf1.placeholder(tf.float32, [None, 4], name="a")
        b = tf1.placeholder(tf.float32, [None, 4], name="b")
        tf.add(a, b, name="tap")
    save_meta_graph_without_variables(graph, tmp_path / "two")
    with pytest.raises(ValueError, match=r"2 tensors might be it \(a:0, b:0\)"):
        load_meta_graph(tmp_path / "two").network("tap")
    network = load_meta_graph(tmp_path / "two").network("tap", "a", {"b": 1.0})
    assert network.input == "a:0"


def save_meta_graph_without_variables(graph, prefix):
    with graph.as_default():
        tf1.train.export_meta_graph(str(prefix) + ".meta", graph=graph)


def test_preprocess_requires_a_known_convention(tmp_path):
    graph = load_meta_graph(save_vgg(tmp_path / "tiny"))
    with pytest.raises(ValueError, match=r"no card \(tiny.json\) states .* preprocess=MODE: caffe"):
        graph.preprocess("images:0")
    assert graph.preprocess("images:0", "caffe").size == 16
    with pytest.raises(ValueError, match="takes images of 16x16 pixels, not 32x32"):
        graph.preprocess("images:0", "caffe", 32)


def test_preprocess_of_fully_convolutional_network_takes_any_size(tmp_path):
    graph = load_meta_graph(save_vgg(tmp_path / "tiny", convolutional=True))
    with pytest.raises(ValueError, match="takes any image size; give one"):
        graph.preprocess("images:0", "caffe")
    assert graph.preprocess("images:0", "caffe", 48).size == 48
