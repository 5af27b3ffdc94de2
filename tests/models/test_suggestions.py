"""Fine-tuning accepts what ``inspect`` suggests; without a suggestion there is a reason."""

import json
import shlex

import pytest
import strangers
import tensorflow as tf
from commands import finetune, flags_of, metrics, planned, saved_values
from conftest import make_image_folder

from recipes.cli import main
from recipes.finetune_flags import FinetuneConfig
from transfer import load_meta_graph
from transfer.images.preprocess import parse_size
from transfer.models.inspection import inspect
from transfer.runs.run_folder import read_config

tf1 = tf.compat.v1

# Program to flags of the suggested command.
SUGGESTED = {
    "a_feed_beside_the_images": {"--feed": "strength:0=1.0", "--preprocess": "unit"},
    "a_batch_that_is_a_number": {"--feed": "batch_size:0=1.0", "--preprocess": "unit"},
    "jpeg_files": {"--input": "ResizeBilinear", "--preprocess": "none"},
    "many_jpeg_files": {"--input": "map/TensorArrayStack/TensorArrayGatherV3"},
    "an_image_size_that_the_flatten_states": {"--image-size": "40"},
    "an_image_size_that_the_product_states": {"--image-size": "12"},
    "windows_larger_than_usual_images": {"--image-size": "256"},
    "towers_of_a_split": {"--input": "split:1", "--tap": "tower_1/net/fc7/relu"},
    "towers_of_slices": {"--input": "tower_2/net/strided_slice"},
    "dropout_that_is_always_on": {"--tap": "dropout/SelectV2"},
    "whole_numbers": {"--preprocess": "none"},
}
REFUSED = {
    "a_size_that_is_not_square_and_not_stated": "no square size fits, for 'pool2:0' must have 112",
    "two_inputs": "metadata:0 of shape (None, 5), which a single number cannot replace",
    "an_operation_that_is_not_arithmetic": "PyFunc",
}


@pytest.mark.parametrize("name", strangers.ALL)
def test_suggested_command_passes_checks_of_finetune(tmp_path, name):
    found = inspect(load_meta_graph(strangers.save(strangers.ALL[name], tmp_path / "m")))
    if name in REFUSED:
        assert found.command is None
        assert REFUSED[name] in found.command_problem
        return
    assert found.command_problem is None
    flags = flags_of(found.command)
    assert SUGGESTED.get(name, {}).items() <= flags.items()
    settled = planned(flags)
    assert settled.network.output == found.taps[0].name
    assert settled.network.input == found.input


@pytest.mark.slow
@pytest.mark.parametrize("name", ["towers_of_slices", "images_that_are_not_square", "jpeg_files"])
def test_suggested_command_trains_as_printed(tmp_path, name, capsys):
    model = strangers.save(strangers.ALL[name], tmp_path / "model" / "m")
    photos = make_image_folder(tmp_path / "photos", 6)
    assert main(["inspect", model, "--json"]) == 0
    words = shlex.split(json.loads(capsys.readouterr().out)["command"])[1:]
    run = tmp_path / "run"
    words += ["--image-folder", str(photos), "--epochs", "1", "--out", str(run)]
    assert main(words) == 0, capsys.readouterr().err
    assert metrics(run)["train"]["epochs"] == 1


def test_image_size_of_flags_is_a_number_or_two():
    assert FinetuneConfig(image_size="100x200").image_size == "100x200"
    assert parse_size("100x200") == (100, 200)
    assert parse_size("64x64") == parse_size(64) == 64
    for text in ("12x", "1x2x3", "large", "-4", "0x9"):
        with pytest.raises(ValueError, match="image size"):
            parse_size(text)


@pytest.mark.slow
def test_finetune_warns_of_layers_behind_stopped_gradient(tmp_path, capsys):
    model = strangers.save(strangers.gradients_that_stop, tmp_path / "model" / "m")
    photos, run = make_image_folder(tmp_path / "photos", 6), tmp_path / "run"
    flags = ("--tap", "fc7/relu", "--preprocess", "unit", "--epochs", 1)
    assert finetune(run, model, photos, *flags, "--freeze-until", "none") == 0
    warning = capsys.readouterr().err
    assert "stops gradients at 'frozen:0': 2 of the variables after the cut 'none'" in warning
    assert "(conv1/weights, conv1/biases); --freeze-until frozen trains the same" in warning
    before, after = saved_values(model), saved_values(run / "model")
    changed = {name for name in after if name in before and (before[name] != after[name]).any()}
    assert changed == {"conv2/weights", "conv2/biases", "fc7/weights", "fc7/biases"}
    assert finetune(tmp_path / "cut", model, photos, *flags, "--freeze-until", "frozen") == 0
    assert "stops gradients" not in capsys.readouterr().err
    assert metrics(run)["params"] == metrics(tmp_path / "cut")["params"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_renamed_run_is_written_with_the_names_of_the_graph_and_resumes(tmp_path, capsys):
    with tf.Graph().as_default(), tf1.Session() as session:
        strangers.vectors()
        session.run(tf1.global_variables_initializer())
        keys = {v.op.name.replace("weights", "kernel"): v for v in tf1.global_variables()}
        tf1.train.Saver(keys).save(session, str(tmp_path / "m"), write_meta_graph=False)
        tf1.train.export_meta_graph(str(tmp_path / "m.meta"))
    command = inspect(load_meta_graph(tmp_path / "m")).command
    assert "--rename=weights=kernel" in shlex.split(command)
    photos, run = make_image_folder(tmp_path / "photos", 6), tmp_path / "run"
    words = [*shlex.split(command)[1:], "--image-folder", str(photos), "--out", str(run)]
    assert main([*words, "--epochs", "1"]) == 0, capsys.readouterr().err
    assert read_config(run)["rename"] == ["weights=kernel"]
    assert {"conv1/weights", "fc7/weights"} <= saved_values(run / "model").keys()
    again = ["finetune", "--config", str(run / "config.yaml"), "--epochs", "2", "--resume"]
    assert main(again) == 0, capsys.readouterr().err
    assert metrics(run)["train"]["epochs"] == 2
    assert main(["evaluate", str(run)]) == 0
