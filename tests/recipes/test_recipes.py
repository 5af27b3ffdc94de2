"""The command line from end to end, on small networks and generated photos."""

import csv
import json
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import yaml
from commands import finetune, metrics, saved_values
from conftest import make_image_folder, save_vgg

from recipes.cli import VERBS, main
from transfer import Backbone, Classifier, load_meta_graph, save_meta_graph
from transfer.training.trainer import Trainer

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


def test_frozen_backbone_is_bit_identical(tmp_path, model, image_folder):
    assert finetune(tmp_path / "run", model, image_folder) == 0
    names = Backbone(load_meta_graph(model)).variable_names
    before, after = (saved_values(p, names) for p in (model, tmp_path / "run" / "model"))
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


@pytest.mark.slow_variants
@pytest.mark.parametrize("cut", ["tap", "pool1", "none"])
def test_evaluate_reproduces_the_reported_metrics(tmp_path, model, image_folder, cut, capsys):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder, "--freeze-until", cut) == 0
    capsys.readouterr()
    assert main(["evaluate", str(out), "--probabilities", str(tmp_path / "p.npy")]) == 0
    figures = json.loads((out / "evaluation.json").read_text())
    reported = metrics(out)["eval"]
    assert {name: figures[name] for name in reported} == reported
    assert f"accuracy {reported['accuracy']:.4f} on 4 images" in capsys.readouterr().out

    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({row["image"] for row in rows}) == 4
    assert np.mean([r["label"] == r["prediction"] for r in rows]) == reported["accuracy"]
    assert all(float(r["p(blue)"]) + float(r["p(red)"]) == pytest.approx(1, abs=1e-5) for r in rows)
    expected = [[float(r["p(blue)"]), float(r["p(red)"])] for r in rows]
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), expected, atol=1e-6)
    with (out / "confusion.csv").open() as file:
        counts = np.array([row[1:] for row in csv.reader(file)][1:], int)
    assert counts.sum() == 4
    assert counts.trace() / 4 == reported["accuracy"]


@pytest.mark.slow
def test_evaluate_on_other_splits_and_folders(tmp_path, model, image_folder, capsys):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder, "--epochs", 30) == 0
    assert main(["evaluate", str(out), "--eval-split", "train[:7]"]) == 0
    assert "on 7 images" in capsys.readouterr().out
    other = make_image_folder(tmp_path / "other", 5)
    assert main(["evaluate", str(out), "--image-folder", str(other)]) == 0
    assert "on 10 images" in capsys.readouterr().out
    (other / "red").rename(other / "crimson")
    assert main(["evaluate", str(out), "--image-folder", str(other)]) == 1
    error = capsys.readouterr().err
    assert "1 are new (crimson), 1 are missing (red)" in error


@pytest.mark.slow
def test_evaluate_uses_recorded_held_out_images(tmp_path, model, image_folder, capsys):
    """Passing the run's own data, or adding images to it, does not change the held-out images."""
    out = tmp_path / "run"
    assert finetune(out, model, image_folder) == 0
    shutil.copy(image_folder / "red" / "00.jpg", image_folder / "red" / "99.jpg")
    assert main(["evaluate", str(out), "--image-folder", str(image_folder)]) == 0
    assert "on 4 images" in capsys.readouterr().out
    with (out / "predictions.csv").open() as file:
        found = {row["image"] for row in csv.DictReader(file)}
    assert found == set((out / "held_out.txt").read_text().split())
    (image_folder / min(found)).unlink()
    assert main(["evaluate", str(out)]) == 1
    assert "1 of the 4 images that the run held out are gone" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_in_a_new_process(tmp_path, model, image_folder):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder, "--freeze-until", "pool1") == 0
    command = [sys.executable, "-m", "recipes", "evaluate", str(out)]
    subprocess.run(command, capture_output=True, check=True)
    figures = json.loads((out / "evaluation.json").read_text())
    assert figures["loss"] == metrics(out)["eval"]["loss"]


