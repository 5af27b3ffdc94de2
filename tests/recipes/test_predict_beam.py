"""Predictions of the pipeline on Beam's local runner equal those of ``predict``."""

import json
from pathlib import Path

import pytest

from recipes.cli import main

pytest.importorskip("apache_beam", reason="needs Apache Beam: the extra 'beam'")


@pytest.fixture
def run(finished_run: Path) -> Path:
    return finished_run


def lines(folder: Path, pattern: str) -> dict[str, dict]:
    found = [json.loads(line) for p in folder.glob(pattern) for line in p.read_text().splitlines()]
    assert len({one["image"] for one in found}) == len(found)
    return {one["image"]: one for one in found}


@pytest.mark.slow
def test_beam_predictions_equal_those_of_predict(run, own_image_folder, tmp_path, capsys):
    (own_image_folder / "red" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    out = tmp_path / "out" / "predictions"
    pattern = f"{own_image_folder}/**.*"
    assert main(["predict-beam", str(run), pattern, "--output", str(out), "--top-k", "2"]) == 1
    assert "25 images, 1 of which could not be read" in capsys.readouterr().out
    assert (
        main(["predict", str(run), str(own_image_folder), "--format", "jsonl", "--top-k", "2"]) == 1
    )
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = lines(out.parent, "predictions-*.jsonl")
    assert found.keys() == {one["image"] for one in expected}
    for one in expected:
        for first, second in zip(
            one["predictions"], found[one["image"]]["predictions"], strict=True
        ):
            assert first["label"] == second["label"]
            assert first["probability"] == pytest.approx(second["probability"], abs=1e-5)
    (failed,) = lines(out.parent, "predictions.failed-*.jsonl").values()
    assert failed["image"].endswith("cut.jpg")
    assert failed["error"]


@pytest.mark.slow
def test_options_after_two_dashes_go_to_beam(run, image_folder, tmp_path, capsys):
    out = tmp_path / "predictions"
    words = ["predict-beam", str(run), f"{image_folder}/red/*", "--output", str(out)]
    assert main([*words, "--", "--runner", "NoSuchRunner"]) == 1
    assert "NoSuchRunner" in capsys.readouterr().err
    assert main([*words, "--", "--runner", "DirectRunner"]) == 0
    assert len(lines(tmp_path, "predictions-*.jsonl")) == 12


def test_missing_model_or_images_are_reported(run, image_folder, tmp_path, capsys):
    out = str(tmp_path / "predictions")
    assert main(["predict-beam", str(tmp_path), f"{image_folder}/*/*", "--output", out]) == 1
    assert "neither a run folder nor the checkpoint prefix of a model" in capsys.readouterr().err
    assert main(["predict-beam", str(run), f"{tmp_path}/none/*.jpg", "--output", out]) == 1
    assert "no file matches" in capsys.readouterr().err


def test_model_is_loaded_from_beam_filesystem(run, monkeypatch):
    from transfer.evaluation import beam

    here = beam.load(f"{run}/model")
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: str(run) not in str(self) and is_file(self))
    fetched = beam.load(f"{run}/model")
    assert fetched.labels == here.labels
    assert fetched.backbone.digest() == here.backbone.digest()
