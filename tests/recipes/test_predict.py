"""`vgg-transfer predict`, compared with `evaluate` on the same images."""

import csv
import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from recipes.cli import main
from transfer.evaluation import file_predictions, prediction_writers


@pytest.fixture
def run(finished_run):
    return finished_run


def predict(run, *words):
    return main(["predict", str(run), *map(str, words)])


@pytest.mark.usefixtures("no_report")
def test_predictions_equal_those_of_evaluate(run, image_folder, tmp_path, capsys):
    assert main(["evaluate", str(run)]) == 0
    with (run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    files = [image_folder / row["image"] for row in rows]
    capsys.readouterr()
    probabilities = tmp_path / "p.npy"
    words = ("--format", "jsonl", "--top-k", 2, "--probabilities", probabilities)
    assert predict(run, *files, *words) == 0
    out, err = capsys.readouterr()
    expected = [[float(row["p(blue)"]), float(row["p(red)"])] for row in rows]
    np.testing.assert_allclose(np.load(probabilities), expected, atol=1e-5)
    found = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in found] == [str(path) for path in files]
    for row, line in zip(rows, found, strict=True):
        assert line["predictions"][0]["label"] == row["prediction"]
        for item in line["predictions"]:
            expected = float(row[f"p({item['label']})"])
            assert item["probability"] == pytest.approx(expected, abs=1e-5)
    assert f"{len(rows)} images, " in err and "images/s" in err
    assert "\r" not in err  # a progress bar is for terminals


def test_quiet_prints_results_only(run, image_folder, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "")  # the flag sets it; it is unset at the end of the test
    capsys.readouterr()
    assert predict(run, image_folder / "red", "--quiet") == 0
    out, err = capsys.readouterr()
    assert (len(out.splitlines()), err) == (12, "")


def test_table_and_csv_formats(run, image_folder, capsys):
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


@pytest.mark.slow
def test_predictions_below_the_threshold_are_marked(run, image_folder, capsys):
    capsys.readouterr()
    assert predict(run, image_folder, "--format", "jsonl") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert not any("sure" in line for line in found)
    p = sorted(line["predictions"][0]["probability"] for line in found)
    threshold = ["--abstain-below", (p[11] + p[12]) / 2]
    assert predict(run, image_folder, "--format", "jsonl", *threshold) == 0
    marked = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line in marked:
        assert line["sure"] == (line["predictions"][0]["probability"] > threshold[1])
    assert sum(line["sure"] for line in marked) == 12
    assert predict(run, image_folder, "--format", "csv", "--top-k", 1, *threshold) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["sure"] == "yes" for row in rows] == [line["sure"] for line in marked]
    assert predict(run, image_folder, *threshold) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["  not sure:  " not in line for line in lines] == [line["sure"] for line in marked]
    assert predict(run, image_folder, "--abstain-below", 2) == 1
    assert "--abstain-below must be 0 to 1, got 2" in capsys.readouterr().err


def test_predict_accepts_files_folders_patterns_and_lists(run, image_folder, monkeypatch, capsys):
    pattern = str(image_folder / "*" / "0*.jpg")
    first, second = image_folder / "red" / "00.jpg", image_folder / "blue" / "01.png"
    listed = io.BytesIO(f"{first}\n\n{second}\r\n".encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(listed))
    capsys.readouterr()
    assert predict(run, pattern, "-") == 0
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert len(names) == 10 + 2
    assert names[-1].endswith("01.png")
    assert predict(run, image_folder / "*") == 0  # matches the folders
    assert len(capsys.readouterr().out.splitlines()) == 24


def test_links_to_folders_are_not_followed(run, own_image_folder, capsys):
    (own_image_folder / "red" / "round").symlink_to(own_image_folder)
    capsys.readouterr()
    assert predict(run, own_image_folder) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 24
    assert "warning: 1 of 25 files ignored: 1 other (a link to a folder)" in err


def test_file_names_need_not_be_utf8(run, own_image_folder, monkeypatch, capfd):
    odd = os.fsencode(own_image_folder) + b"/caf\xe9.jpg"
    with open(odd, "wb") as file:
        file.write((own_image_folder / "red" / "00.jpg").read_bytes())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(odd + b"\n")))
    capfd.readouterr()
    assert predict(run, "-", "--format", "jsonl") == 0
    (line,) = capfd.readouterr().out.splitlines()
    assert json.loads(line)["image"].endswith("caf\\udce9.jpg")