@pytest.mark.slow
def test_evaluate_asserts_minimum_accuracy(tmp_path, model, image_folder, monkeypatch, capsys):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder) == 0
    assert main(["evaluate", str(out), "--assert-accuracy-at-least", "0"]) == 0
    figures = {"accuracy": 0.5, "accuracy_ci95": [0.4, 0.6], "num_examples": 9, "loss": 1.0}
    monkeypatch.setattr(
        "transfer.runs.evaluation.evaluate_run", lambda *_, **__: figures | {"top5": 1.0}
    )
    assert main(["evaluate", str(out), "--assert-accuracy-at-least", "0.5"]) == 0
    assert main(["evaluate", str(out), "--assert-accuracy-at-least", "0.51"]) == 1
    assert "accuracy 0.5000 is below 0.51" in capsys.readouterr().err
    for wrong in ("1.01", "nan"):
        assert main(["evaluate", str(out), "--assert-accuracy-at-least", wrong]) == 1
        assert "must be 0 to 1" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_warns_about_images_not_held_out(tmp_path, model, image_folder, capsys):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder) == 0
    capsys.readouterr()
    assert main(["evaluate", str(out), "--eval-split", "train"]) == 0
    assert "did not hold out 20 of these 24 images" in capsys.readouterr().err
    other = tmp_path / "other"
    assert finetune(other, model, image_folder, "--eval-split", "train[:5]") == 0
    capsys.readouterr()
    assert main(["evaluate", str(out), "--against", str(other)]) == 0
    assert f"the run in '{other}' did not hold out" in capsys.readouterr().err
    assert (out / "changes.csv").exists()
    assert main(["evaluate", str(out)]) == 0
    assert not (out / "changes.csv").exists()


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
def test_a_fine_tuned_model_can_be_fine_tuned(tmp_path, model, image_folder):
    assert finetune(tmp_path / "first", model, image_folder) == 0
    assert finetune(tmp_path / "second", tmp_path / "first", image_folder) == 0


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model(tmp_path, model, image_folder):
    for name in ("a", "b"):
        flags = ["--augment", "--dropout", 0.2, "--freeze-until", "pool2"]
        assert finetune(tmp_path / name, model, image_folder, *flags) == 0
    data = "model.data-00000-of-00001"
    assert (tmp_path / "a" / data).read_bytes() == (tmp_path / "b" / data).read_bytes()


@pytest.mark.slow
def test_resume_ends_where_an_uninterrupted_run_ends(
    tmp_path, model, image_folder, monkeypatch, capsys
):
    flags = ["--freeze-until", "pool2", "--dropout", 0.2, "--epochs", 4]
    assert finetune(tmp_path / "whole", model, image_folder, *flags) == 0
    train_epoch = Trainer.train_epoch

    def interrupted(self, *arguments, **options):
        if self.epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", interrupted)
        assert finetune(tmp_path / "parts", model, image_folder, *flags) == 130
    out = tmp_path / "parts"
    hint = f"resume with: vgg-transfer finetune --config {out}/config.yaml --out {out} --resume"
    assert capsys.readouterr().err.endswith(f"error: interrupted; {hint}\n")
    assert finetune(tmp_path / "parts", model, image_folder, *flags, "--resume") == 0
    data = "model.data-00000-of-00001"
    assert (tmp_path / "whole" / data).read_bytes() == (tmp_path / "parts" / data).read_bytes()
    assert metrics(tmp_path / "whole")["eval"] == metrics(tmp_path / "parts")["eval"]
    assert len((tmp_path / "parts" / "history.csv").read_text().splitlines()) == 5


@pytest.mark.slow
def test_resume_with_more_epochs_continues(tmp_path, model, image_folder):
    assert finetune(tmp_path / "whole", model, image_folder, "--epochs", 4) == 0
    assert finetune(tmp_path / "parts", model, image_folder, "--epochs", 2) == 0
    assert finetune(tmp_path / "parts", model, image_folder, "--epochs", 4, "--resume") == 0
    assert metrics(tmp_path / "whole")["eval"] == metrics(tmp_path / "parts")["eval"]


@pytest.mark.slow
def test_resume_accepts_runs_older_than_a_flag(tmp_path, model, image_folder):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder, "--epochs", 1) == 0
    config = out / "config.yaml"
    kept = [line for line in config.read_text().splitlines(True) if "skip_unreadable" not in line]
    config.write_text("".join(kept))
    assert finetune(out, model, image_folder, "--epochs", 2, "--resume") == 0
    assert metrics(out)["train"]["epochs"] == 2


