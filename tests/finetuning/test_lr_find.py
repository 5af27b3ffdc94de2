"""The learning-rate range test from Python equals ``vgg-transfer lr-find``."""

import csv

import pytest

from recipes.cli import main
from transfer import load_meta_graph, open_source
from transfer.finetuning.lr_find import find_learning_rate
from transfer.finetuning.options import FineTuneOptions
from transfer.finetuning.request import RunRequest
from transfer.runs import run_folder


@pytest.fixture
def splits(image_folder):
    return open_source(image_folder=str(image_folder)).train_and_eval_splits()


@pytest.mark.slow
def test_find_learning_rate_equals_command_line(tmp_path, model, image_folder, splits, capsys):
    request = RunRequest(load_meta_graph(model), *splits, FineTuneOptions(cache="memory"))
    found = find_learning_rate(request, steps=20)
    out = tmp_path / "trial"
    flags = ["--model", model, "--image-folder", image_folder, "--out", out, "--steps", 20]
    assert main(["lr-find", *map(str, flags), "--cache", "memory"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"--learning-rate {found.suggestion:g}"
    config = run_folder.read_config(out)  # of a run with this rate, not of the trial
    assert f"{config['learning_rate']:g}" == f"{found.suggestion:g}"
    assert (config["lr_schedule"], config["solver"]) == ("auto", "auto")
    with (out / "lr_find.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["loss"] for row in rows] == [f"{loss:.6g}" for loss in found.losses]


@pytest.mark.parametrize("given", [{"schedule": "fc7:1,pool2:1"}, {"lbfgs_c": 0.1}])
def test_lr_find_rejects_several_stages_and_solvers(model, splits, given):
    with pytest.raises(ValueError, match="leave out schedule=STAGES, solver=NAME, lbfgs_c=C"):
        find_learning_rate(RunRequest(load_meta_graph(model), *splits, FineTuneOptions(**given)))
