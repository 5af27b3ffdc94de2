"""`vgg-transfer predict`, compared with what `evaluate` says of the same images."""

import csv
import io
import json

import numpy as np
import pytest
from commands import finetune
from PIL import Image

from recipes import predict_job
from recipes.cli import main


@pytest.fixture
def run(tmp_path, model, image_folder):
    assert finetune(tmp_path / "run", model, image_folder) == 0
    return tmp_path / "run"


def predict(run, *words):
    return main(["predict", str(run), *map(str, words)])


def test_it_says_what_evaluate_says(run, image_folder, capsys):
    assert main(["evaluate", str(run)]) == 0
    with (run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    files = [image_folder / row["image"] for row in rows]
    capsys.readouterr()
    assert predict(run, *files, "--format", "jsonl", "--top-k", 2) == 0
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in found] == [str(path) for path in files]
    for row, line in zip(rows, found, strict=True):
        assert line["predictions"][0]["label"] == row["prediction"]
        for item in line["predictions"]:
            expected = float(row[f"p({item['label']})"])
            assert item["probability"] == pytest.approx(expected, abs=1e-5)
    assert f"{len(rows)} images, " in err and "images/s" in err


def test_tables_and_csv(run, image_folder, capsys):
    capsys.readouterr()
    assert predict(run, image_folder / "red", "--top-k", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert all(str(image_folder / "red") in line for line in lines)
    assert predict(run, image_folder, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 24 * 2
    assert {row["label"] for row in rows} == {"blue", "red"}
    assert [row["rank"] for row in rows[:2]] == ["1", "2"]


def test_files_folders_patterns_and_lists(run, image_folder, monkeypatch, capsys):
    pattern = str(image_folder / "*" / "0*.jpg")
    first, second = image_folder / "red" / "00.jpg", image_folder / "blue" / "01.png"
    listed = io.StringIO(f"{first}\n\n{second}\r\n")
    monkeypatch.setattr("sys.stdin", listed)
    capsys.readouterr()
    assert predict(run, pattern, "-") == 0
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert len(names) == 10 + 2
    assert names[-1].endswith("01.png")


def test_a_bad_image_is_named_and_the_others_go_on(run, image_folder, capsys):
    (image_folder / "red" / "bad.jpg").write_bytes(b"no image")
    (image_folder / "red" / "empty.png").write_bytes(b"")
    with Image.open(image_folder / "red" / "00.jpg") as image:
        image.save(image_folder / "red" / "fine.webp")
    capsys.readouterr()
    assert predict(run, image_folder / "red", image_folder / "gone.jpg") == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 13
    assert f"error: {image_folder / 'red' / 'bad.jpg'}: it is no image" in err
    assert f"error: {image_folder / 'red' / 'empty.png'}: it is empty" in err
    assert f"error: {image_folder / 'gone.jpg'}: No such file or directory" in err
    assert "13 images, " in err and "3 could not be read" in err


def test_only_a_few_batches_are_read_ahead(run, image_folder, monkeypatch, capsys):
    """A million files are a million names, one after the other."""
    path = image_folder / "red" / "00.jpg"
    asked = 0

    def endless(words):
        nonlocal asked
        for _ in range(200):
            asked += 1
            yield path

    written = []
    monkeypatch.setattr(predict_job, "find_images", endless)
    monkeypatch.setitem(
        predict_job._WRITERS, "table", lambda file: lambda *_: written.append(asked)
    )
    assert predict(run, "-", "--batch-size", 8) == 0
    assert len(written) == 200
    assert all(ahead - number <= 16 for number, ahead in enumerate(written))


def test_nothing_to_predict(run, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    assert predict(run) == 1
    assert "no images are named" in capsys.readouterr().err
    assert predict(run, tmp_path / "nothing") == 1
    assert "no image was found" in capsys.readouterr().err
    assert predict(tmp_path / "nothing", "a.jpg") == 1
    assert predict(run, "a.jpg", "--top-k", 0) == 1
    assert "top k must be at least 1" in capsys.readouterr().err


def test_the_first_of_equals_comes_first():
    found = predict_job.top(np.array([0.2, 0.4, 0.4]), ["a", "b", "c"], 2)
    assert [label for label, _ in found] == ["b", "c"]
