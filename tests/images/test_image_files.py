"""Which files of a folder are used as images, which are skipped, and how this is reported."""

import json
import os
import threading
import time

import numpy as np
import pytest
from commands import finetune, largest_difference, metrics
from conftest import make_image_folder
from PIL import Image

from recipes.cli import main
from transfer.data.sources import open_source
from transfer.images.decoding import KINDS, suffixes
from transfer.images.image_files import PassedOver, PixelBudget, find, read
from transfer.images.preprocess import Preprocess

HEIC = "needs pillow-heif: pip install 'vgg-transfer[heif]'"
needs_no_heif = pytest.mark.skipif(".heic" in suffixes(), reason="pillow-heif is installed")
needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


@pytest.fixture
def mixed(tmp_path):
    """Two classes with images of many formats, other files, and files of operating systems."""
    root = make_image_folder(tmp_path / "photos")
    for name, color in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
        image = Image.new("RGB", (20, 24), color)
        for suffix in (".webp", ".TIF", ".jfif", ".jpe", ".jp2", ".ppm"):
            kind = next(kind for kind, names in KINDS.items() if suffix.lower() in names)
            image.save(root / name / f"more{suffix}", kind)
        for file in ("a.heic", "b.HEIC", "c.svg", ".hidden.svg", ".DS_Store", "Thumbs.db"):
            (root / name / file).write_bytes(b"")
    (root / "green").mkdir()
    (root / "green" / "d.heic").write_bytes(b"")
    image.save(root / "loose.jpg")
    return root