@pytest.mark.slow
def test_resume_rejects_other_flags(tmp_path, model, image_folder, capsys):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder, "--epochs", 1) == 0
    config = (out / "config.yaml").read_text()
    flags = ["--resume", "--epochs", 2, "--learning-rate", 0.5, "--hidden", 4]
    assert finetune(out, model, image_folder, *flags) == 1
    error = capsys.readouterr().err
    assert "--hidden None, now [4]; --learning-rate 0." in error
    assert (out / "config.yaml").read_text() == config
    assert main(["finetune", "--resume"]) == 1
    assert "--resume needs the folder of the run" in capsys.readouterr().err


@pytest.mark.slow
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
    "rate": (["--learning-rate", "-1"], "--learning-rate must be at least 0, got -1"),
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


def test_finetune_names_unreadable_image(tmp_path, model, image_folder, capsys):
    (image_folder / "red" / "03.png").write_bytes(b"\x89PNG nonsense")
    assert finetune(tmp_path / "run", model, image_folder) == 1
    assert "red/03.png" in capsys.readouterr().err


def test_finetune_does_not_guess_preprocessing(tmp_path, image_folder, capsys):
    prefix = save_vgg(tmp_path / "bare" / "vgg")
    assert finetune(tmp_path / "run", prefix, image_folder) == 1
    assert "say which with --preprocess MODE: caffe" in capsys.readouterr().err