def odd_files(folder):
    """Maps names to unusual files and the expected result: the class, or the error message."""
    red = Image.new("RGB", (24, 24), (220, 30, 30))
    noisy = Image.effect_noise((40, 24), 60).convert("RGB")
    files = {}

    def add(name, expected, image=red, **options):
        image.save(folder / name, **options)
        files[name] = expected

    add("plain.jpg", "red")
    add("progressive.jpg", "red", progressive=True)
    add("cmyk.jpg", "red", red.convert("CMYK"))
    add("alpha.png", "red", red.convert("RGBA"))
    add("palette.png", "red", red.convert("P"))
    add("palette.bmp", "red", red.convert("P"))
    add("interlaced.gif", "red", interlace=True)
    add("several.gif", "red", save_all=True, append_images=[noisy])
    add("plain.bmp", "red")
    add("plain.webp", "red")
    add("plain.tiff", "red")
    add("several.tiff", "red", save_all=True, append_images=[noisy])
    add("gray.png", "", red.convert("L"))
    add("sixteen_bits.png", "", red.convert("I;16"))
    add("one_bit.png", "", red.convert("1"))
    add("floats.tiff", "", red.convert("F"))
    add("one_pixel.png", "red", red.resize((1, 1)))
    add("thin.png", "red", red.resize((1, 20_000)))
    noisy.save(folder / "whole.jpg", quality=95)
    data = (folder / "whole.jpg").read_bytes()
    broken = {
        "cut.jpg": (data[: len(data) // 2], "it cannot be decoded"),
        "empty.jpg": (b"", "it is empty"),
        "text.jpg": (b"not an image", "it is not an image"),
        "page.png": (b"<html>404</html>", "it is not an image"),
        "cut.png": ((folder / "thin.png").read_bytes()[:60], "it cannot be decoded"),
    }
    for name, (content, reason) in broken.items():
        (folder / name).write_bytes(content)
        files[name] = reason
    (folder / "folder.jpg").mkdir()
    (folder / "whole.jpg").rename(folder / "folder.jpg" / "inside.jpg")
    files["folder.jpg/inside.jpg"] = ""
    (folder / "nowhere.jpg").symlink_to(folder / "gone.jpg")
    files["nowhere.jpg"] = "No such file or directory"
    return files


def test_predict_handles_folder_of_unusual_files(run, tmp_path, capsys):
    folder = tmp_path / "odd"
    folder.mkdir()
    files = odd_files(folder)
    capsys.readouterr()
    assert predict(run, folder, "--top-k", 1, "--format", "jsonl") == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    found = {line["image"]: line["predictions"][0]["label"] for line in lines}
    errors = dict(line[7:].split(": ", 1) for line in err.splitlines() if line[:7] == "error: ")
    assert len(found) + len(errors) == len(files) >= 20
    for name, expected in files.items():
        path = str(folder / name)
        assert path in found or expected, name
        assert found.get(path, errors.get(path)).startswith(expected), name


def test_any_exception_of_a_decoder_is_reported(run, image_folder, monkeypatch, capsys):
    read_tensor = file_predictions.read_tensor
    bad = (image_folder / "red" / "00.jpg").read_bytes()

    def read(data):
        if data == bad:
            raise TypeError("bad operand type")
        return read_tensor(data)

    monkeypatch.setattr(file_predictions, "read_tensor", read)
    capsys.readouterr()
    assert predict(run, image_folder / "red") == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 11
    assert "00.jpg: it cannot be read (TypeError: bad operand type)" in err


def test_unreadable_image_is_reported_and_others_are_predicted(run, own_image_folder, capsys):
    (own_image_folder / "red" / "bad.jpg").write_bytes(b"no image")
    (own_image_folder / "red" / "empty.png").write_bytes(b"")
    with Image.open(own_image_folder / "red" / "00.jpg") as image:
        image.save(own_image_folder / "red" / "fine.webp")
    capsys.readouterr()
    assert predict(run, own_image_folder / "red", own_image_folder / "gone.jpg") == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 13
    assert f"error: {own_image_folder / 'red' / 'bad.jpg'}: it is not an image" in err
    assert f"error: {own_image_folder / 'red' / 'empty.png'}: it is empty" in err
    assert f"error: {own_image_folder / 'gone.jpg'}: No such file or directory" in err
    assert "13 images, " in err and "3 could not be read" in err


def test_only_a_few_batches_are_read_ahead(run, image_folder, monkeypatch, capsys):
    """The names of a million files are consumed lazily."""
    path = image_folder / "red" / "00.jpg"
    asked = 0

    def endless(words):
        nonlocal asked
        for _ in range(200):
            asked += 1
            yield path

    written = []
    monkeypatch.setattr("recipes.predict._paths", endless)
    writer = lambda *_, **__: lambda *_: written.append(asked)  # noqa: E731
    monkeypatch.setitem(prediction_writers.WRITERS, "table", writer)
    assert predict(run, "-", "--batch-size", 8) == 0
    assert len(written) == 200
    assert all(ahead - number <= 16 for number, ahead in enumerate(written))


def test_predict_rejects_no_images(run, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    assert predict(run) == 1
    assert "no images are named" in capsys.readouterr().err
    assert predict(run, tmp_path / "nothing") == 1
    assert "no images were found" in capsys.readouterr().err
    assert predict(run, tmp_path / "*.tif") == 1
    assert f"error: {tmp_path}/*.tif: No such file or directory" in capsys.readouterr().err
    assert predict(run, "~nobody.jpg") == 1
    assert "error: ~nobody.jpg: No such file or directory" in capsys.readouterr().err
    assert predict(tmp_path / "nothing", "a.jpg") == 1
    assert predict(run, "a.jpg", "--top-k", 0) == 1
    assert "top k must be at least 1" in capsys.readouterr().err