@needs_no_heif
def test_all_formats_are_used_and_skipped_files_counted(mixed):
    source = open_source(image_folder=str(mixed))
    split = source.split("train")
    assert len(split) == 24 + 12
    batches = list(split.batches(Preprocess("none", 8), 5))
    pixels = np.concatenate([images for images, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    is_red = pixels[..., 0].mean((1, 2)) > pixels[..., 2].mean((1, 2))
    np.testing.assert_array_equal(is_red, labels == source.class_names.index("red"))
    assert source.passed_over.describe() == [
        f"8 of 44 files ignored: 5 .heic ({HEIC}), 2 .svg (not a supported image format), "
        "1 .jpg (outside the class folders)",
        "1 class has no readable images: green",
    ]


@pytest.mark.slow
@needs_no_heif
@pytest.mark.usefixtures("no_report")
def test_every_command_reports_skipped_files(tmp_path, model, mixed, capsys):
    expected = "8 of 44 files ignored: 5 .heic"
    out = tmp_path / "run"
    assert finetune(out, model, mixed) == 0
    assert f"warning: {expected}" in capsys.readouterr().err
    assert metrics(out)["unreadable"] == {"count": 0, "names": []}
    assert main(["evaluate", str(out), "--image-folder", str(mixed)]) == 0
    assert f"warning: {expected}" in capsys.readouterr().err
    assert main(["check-data", "--image-folder", str(mixed), "--model", "none", "--json"]) == 0
    printed, err = capsys.readouterr()
    found = json.loads(printed)
    assert f"warning: {expected}" in err
    assert (found["unreadable"], found["empty_classes"]) == ([], ["green"])
    assert sorted(found["passed_over"])[-1] == "red/c.svg"
    assert main(["predict", str(out), str(mixed), "--top-k", "1"]) == 0
    printed, err = capsys.readouterr()
    assert len(printed.splitlines()) == 37  # including the one outside of classes
    assert "warning: 7 of 44 files ignored: 5 .heic" in err


@needs_no_heif
def test_error_on_too_few_classes_lists_skipped_files(mixed):
    for path in (mixed / "blue").iterdir():
        if path.suffix.lower() in suffixes():
            path.unlink()
    with pytest.raises(ValueError, match=r"has 1 class \['red'\]; .* 8 of 26 files") as error:
        open_source(image_folder=str(mixed))
    assert "2 classes have no readable images: blue, green" in str(error.value)
    with pytest.raises(ValueError, match="has no images; .* 2 .heic"):
        (mixed / "red").rename(mixed.parent / "elsewhere")
        (mixed / "blue").rename(mixed.parent / "elsewhere too")
        (mixed / "green" / "e.heic").write_bytes(b"")
        (mixed / "loose.jpg").unlink()
        open_source(image_folder=str(mixed))


def test_folders_beside_the_splits_are_counted(tmp_path):
    make_image_folder(tmp_path / "photos" / "train", 4)
    make_image_folder(tmp_path / "photos" / "extra", 3)
    source = open_source(image_folder=str(tmp_path / "photos"))
    assert len(source.split("train")) == 8
    (line,) = source.passed_over.describe()
    assert line.startswith("6 of 14 files ignored: ")
    assert "4 .jpg (outside the split folders), 2 .png (outside the split folders)" in line


def test_skipped_links_are_reported(own_image_folder):
    (own_image_folder / "red" / "gone.jpg").symlink_to(own_image_folder / "nowhere.jpg")
    (own_image_folder / "red" / "round").symlink_to(own_image_folder)
    source = open_source(image_folder=str(own_image_folder))
    assert len(source.split("train")) == 24
    assert sorted(source.passed_over.files) == [
        ("red/gone.jpg", "a link to nothing"),
        ("red/round", "a link to a folder"),
    ]
    assert source.passed_over.num_images == 24


@pytest.mark.slow
@needs_pipes
@pytest.mark.usefixtures("no_report")
def test_pipe_or_device_is_an_unreadable_image(tmp_path, model, own_image_folder, capsys):
    out = tmp_path / "run"
    assert finetune(out, model, own_image_folder) == 0
    device, pipe = paths = [own_image_folder / "red" / name for name in ("device.png", "pipe.png")]
    device.symlink_to("/dev/zero")
    os.mkfifo(pipe)
    names = ["red/device.png", "red/pipe.png"]
    messages = [f"it is {kind}; expected a regular file" for kind in ("a device", "a named pipe")]
    other = ["finetune", "--out", str(tmp_path / "other"), "--model", str(model)]
    other += ["--image-folder", str(own_image_folder), "--epochs", "1", "--batch-size", "6"]
    assert main(other) == 1
    err = capsys.readouterr().err
    for name, message in zip(names, messages, strict=True):
        assert f"'{name}' ({message})" in err and "--skip-unreadable N" in err
    assert main([*other, "--skip-unreadable", "2"]) == 0
    err = capsys.readouterr().err
    for name, message in zip(names, messages, strict=True):
        assert f"{name} was left out: {message}" in err
    assert sorted(metrics(tmp_path / "other")["unreadable"]["names"]) == names
    check = ["check-data", "--image-folder", str(own_image_folder), "--model", "none", "--json"]
    main(check)
    assert sorted(json.loads(capsys.readouterr().out)["unreadable"]) == names
    assert main(["evaluate", str(out)]) == 0  # all held-out images are present
    capsys.readouterr()
    for path, message in zip(paths, messages, strict=True):
        assert main(["predict", str(out), str(path)]) == 1
        assert f"error: {path}: {message}" in capsys.readouterr().err
        with pytest.raises(ValueError, match=message):
            read(path)
    assert main(["predict", str(out), str(own_image_folder / "red")]) == 1
    assert f"error: {device}: {messages[0]}" in capsys.readouterr().err


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "x.jpg"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ValueError, match="it has 1,099,511,627,776 bytes; expected at most"):
        read(path)


def test_files_are_sorted_by_name(image_folder):
    passed_over = PassedOver()
    paths = [str(path) for path in find(image_folder, passed_over, in_order=True)]
    assert paths == sorted(paths)
    assert (len(paths), passed_over.describe()) == (24, [])


def test_pixel_budget_delays_only_large_images(tmp_path):
    sides = {"large": 100, "small": 10}
    for name, side in sides.items():
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    budget = PixelBudget(15_000)
    held, most = [], []

    def work(name):
        with budget.hold(tmp_path / f"{name}.png"):
            held.append(name)
            most.append(held.count("large"))
            time.sleep(0.02)
            held.remove(name)

    threads = [threading.Thread(target=work, args=[name]) for name in ["large", "small"] * 6]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (len(most), max(most)) == (12, 1)


def spoil(root):
    """Adds a text file, a truncated JPEG, and one with damage found only by decoding; names."""
    whole = (root / "red" / "02.jpg").read_bytes()
    (root / "red" / "02.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "blue" / "00.jpg").write_bytes(b"<html>404</html>")
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    noise.save(root / "blue" / "03.png")
    data = bytearray((root / "blue" / "03.png").read_bytes())
    data[len(data) // 2] ^= 255
    (root / "blue" / "03.png").write_bytes(data)
    return {"red/02.jpg", "blue/00.jpg", "blue/03.png"}


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_unreadable_images_are_skipped_on_request(tmp_path, model, own_image_folder, capsys):
    names = spoil(own_image_folder)
    out = tmp_path / "run"
    assert finetune(out, model, own_image_folder) == 1
    err = capsys.readouterr().err
    assert "3 images cannot be decoded: " in err and "--skip-unreadable N" in err
    assert all(repr(name) in err for name in names)
    assert not out.exists()
    assert finetune(out, model, own_image_folder, "--skip-unreadable", 2) == 1
    assert "3 images cannot be decoded: " in capsys.readouterr().err
    assert finetune(out, model, own_image_folder, "--skip-unreadable", 3) == 0
    err = capsys.readouterr().err
    assert "warning: blue/00.jpg was left out: it is not an image" in err
    found = metrics(out)
    assert found["unreadable"]["count"] == 3
    assert set(found["unreadable"]["names"]) == names
    assert main(["evaluate", str(out)]) == 0
    assert metrics(out)["evaluation"]["accuracy"] == found["eval"]["accuracy"]
    assert main(["export", str(out), "--format", "tflite"]) == 0
    assert not names & {*(out / "held_out.txt").read_text().splitlines()}
    for name in names:
        (own_image_folder / name).unlink()
    alone = tmp_path / "without these files"
    assert finetune(alone, model, own_image_folder) == 0
    assert largest_difference(out / "model", alone / "model") == 0


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_evaluate_skips_unreadable_images(copy_of_finished_run, own_image_folder, capsys):
    out = copy_of_finished_run
    spoil(own_image_folder)
    other = ["evaluate", str(out), "--image-folder", str(own_image_folder), "--eval-split", "train"]
    assert main(other) == 1
    assert "cannot be decoded: " in capsys.readouterr().err
    assert main([*other, "--skip-unreadable", "5"]) == 0
    found = metrics(out)["evaluation"]
    assert (found["num_examples"], found["unreadable"]["count"]) == (21, 3)
