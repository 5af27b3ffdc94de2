import re

import numpy as np
import pytest
from conftest import make_image_folder

from transfer import Backbone, fine_tune, load_meta_graph, open_source
from transfer.finetuning import setup
from transfer.finetuning.hyperparameters import Stage
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest


def test_held_out_images_with_other_classes_are_refused(tmp_path, model, image_folder):
    train = open_source(image_folder=str(image_folder)).split("train")
    other = make_image_folder(tmp_path / "test")
    (other / "blue").rename(other / "yellow")
    held_out = open_source(image_folder=str(other)).split("train")
    message = "'photos' have 2 classes, and .* 'test' have 2, with blue, yellow in one of them only"
    with pytest.raises(ValueError, match=message):
        fine_tune(model, train, held_out, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("role", ["train", "held_out"])
def test_splits_without_images_are_refused(tmp_path, model, image_folder, role):
    whole = open_source(image_folder=str(image_folder)).split("train")
    splits = {"train": whole, "held_out": whole} | {role: whole.where(np.zeros(len(whole), bool))}
    with pytest.raises(ValueError, match=re.escape(f"{role} has no images")):
        fine_tune(model, splits["train"], splits["held_out"], run_dir=tmp_path / "run")


@pytest.mark.parametrize("is_one", [False, True])
def test_images_that_changed_between_two_runs_have_other_ids(
    tmp_path, model, own_image_folder, monkeypatch, is_one
):
    """The caller may pass the same splits again; activations are cached by the ids."""

    class Reached(Exception):
        pass

    def inspect(train, held_out, options, verbose):
        assert (train is held_out) == is_one  # they are compared unless it is one split
        seen.append((train.ids.tolist(), held_out.ids.tolist()))
        raise Reached

    seen = []
    monkeypatch.setattr(setup, "inspect_images", inspect)
    train, held_out = open_source(image_folder=str(own_image_folder)).train_and_eval_splits()
    request = RunRequest(load_meta_graph(model), train, train if is_one else held_out)
    for _ in range(2):
        with pytest.raises(Reached):
            setup.prepare(request)
        for split in (train, held_out):
            path = own_image_folder / split.names[0]
            path.write_bytes(path.read_bytes() + b" ")
    for before, after in zip(*seen, strict=True):
        assert before[0] != after[0]
        assert before[1:] == after[1:]


def test_tap_that_is_the_input_is_reported(model, image_folder, caplog):
    splits = open_source(image_folder=str(image_folder)).train_and_eval_splits()
    options = FineTuneOptions(tap="images", cache="memory")
    setup.prepare(RunRequest(load_meta_graph(model), *splits, options))
    assert "tap images:0 is the input of the network" in caplog.text


def test_options_without_effect_are_reported(model, image_folder, caplog):
    splits = open_source(image_folder=str(image_folder)).train_and_eval_splits()
    graph = load_meta_graph(model)
    backbone = Backbone(graph)

    def reported(cut="fc7", **given):
        request = RunRequest(graph, *splits, FineTuneOptions(**given))
        caplog.clear()
        setup._check_used(request, backbone, [Stage(cut, 1, 0.1, 1.0)])
        return caplog.text

    for name, value in {
        "backbone_lr_scale": 0.1,
        "block_lr_decay": 0.5,
        "warmup_epochs": 1.0,
        "keep_checkpoint_every_n_hours": 2.0,
    }.items():
        assert f"{name}={value} has no effect on this run" in reported(**{name: value})
    assert "warmup_epochs=1.0" in reported("pool1", warmup_epochs=1.0, lr_schedule="constant")
    assert not reported(warmup_epochs=1.0, lr_schedule="cosine")
    assert not reported("pool1", warmup_epochs=1.0, backbone_lr_scale=0.1)
    assert not reported(backbone_lr_scale=1.0, solver="gradient")  # as config.yaml of a run has it
    with pytest.raises(ValueError, match="keep_checkpoint_every_n_hours must be at least 0"):
        FineTuneOptions(keep_checkpoint_every_n_hours=-1.0, max_to_keep=1).check()
