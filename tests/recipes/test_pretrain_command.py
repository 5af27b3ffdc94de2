"""`pretrain` from end to end, on generated photos."""

import keras
import numpy as np
import pytest
from commands import finetune, saved_values
from conftest import TINY

from recipes import pretrain
from recipes.cli import main
from transfer import load_meta_graph
from transfer.evaluation import metrics_text
from transfer.vgg import pretraining_run
from transfer.vgg.architectures import ARCHITECTURES


@pytest.fixture(autouse=True)
def _own_session():
    keras.backend.clear_session()


@pytest.fixture
def tiny(monkeypatch):
    """A small network under the name of the default one."""
    monkeypatch.setitem(ARCHITECTURES, "vgg_small", TINY)


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


def test_images_of_a_folder_are_recorded_as_such(tmp_path, image_folder, monkeypatch):
    """The default dataset would be that of another model."""
    seen = {}

    def stand_in(train, held_out, options, **arguments):
        seen.update(arguments)
        return pretraining_run.PretrainResult(tmp_path, {"accuracy": 1.0, "num_examples": 1})

    monkeypatch.setattr(pretraining_run, "pretrain", stand_in)
    monkeypatch.setattr(metrics_text, "describe_accuracy", lambda *_: "")
    assert main(["pretrain", "--image-folder", str(image_folder), "--eval-split", "auto"]) == 0
    assert seen["origin"]["dataset"] is None
    assert seen["origin"]["image_folder"] == str(image_folder)
    assert f" --image-folder {image_folder.name} " in seen["source"]
    assert "--dataset" not in seen["source"]
    assert " --dataset tiny_imagenet " in pretrain._command(pretrain.PretrainConfig())


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_pretrain_resumes_an_interrupted_run(tmp_path, image_folder):
    def run(out, epochs, *flags):
        shared = ["--image-folder", image_folder, "--batch-size", 10, "--out", out]
        return main(["pretrain", *map(str, [*shared, "--epochs", epochs, *flags])])

    assert run(tmp_path / "a", 1) == 0
    config = tmp_path / "a" / "config.yaml"
    config.write_text(f"{config.read_text()}dataset: tiny_imagenet\n")  # as in earlier versions
    assert run(tmp_path / "a", 2, "--resume") == 0
    assert len((tmp_path / "a" / "history.csv").read_text().splitlines()) == 3
    assert run(tmp_path / "b", 1, "--arch", "resnet") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_pretrain_starts_with_small_images(tmp_path, image_folder, capsys):
    shared = ["--image-folder", image_folder, "--batch-size", 10, "--epochs", 2]
    small = ["--small-epochs", 1, "--small-size"]

    def run(*flags):
        return main(["pretrain", *map(str, [*shared, *flags])])

    assert run("--out", tmp_path / "a", *small, 14) == 0
    graph = load_meta_graph(tmp_path / "a")
    assert graph.card.image_size == 16
    assert "--small-epochs 1 --small-size 14" in graph.card.source
    assert run("--out", tmp_path / "b", *small, 12) == 1
    assert "13 to 16 pixels" in capsys.readouterr().err
    assert run("--out", tmp_path / "b", *small[:2]) == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_pretrain_retrains_fully_connected_layers(tmp_path, image_folder):
    shared = ["--image-folder", image_folder, "--batch-size", 10, "--epochs", 2]

    def run(name, *flags):
        assert main(["pretrain", *map(str, [*shared, "--out", tmp_path / name, *flags])]) == 0
        names = ("conv2_2/weights", "fc6/weights")
        weights = saved_values(tmp_path / name / "vgg_small", names)
        return weights, (tmp_path / name / "history.csv").read_text().splitlines()

    plain, _ = run("a")
    anew, history = run("b", "--fc-epochs", 2)
    assert load_meta_graph(tmp_path / "b").card.source.count("--fc-epochs 2") == 1
    assert [line.split(",")[0] for line in history] == ["epoch", "0", "1", "2", "3"]
    np.testing.assert_array_equal(anew["conv2_2/weights"], plain["conv2_2/weights"])
    assert not np.allclose(anew["fc6/weights"], plain["fc6/weights"], atol=1e-3)
    # A run that ended before these epochs continues to the same result; a finished one stays.
    resumed, resumed_history = run("a", "--fc-epochs", 2, "--resume")
    np.testing.assert_array_equal(resumed["fc6/weights"], anew["fc6/weights"])
    assert resumed_history == history
    again, again_history = run("b", "--fc-epochs", 2, "--resume")
    np.testing.assert_array_equal(again["fc6/weights"], anew["fc6/weights"])
    assert again_history == history
