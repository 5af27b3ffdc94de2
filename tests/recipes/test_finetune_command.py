"""`finetune` from end to end, on small networks and generated photos."""

import csv
import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
import yaml
from commands import finetune, metrics, saved_values
from conftest import save_vgg

from recipes.cli import main
from transfer import Backbone, Classifier, load_meta_graph

tf1 = tf.compat.v1


@pytest.fixture(autouse=True)
def _own_session():
    keras.backend.clear_session()


def test_finetune_writes_the_run_folder(tmp_path, model, image_folder, capsys):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder) == 0
    stdout = capsys.readouterr().out.splitlines()
    assert stdout[0].startswith("accuracy ")
    assert stdout[1] == str(out)
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "labels.txt", "held_out.txt", "metrics.json", "history.csv", "events",
        "checkpoints", "checkpoint", "model.meta", "model.index", "model.data-00000-of-00001",
        "model.json", "provenance.json", "training.txt", ".lock",
    }  # fmt: skip
    assert (out / "labels.txt").read_text() == "blue\nred\n"

    found = metrics(out)
    assert found["eval"].keys() == {"accuracy", "top5", "loss", "num_examples", "accuracy_ci95"}
    assert found["eval"]["num_examples"] == 4
    assert found["train"]["epochs"] == 3
    assert found["train"]["steps"] == 12
    assert found["time"].keys() == {"load_s", "extract_s", "train_s", "eval_s", "total_s"}
    assert found["throughput"].keys() == {"extract_images_per_s", "train_images_per_s"}
    assert found["memory"]["peak_rss_mb"] > 10
    assert found["params"]["trainable"] == 32 * 2 + 2
    assert (found["cut"], found["seed"]) == ("fc7", 0)
    assert "tensorflow" in found["versions"]

    card = json.loads((out / "model.json").read_text())
    assert card["eval"] == found["eval"]
    assert (card["preprocess"], card["image_size"], card["tap"]) == ("unit", 16, "fc7:0")
    with (out / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert float(rows[-1]["val_accuracy"]) == found["eval"]["accuracy"]


def test_frozen_backbone_is_bit_identical(model, finished_run):
    names = Backbone(load_meta_graph(model)).variable_names
    before, after = (saved_values(path, names) for path in (model, finished_run / "model"))
    for name in names:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_full_changes_every_weight(tmp_path, model, image_folder, optimizer):
    flags = ["--freeze-until", "none", "--optimizer", optimizer, "--learning-rate", 0.01]
    assert finetune(tmp_path / "run", model, image_folder, *flags) == 0
    names = Backbone(load_meta_graph(model)).variable_names
    before, after = (saved_values(p, names) for p in (model, tmp_path / "run" / "model"))
    unchanged = [name for name in names if np.array_equal(before[name], after[name])]
    assert unchanged == []


def test_partial_changes_weights_after_the_cut_only(tmp_path, model, image_folder):
    flags = ["--freeze-until", "pool2", "--learning-rate", 0.01]
    assert finetune(tmp_path / "run", model, image_folder, *flags) == 0
    names = Backbone(load_meta_graph(model)).variable_names
    before, after = (saved_values(p, names) for p in (model, tmp_path / "run" / "model"))
    unchanged = [name for name in names if np.array_equal(before[name], after[name])]
    assert unchanged == [name for name in names if name.startswith("conv")]
    assert metrics(tmp_path / "run")["cut"] == "pool2"


@pytest.mark.slow
def test_saved_model_opens_in_tf1_session(tmp_path, model, image_folder, stock_session):
    assert finetune(tmp_path / "run", model, image_folder, "--hidden", 5, "--dropout", 0.1) == 0
    loaded = Classifier.load(tmp_path / "run")
    photos = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    images = loaded.preprocess(photos).numpy()
    found = stock_session(tmp_path / "run" / "model").run(
        "head/probabilities:0", {"images:0": images}
    )
    np.testing.assert_allclose(found, loaded.probabilities(photos), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_fine_tuned_model_can_be_fine_tuned(tmp_path, finished_run, image_folder):
    assert finetune(tmp_path / "second", finished_run, image_folder) == 0


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model(tmp_path, model, image_folder):
    for name in ("a", "b"):
        flags = ["--augment", "--dropout", 0.2, "--freeze-until", "pool2"]
        assert finetune(tmp_path / name, model, image_folder, *flags) == 0
    data = "model.data-00000-of-00001"
    assert (tmp_path / "a" / data).read_bytes() == (tmp_path / "b" / data).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_activations_that_do_not_fit_are_recomputed(
    tmp_path, model, image_folder, monkeypatch, capsys
):
    flags = ["--freeze-until", "pool1", "--cache", "memory"]
    assert finetune(tmp_path / "kept", model, image_folder, *flags) == 0
    monkeypatch.setattr("transfer.core.measurement.available_memory_mb", lambda: 0.001)
    assert finetune(tmp_path / "anew", model, image_folder, *flags) == 0
    assert "recomputed in each epoch" in capsys.readouterr().err
    kept, anew = (metrics(tmp_path / name)["eval"] for name in ("kept", "anew"))
    assert kept["num_examples"] == anew["num_examples"] == 4
    assert main(["evaluate", str(tmp_path / "anew")]) == 0


@pytest.mark.slow
def test_config_yaml_repeats_a_run(tmp_path, model, image_folder):
    assert finetune(tmp_path / "a", model, image_folder, "--dropout", 0.1, "--hidden", 4) == 0
    config = tmp_path / "a" / "config.yaml"
    assert 0.006 < yaml.safe_load(config.read_text())["learning_rate"] < 1  # small features
    again = ["finetune", "--config", str(config), "--out", str(tmp_path / "b")]
    assert main(again) == 0
    data = "model.data-00000-of-00001"
    assert (tmp_path / "a" / data).read_bytes() == (tmp_path / "b" / data).read_bytes()
    config.unlink()  # does not affect the next run in this process
    assert finetune(tmp_path / "c", model, image_folder) == 0


@pytest.mark.slow
def test_shots_per_class_limits_training_images(tmp_path, model, image_folder):
    flags = ["--shots-per-class", 3, "--batch-size", 4]
    assert finetune(tmp_path / "run", model, image_folder, *flags) == 0
    assert metrics(tmp_path / "run")["train"]["steps"] == 3 * 2


ERRORS = {
    "batch size": (["--batch-size", "21"], "--batch-size 21 does not fit 20 training images"),
    "tap": (["--tap", "fc_7"], "no tensor 'fc_7'; did you mean fc7"),
    "cut": (["--freeze-until", "fc8"], "cannot cut at 'fc8:0'"),
    "input": (["--input", "image"], "no tensor 'image'; did you mean images"),
    "feed": (["--feed", "keep_prob"], "expected NAME=VALUE"),
    "preprocess": (["--preprocess", "vgg"], "choose from: caffe"),
    "image size": (["--image-size", "32"], "takes images of 16x16 pixels, not 32x32"),
    "model": (["--model", "nowhere/vgg"], "no meta graph 'nowhere/vgg.meta'"),
    "epochs": (["--epochs", "0"], "epochs must be at least 1"),
    "split": (["--eval-split", "test"], "its splits are ['train']"),
    "both": (["--dataset", "digits"], "--dataset digits exclude each other"),
    "diverges": (["--learning-rate", "1e38", "--optimizer", "sgd"], "with learning rate 1e+38"),
    "rate": (["--learning-rate", "-1"], "--learning-rate must be a number above 0, got -1"),
    "shots": (["--shots-per-class", "0"], "--shots-per-class must be at least 1"),
    "last step": (
        ["--learning-rate", "1e38", "--optimizer", "sgd", "--epochs", "1", "--batch-size", "20"],
        "the loss is nan at step 1",
    ),
}


@pytest.mark.parametrize("flags, message", ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line_and_status_1(tmp_path, model, image_folder, capfd, flags, message):
    assert finetune(tmp_path / "run", model, image_folder, *flags) == 1
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert message in lines[-1]
    assert "Traceback" not in "".join(lines)


def test_finetune_rejects_pattern_characters_in_path(tmp_path, model, image_folder, capsys):
    assert finetune(tmp_path / "run [1]", model, image_folder) == 1
    assert "takes * ? [ ] in a path as a pattern" in capsys.readouterr().err
    assert not (tmp_path / "run [1]").exists()


def test_finetune_rejects_nonempty_folder(tmp_path, model, image_folder, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    assert finetune(tmp_path / "run", model, image_folder) == 1
    assert "is not empty; choose another --out" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_finetune_names_unreadable_image(tmp_path, model, own_image_folder, capsys):
    (own_image_folder / "red" / "03.png").write_bytes(b"\x89PNG nonsense")
    assert finetune(tmp_path / "run", model, own_image_folder) == 1
    assert "red/03.png" in capsys.readouterr().err


def test_finetune_does_not_guess_preprocessing(tmp_path, image_folder, capsys):
    prefix = save_vgg(tmp_path / "bare" / "vgg")
    assert finetune(tmp_path / "run", prefix, image_folder) == 1
    assert "say which with --preprocess MODE: caffe" in capsys.readouterr().err


def test_every_flag_of_finetune_is_in_a_group(capsys):
    assert main(["finetune", "--help"]) == 0
    titles = re.findall("^╭─ (.+?) ─+╮", capsys.readouterr().out, re.M)
    assert titles == [
        "Arguments", "Usual flags", "Model", "Data", "What is trained", "Optimization", "Head",
        "Activation cache", "Precision", "Run", "General",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_image_folder_may_be_the_only_argument(tmp_path, model, image_folder, capsys):
    flags = ["--model", model, "--out", tmp_path / "run", "--epochs", 1, "--cache", "off"]
    assert main(["finetune", str(image_folder), *map(str, flags)]) == 0
    printed = capsys.readouterr()
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["image_folder"] == str(image_folder)
    for verb in ("evaluate", "predict", "serve", "export"):
        assert f" vgg-transfer {verb} {tmp_path / 'run'}" in printed.err
    assert main(["finetune", "absent"]) == 1
    assert (
        "'absent' is neither a folder of images nor a manifest; a tfds dataset"
        in capsys.readouterr().err
    )
    assert main(["finetune", str(image_folder), "--dataset", "digits"]) == 1
    assert "images are given twice" in capsys.readouterr().err


@pytest.mark.slow
def test_models_of_last_epochs_are_kept(tmp_path, model, image_folder):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder, "--epochs", 5, "--max-to-keep", 2) == 0
    kept = sorted(path.name for path in out.glob("model*.index"))
    steps = yaml.safe_load((out / "metrics.json").read_text())["train"]["steps"]
    per_epoch = steps // 5
    assert kept == sorted(["model.index", f"model-{4 * per_epoch}.index", f"model-{steps}.index"])
    assert [path.name for path in out.glob("*.meta")] == ["model.meta"]
    with tf.Graph().as_default(), tf1.Session() as session:
        saver = tf1.train.import_meta_graph(str(out / "model.meta"))
        saver.restore(session, str(out / f"model-{steps}"))
        restored = session.run("head/weights:0")
    last = Classifier.load(out)
    features = np.ones([1, 32], np.float32)
    bias = last.head(np.zeros([1, 32], np.float32))
    np.testing.assert_allclose(features @ restored, last.head(features) - bias, atol=1e-5)
