"""`evaluate` from end to end, on small networks and generated photos."""

import csv
import json
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from commands import finetune, metrics
from conftest import make_image_folder

from recipes.cli import main

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(autouse=True)
def _own_session():
    keras.backend.clear_session()


@pytest.mark.slow_variants
@pytest.mark.parametrize("cut", ["tap", "pool1", "none"])
def test_evaluate_reproduces_the_reported_metrics(tmp_path, run_of, cut, capsys):
    out = shutil.copytree(run_of("--freeze-until", cut), tmp_path / "run")
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
def test_evaluate_on_other_splits_and_folders(tmp_path, copy_of_finished_run, capsys):
    out = copy_of_finished_run
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
def test_evaluate_uses_recorded_held_out_images(tmp_path, model, own_image_folder, capsys):
    """Passing the run's own data, or adding images to it, does not change the held-out images."""
    out = tmp_path / "run"
    assert finetune(out, model, own_image_folder) == 0
    shutil.copy(own_image_folder / "red" / "00.jpg", own_image_folder / "red" / "99.jpg")
    assert main(["evaluate", str(out), "--image-folder", str(own_image_folder)]) == 0
    assert "on 4 images" in capsys.readouterr().out
    with (out / "predictions.csv").open() as file:
        found = {row["image"] for row in csv.DictReader(file)}
    assert found == set((out / "held_out.txt").read_text().split())
    (own_image_folder / min(found)).unlink()
    assert main(["evaluate", str(out)]) == 1
    assert "1 of the 4 images that the run held out are gone" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_finds_held_out_images_in_a_moved_folder(
    tmp_path, model, own_image_folder, capsys
):
    out = tmp_path / "run"
    assert finetune(out, model, own_image_folder) == 0
    moved = own_image_folder.rename(tmp_path / "moved")
    assert main(["evaluate", str(out)]) == 1
    error = capsys.readouterr().err
    assert "does not exist; move them back, or put a link to their new place there" in error
    assert "or say where they are now: --image-folder DIR or --csv FILE" in error
    assert main(["evaluate", str(out), "--image-folder", str(moved)]) == 0
    assert "on 4 images" in capsys.readouterr().out  # not on the training images
    shutil.copy(moved / "red" / "00.jpg", moved / "red" / "02.jpg")  # other images now
    assert main(["evaluate", str(out), "--image-folder", str(moved)]) == 0
    assert "on 24 images" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate_in_a_new_process(tmp_path, run_of):
    out = shutil.copytree(run_of("--freeze-until", "pool1"), tmp_path / "run")
    command = [sys.executable, "-m", "recipes", "evaluate", str(out)]
    subprocess.run(command, capture_output=True, check=True)
    figures = json.loads((out / "evaluation.json").read_text())
    assert figures["loss"] == metrics(out)["eval"]["loss"]
    assert (out / "report.html").is_file()


@pytest.mark.slow
def test_evaluate_asserts_minimum_accuracy(copy_of_finished_run, monkeypatch, capsys):
    out = copy_of_finished_run
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
def test_evaluate_warns_about_images_not_held_out(copy_of_finished_run, run_of, capsys):
    out, other = copy_of_finished_run, run_of("--eval-split", "train[:5]")
    capsys.readouterr()
    assert main(["evaluate", str(out), "--eval-split", "train"]) == 0
    assert "did not hold out 20 of these 24 images" in capsys.readouterr().err
    assert main(["evaluate", str(out), "--against", str(other)]) == 0
    assert f"the run in '{other}' did not hold out" in capsys.readouterr().err
    assert (out / "changes.csv").exists()
    assert main(["evaluate", str(out)]) == 0
    assert not (out / "changes.csv").exists()


def test_evaluate_rejects_foreign_folder(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "is not a run folder: it has no config.yaml" in capsys.readouterr().err