def test_usage_error_is_status_2(capsys):
    for arguments in (["finetune", "--epoch", "3"], ["finetune", "--epochs", "many"], ["evaluate"]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert main(["conquer"]) == 2


def test_evaluate_rejects_foreign_folder(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "is not a run folder: it has no config.yaml" in capsys.readouterr().err


def test_help_does_not_import_tensorflow():
    code = (
        "import sys, recipes.cli as cli\n"
        "for verb in cli.VERBS: assert cli.main([verb, '--help']) == 0\n"
        "cli.main(['--help']); print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb in VERBS:
        assert f"Usage: vgg-transfer {verb}" in done.stdout
    assert done.stdout.endswith("False\n")
    listed = re.findall(
        r"^│ ([a-z][a-z-]+)  +\S", done.stdout.split("Usage: vgg-transfer COMMAND")[1], re.M
    )
    assert listed == list(VERBS)  # in the order of the work, each with a summary


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
def test_quiet_shows_results_and_warnings_only(tmp_path, model, image_folder, capfd, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "")  # the flag sets it; it is unset at the end of the test
    flags = ["--model", model, "--out", tmp_path / "run", "--epochs", 2, "--cache", "off"]
    assert main([*map(str, ["finetune", image_folder, "--quiet", *flags])]) == 0
    printed = capfd.readouterr()
    assert printed.out.splitlines()[-1] == str(tmp_path / "run")
    assert [line for line in printed.err.splitlines() if not line.startswith("warning: ")] == []


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["finetun"], '"finetune"'),
        (["finetune", "--epoch", "2"], "--epochs"),
        (["predict", "run", "a.jpg", "--topk", "3"], "--top-k"),
        (["--verson"], "--version"),
        (["--quite", "finetune"], "--quiet"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_similar_verbs_and_flags_are_suggested(words, suggestion, capsys):
    assert main(words) == 2
    assert f"Did you mean {suggestion}?" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_with_verbs_and_flags(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("finetune", "check-data", "freeze-until"):
        assert word in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert "\ncomplete -o default -F " in script  # files, where no word fits


def test_the_package_is_a_command():
    command = [sys.executable, "-m", "recipes", "inspect", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage: vgg-transfer inspect" in done.stdout


@pytest.mark.slow
def test_pretrained_model_can_be_fine_tuned(tmp_path, image_folder, capsys):
    out = tmp_path / "pretrained"
    flags = ["--image-folder", image_folder, "--epochs", 1, "--batch-size", 10, "--out", out]
    assert main(["pretrain", *map(str, flags)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "vgg_small")
    graph = load_meta_graph(out)
    assert graph.card.preprocess == "torch"
    assert graph.card.eval["num_examples"] == 4
    assert graph.card.source.startswith("vgg-transfer pretrain --arch vgg_small ")
    assert finetune(tmp_path / "run", out, image_folder) == 0


@pytest.mark.slow
def test_pretrain_resumes_an_interrupted_run(tmp_path, image_folder):
    def run(out, epochs, *flags):
        shared = ["--image-folder", image_folder, "--batch-size", 10, "--out", out]
        return main(["pretrain", *map(str, [*shared, "--epochs", epochs, *flags])])

    assert run(tmp_path / "a", 1) == 0
    assert run(tmp_path / "a", 2, "--resume") == 0
    assert len((tmp_path / "a" / "history.csv").read_text().splitlines()) == 3
    assert run(tmp_path / "b", 1, "--arch", "resnet") == 1


@pytest.mark.slow
def test_pretrain_starts_with_small_images(tmp_path, image_folder, capsys):
    shared = ["--image-folder", image_folder, "--batch-size", 10, "--epochs", 2]
    small = ["--small-epochs", 1, "--small-size"]

    def run(*flags):
        return main(["pretrain", *map(str, [*shared, *flags])])

    assert run("--out", tmp_path / "a", *small, 40) == 0
    graph = load_meta_graph(tmp_path / "a")
    assert graph.card.image_size == 64
    assert "--small-epochs 1 --small-size 40" in graph.card.source
    assert run("--out", tmp_path / "b", *small, 32) == 1
    assert "33 to 64 pixels" in capsys.readouterr().err
    assert run("--out", tmp_path / "b", *small[:2]) == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_pretrain_retrains_fully_connected_layers(tmp_path, image_folder):
    shared = ["--image-folder", image_folder, "--batch-size", 10, "--epochs", 2]

    def run(name, *flags):
        assert main(["pretrain", *map(str, [*shared, "--out", tmp_path / name, *flags])]) == 0
        names = ("conv5_2/weights", "fc6/weights")
        weights = saved_values(tmp_path / name / "vgg_small", names)
        return weights, (tmp_path / name / "history.csv").read_text().splitlines()

    plain, _ = run("a")
    anew, history = run("b", "--fc-epochs", 2)
    assert load_meta_graph(tmp_path / "b").card.source.count("--fc-epochs 2") == 1
    assert [line.split(",")[0] for line in history] == ["epoch", "0", "1", "2", "3"]
    np.testing.assert_array_equal(anew["conv5_2/weights"], plain["conv5_2/weights"])
    assert not np.allclose(anew["fc6/weights"], plain["fc6/weights"], atol=1e-3)
    # A run that ended before these epochs continues to the same result; a finished one stays.
    resumed, resumed_history = run("a", "--fc-epochs", 2, "--resume")
    np.testing.assert_array_equal(resumed["fc6/weights"], anew["fc6/weights"])
    assert resumed_history == history
    again, again_history = run("b", "--fc-epochs", 2, "--resume")
    np.testing.assert_array_equal(again["fc6/weights"], anew["fc6/weights"])
    assert again_history == history


def test_inspect_prints_one_screen(model, capsys):
    assert main(["inspect", str(model)]) == 0
    out = capsys.readouterr().out
    for part in ("images:0", "takes the images", "fc7", "12 of the graph's 12 variables matched"):
        assert part in out
    assert "keep_prob: 1.0, 0.5 while training" in out
    assert f"vgg-transfer finetune --model {model}" in out
    assert len(out.splitlines()) < 50


def test_inspect_lists_the_cuts(model, capsys):
    assert main(["inspect", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("cuts for --freeze-until"))
    # 3x3 convolutions of 8, then 8 and 16 channels at 16 and 8 pixels, then 256 x 32 and 32 x 32
    work = [16 * 16 * 27 * 8, 8 * 8 * 9 * 8 * 8, 8 * 8 * 9 * 8 * 16, 256 * 32, 32 * 32]
    share = f"{work[0] / sum(work):.1%}"
    after = sum([9 * 8 * 8 + 8, 9 * 8 * 16 + 16, 256 * 32 + 32, 32 * 32 + 32])
    assert lines[first + 1].split() == [
        "pool1", "[8,", "8,", "8]", "2.0", "kB", share, f"{after / (after + 27 * 8 + 8):.1%}"
    ]  # fmt: skip


def test_inspect_prints_json(model, capsys):
    model.with_name("tiny.data-00000-of-00001").unlink()
    assert main(["inspect", str(model.with_name("tiny.meta")), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["taps"][0]["shape"] == [None, 32]
    assert found["checkpoint"]["matched"] == 12
    assert "lacks its data" in found["checkpoint"]["problem"]


@pytest.mark.slow
def test_command_suggested_by_inspect_works(tmp_path, model, capsys):
    assert main(["inspect", str(model), "--json"]) == 0
    command = json.loads(capsys.readouterr().out)["command"]
    flags = ["--epochs", "1", "--out", str(tmp_path / "run"), "--shots-per-class", "4"]
    assert main([*command.split()[1:], *flags]) == 0


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
