"""`finetune` of other people's graphs, from end to end."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import yaml
from commands import finetune

from recipes.cli import main
from transfer import Backbone, Classifier, load_meta_graph, save_meta_graph

tf1 = tf.compat.v1

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(autouse=True)
def _own_session():
    keras.backend.clear_session()


@pytest.mark.slow
def test_nondeterministic_features_are_refused(tmp_path, image_folder, capsys):
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        noise = tf1.placeholder_with_default(0.5, [], name="noise")
        mean = tf.reduce_mean(x, [1, 2])
        tf.add(mean, noise * tf1.random.normal(tf.shape(mean)), name="tap")
        tf1.get_variable("unused", [1])
    save_meta_graph(graph, tmp_path / "noisy" / "m", {"unused": np.zeros(1)})
    flags = ["--tap", "tap", "--preprocess", "unit"]
    assert finetune(tmp_path / "a", tmp_path / "noisy", image_folder, *flags) == 1
    assert "are not deterministic: random operations before" in capsys.readouterr().err
    flags += ["--feed", "noise=0.0"]
    assert finetune(tmp_path / "b", tmp_path / "noisy", image_folder, *flags) == 0


@pytest.mark.slow
def test_graph_without_card_or_names_is_fine_tuned(tmp_path, image_folder):
    """A foreign graph: no card, other tensor names, a keep_prob that must be fed."""
    prefix = tmp_path / "wild" / "model.ckpt-7"
    prefix.parent.mkdir()
    with tf.Graph().as_default(), tf1.Session() as session:
        x = tf1.placeholder(tf.float32, [None, 12, 12, 3])
        keep = tf1.placeholder(tf.float32)
        kernel = tf1.get_variable("w", [3, 3, 3, 4], use_resource=False)
        net = tf.reduce_mean(tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME")), [1, 2])
        tf.multiply(net, keep, name="features")
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver().save(session, str(prefix))
    flags = ["--tap", "features", "--feed", "Placeholder_1:0=1.0", "--preprocess", "tf"]
    assert finetune(tmp_path / "run", prefix.parent, image_folder, *flags) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["input"], config["image_size"]) == ("Placeholder:0", 12)
    assert main(["evaluate", str(tmp_path / "run")]) == 0


@pytest.mark.slow
def test_network_with_vector_input_takes_square_images(tmp_path, image_folder):
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.float32, [50, 64], name="x")
        w = tf1.get_variable("w", [64, 8])
        tf.nn.relu(tf.matmul(x, w), name="tap")
    w = np.random.default_rng(0).standard_normal([64, 8])
    save_meta_graph(graph, tmp_path / "mlp" / "m", {"w": w})
    flags = ["--tap", "tap", "--preprocess", "unit", "--freeze-until", "none", "--epochs", "2"]
    assert finetune(tmp_path / "run", tmp_path / "mlp", image_folder, *flags) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert Classifier.load(tmp_path / "run").preprocess.size == 8


@pytest.mark.slow
def test_graph_dropout_is_active_in_training_only(tmp_path, model, image_folder, capsys):
    flags = ["--freeze-until", "none", "--epochs", "1"]
    assert finetune(tmp_path / "a", model, image_folder, *flags) == 0
    assert "keep_prob: keep_prob:0 is 1.0, and 0.5 in what is trained" in capsys.readouterr().err
    assert finetune(tmp_path / "b", model, image_folder, *flags, "--feed", "keep_prob=1.0") == 0
    data = "model.data-00000-of-00001"
    assert (tmp_path / "a" / data).read_bytes() != (tmp_path / "b" / data).read_bytes()
    assert main(["evaluate", str(tmp_path / "a")]) == 0


@pytest.mark.slow
def test_always_active_dropout_can_be_kept(tmp_path, image_folder, capsys):
    graph = tf.Graph()
    with graph.as_default():
        x = tf1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        net = tf.matmul(tf.reshape(x, [-1, 192]), tf1.get_variable("w", [192, 40]))
        tf.identity(tf1.nn.dropout(net, rate=0.5), name="tap")
    values = {"w": np.random.default_rng(0).standard_normal([192, 40])}
    save_meta_graph(graph, tmp_path / "always" / "m", values)
    flags = ["--tap", "tap", "--preprocess", "unit", "--epochs", "1"]
    images = np.ones([2, 8, 8, 3], np.float32)
    for kept, flag in ((False, []), (True, ["--keep-dropout"])):
        out = tmp_path / f"kept-{kept}"
        assert finetune(out, tmp_path / "always", image_folder, *flags, *flag) == 0
        backbone = Classifier.load(out).backbone
        assert (np.asarray(backbone(images)) == 0).any() == kept
        assert main(["evaluate", str(out)]) == 0


@pytest.mark.slow
def test_constant_weights_are_fine_tuned(tmp_path, model, image_folder):
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_from_session_graph as freeze,
    )

    with tf.Graph().as_default() as graph, tf1.Session() as session:
        tf1.train.import_meta_graph(f"{model}.meta").restore(session, str(model))
        frozen = freeze(session, graph.as_graph_def(), ["fc7"])
    (tmp_path / "frozen.pb").write_bytes(frozen.SerializeToString())
    flags = ["--preprocess", "unit", "--freeze-until", "none", "--epochs", "2"]
    assert finetune(tmp_path / "run", tmp_path / "frozen.pb", image_folder, *flags) == 0
    before, after = (Backbone(load_meta_graph(p)) for p in (model, tmp_path / "run"))
    assert set(after.variable_names) == set(before.variable_names)
    for name, value in before.values().items():
        assert (after.values()[name].numpy() != value.numpy()).any(), name


@pytest.mark.slow
def test_keras_saved_model_is_fine_tuned(tmp_path, image_folder):
    network = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            keras.layers.Conv2D(4, 3, activation="relu", name="conv1"),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(8, "relu", name="fc7"),
            keras.layers.Dense(3),
        ]
    )
    network.export(tmp_path / "saved", verbose=False)
    flags = ["--preprocess", "unit", "--freeze-until", "conv1", "--epochs", "2"]
    assert finetune(tmp_path / "run", tmp_path / "saved", image_folder, *flags) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert finetune(tmp_path / "again", tmp_path / "run", image_folder) == 0
