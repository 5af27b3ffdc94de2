"""`vgg-transfer check-data`, and the part of it that finetune runs."""

import json

from commands import finetune
from PIL import Image

from recipes.cli import main


def spoil(root):
    """A copy in another class, an unreadable file, and a red image among the blue ones."""
    for number in range(6):
        source = root / "red" / f"{number:02d}.{'png' if number % 2 else 'jpg'}"
        (root / "blue" / f"copy{number}{source.suffix}").write_bytes(source.read_bytes())
    (root / "blue" / "broken.jpg").write_bytes(b"no image")


def check(root, capsys, *flags):
    capsys.readouterr()
    status = main(["check-data", "--image-folder", str(root), *flags])
    return status, capsys.readouterr().out


def test_a_sound_folder(image_folder, capsys):
    status, out = check(image_folder, capsys, "--strict")
    assert status == 0
    assert "2 classes" in out
    for line in ("unreadable: 0", "in both splits: 0", "twice in a split: 0"):
        assert line in out


def test_what_is_wrong_is_listed(image_folder, capsys):
    spoil(image_folder)
    status, out = check(image_folder, capsys, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["unreadable"] == ["blue/broken.jpg"]
    pairs = found["in_both_splits"] + found["duplicates"]
    assert {name for pair in pairs for name in pair} >= {"red/00.jpg", "blue/copy0.jpg"}
    assert len(found["other_label"]) == len(pairs) == 6
    doubtful = {row["image"] for row in found["doubtful_labels"]}
    assert doubtful & {f"blue/copy{n}.{'png' if n % 2 else 'jpg'}" for n in range(6)}
    status, out = check(image_folder, capsys, "--strict", "--model", "none", "--show", "2")
    assert status == 1
    assert "unreadable: 1\n  blue/broken.jpg" in out
    assert "... and 4 more" in out
    assert "labels to look at" not in out


def test_rare_classes_flat_images_and_other_files(image_folder, capsys):
    (image_folder / "001").mkdir()
    (image_folder / "red" / "00.jpg").rename(image_folder / "001" / "00.jpg")
    (image_folder / "red" / "notes.txt").write_text("")
    (image_folder / "red" / "photo.heic").write_bytes(b"")
    status, out = check(image_folder, capsys)
    assert status == 0
    assert "too few images to judge their labels: 1\n  001" in out
    assert "files passed over: 2\n  red/notes.txt\n  red/photo.heic" in out
    for number, path in enumerate(image_folder.glob("*/*.*g")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    status, out = check(image_folder, capsys)
    assert status == 0
    for path in image_folder.glob("*/*.*g"):
        path.write_bytes(b"")
    status, out = check(image_folder, capsys)
    assert status == 0
    assert "unreadable: 24" in out


def test_finetune_warns(tmp_path, model, image_folder, capsys):
    for name in ("held_out", "train"):
        folder = image_folder.parent / "splits" / name / "red"
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes((image_folder / "red" / "01.png").read_bytes())
    root = image_folder.parent / "splits"
    (root / "held_out").rename(root / "test")
    (image_folder / "blue").rename(root / "train" / "blue")
    assert finetune(tmp_path / "run", model, root) == 0
    err = capsys.readouterr().err
    assert "warning: 1 classes have no images to evaluate on: blue" in err
    assert "warning: 1 classes have less than a tenth of the training images of 'blue': red" in err
    assert "warning: 1 images are both trained and evaluated on, under two names" in err


def test_finetune_is_silent_about_sound_data(tmp_path, model, image_folder, capsys):
    assert finetune(tmp_path / "run", model, image_folder) == 0
    assert "warning" not in capsys.readouterr().err
