"""`vgg-transfer check-data`, and the data checks of finetune."""

import itertools
import json

import numpy as np
import pytest
from commands import finetune
from PIL import Image

from recipes.cli import main
from transfer.finetuning import image_inspection
from transfer.runs import run_data


def spoil(root):
    """A copy in another class, an unreadable file, and a red image in the blue class."""
    for number in range(6):
        source = root / "red" / f"{number:02d}.{'png' if number % 2 else 'jpg'}"
        (root / "blue" / f"copy{number}{source.suffix}").write_bytes(source.read_bytes())
    (root / "blue" / "broken.jpg").write_bytes(b"no image")


def check(root, capsys, *flags):
    capsys.readouterr()
    status = main(["check-data", "--image-folder", str(root), *flags])
    return status, capsys.readouterr().out


@pytest.mark.slow
def test_valid_image_folder_has_no_findings(image_folder, capsys):
    status, out = check(image_folder, capsys, "--strict", "--model", "none")
    assert status == 0
    assert "2 classes" in out
    for line in ("unreadable: 0", "in both splits: 0", "twice in a split: 0"):
        assert line in out


def test_findings_are_listed(own_image_folder, capsys):
    spoil(own_image_folder)
    status, out = check(own_image_folder, capsys, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["unreadable"] == ["blue/broken.jpg"]
    pairs = found["in_both_splits"] + found["duplicates"]
    assert {name for pair in pairs for name in pair} >= {"red/00.jpg", "blue/copy0.jpg"}
    assert len(found["other_label"]) == len(pairs) == 6
    assert 0 < found["expected_label_errors"] < found["num_judged"] == 30
    assert len(found["doubtful_labels"]) <= 10
    status, out = check(own_image_folder, capsys, "--strict", "--model", "none", "--show", "2")
    assert status == 1
    assert "unreadable: 1\n  blue/broken.jpg" in out
    assert "... and 4 more" in out
    assert "labels to review" not in out


@pytest.mark.slow
def test_rare_classes_and_ignored_files_are_listed(model, own_image_folder, capsys):
    flags = ("--model", str(model))
    (own_image_folder / "001").mkdir()
    (own_image_folder / "red" / "00.jpg").rename(own_image_folder / "001" / "00.jpg")
    (own_image_folder / "red" / "notes.txt").write_text("")
    (own_image_folder / "red" / "photo.heic").write_bytes(b"")
    status, out = check(own_image_folder, capsys, *flags)
    assert status == 0
    assert "too few images to judge their labels: 1\n  001" in out
    assert "files ignored: 2\n  red/notes.txt\n  red/photo.heic" in out
    for number, path in enumerate(own_image_folder.glob("*/*.*g")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    status, out = check(own_image_folder, capsys, *flags)
    assert status == 0
    for path in own_image_folder.glob("*/*.*g"):
        path.write_bytes(b"")
    status, out = check(own_image_folder, capsys, *flags)
    assert status == 0
    assert "unreadable: 24" in out


@pytest.mark.slow
def test_finetune_warns_about_data_problems(tmp_path, model, own_image_folder, capsys):
    for name in ("held_out", "train"):
        folder = own_image_folder.parent / "splits" / name / "red"
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes((own_image_folder / "red" / "01.png").read_bytes())
    root = own_image_folder.parent / "splits"
    (root / "held_out").rename(root / "test")
    (own_image_folder / "blue").rename(root / "train" / "blue")
    assert finetune(tmp_path / "run", model, root) == 0
    err = capsys.readouterr().err
    assert "warning: 1 class has no images to evaluate on: blue" in err
    assert "warning: 1 class has less than a tenth of the training images of 'blue': red" in err
    assert "warning: 1 images are both trained and evaluated on, some perhaps" in err


@pytest.mark.slow
def test_finetune_does_not_warn_about_valid_data(tmp_path, model, image_folder, capsys):
    assert finetune(tmp_path / "run", model, image_folder) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.slow
def test_finetune_warns_about_near_duplicates_across_splits(tmp_path, model, capsys):
    root = tmp_path / "splits"
    generator = np.random.default_rng(0)
    for split, name in itertools.product(("train", "test"), ("a", "b")):
        (root / split / name).mkdir(parents=True)
        for number in range(6):
            pixels = generator.integers(0, 255, (5, 6, 3)).astype(np.uint8)
            image = Image.fromarray(pixels).resize((96, 80), Image.Resampling.BICUBIC)
            image.save(root / split / name / f"{number}.png")
    assert finetune(tmp_path / "without", model, root) == 0
    assert "warning" not in capsys.readouterr().err
    for number in range(3):
        image = Image.open(root / "train" / "a" / f"{number}.png")
        image.resize((77, 64)).save(root / "test" / "b" / f"copy{number}.jpg", quality=60)
    assert finetune(tmp_path / "with", model, root) == 0
    warning = "warning: 3 of the images that are evaluated on look like copies of training images"
    assert warning in capsys.readouterr().err
    status, out = check(root, capsys, "--strict", "--model", "none")
    assert status == 1
    assert "in both splits: 3\n" in out


@pytest.mark.slow
def test_finetune_logs_when_near_duplicates_are_not_compared(
    tmp_path, model, image_folder, capsys, monkeypatch
):
    monkeypatch.setattr(image_inspection, "MAX_COMPARED", 23)
    assert finetune(tmp_path / "run", model, image_folder) == 0
    err = capsys.readouterr().err
    assert "warning: 24 images are more than the 23 that are compared before training" in err


@pytest.mark.slow
def test_near_duplicates_stay_on_one_side_in_all_verbs(tmp_path, model, smooth_folder, capsys):
    for path in sorted(smooth_folder.glob("*/*.*")):
        image = Image.open(path).convert("RGB")
        image.save(path.with_name(f"copy-{path.stem}.jpg"), quality=60)
    assert finetune(tmp_path / "run", model, smooth_folder) == 0
    assert "warning" not in capsys.readouterr().err
    held_out = (tmp_path / "run" / "held_out.txt").read_text().splitlines()
    stems = [name.replace("copy-", "").split(".")[0] for name in held_out]
    assert len(held_out) == 2 * len({*stems}) == 24
    status, out = check(smooth_folder, capsys, "--json", "--strict", "--model", "none")
    found = json.loads(out)
    assert status == 0
    assert found["num_held_out"] == len(held_out)
    assert found["in_both_splits"] == []
    assert len(found["duplicates"]) == 60


@pytest.mark.slow
def test_resumed_runs_keep_their_held_out_images(tmp_path, model, smooth_folder, capsys):
    """Also runs of an earlier version, which did not compare images."""
    for path in sorted(smooth_folder.glob("*/*.*")):
        image = Image.open(path).convert("RGB")
        image.save(path.with_name(f"copy-{path.stem}.jpg"), quality=60)
    out = tmp_path / "run"
    split = run_data.train_and_eval_splits

    def without_comparison(*words, max_compared, **options):
        return split(*words, max_compared=0, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_data, "train_and_eval_splits", without_comparison)
        assert finetune(out, model, smooth_folder, "--epochs", 1) == 0
    held_out = (out / "held_out.txt").read_text()
    assert "look like copies of training images" in capsys.readouterr().err
    assert finetune(out, model, smooth_folder, "--epochs", 2, "--resume") == 0
    assert (out / "held_out.txt").read_text() == held_out
    assert len((out / "history.csv").read_text().splitlines()) == 3
    assert finetune(tmp_path / "anew", model, smooth_folder, "--epochs", 1) == 0
    assert (tmp_path / "anew" / "held_out.txt").read_text() != held_out


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_evaluate_warns_about_copies_of_training_images(tmp_path, model, smooth_folder, capsys):
    assert finetune(tmp_path / "run", model, smooth_folder) == 0
    held_out = (tmp_path / "run" / "held_out.txt").read_text().splitlines()
    trained = [
        path
        for path in sorted(smooth_folder.glob("*/*.*"))
        if str(path.relative_to(smooth_folder)) not in held_out
    ]
    other = tmp_path / "other"
    for name in ("a", "b"):
        (other / name).mkdir(parents=True)
        Image.effect_mandelbrot((50, 50), (-2, -1, 1, 1), 50).save(other / name / "new.png")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--image-folder", str(other)]) == 0
    assert "warning" not in capsys.readouterr().err
    for path in trained[:3]:
        Image.open(path).convert("RGB").save(other / "b" / f"{path.stem}.jpg", quality=60)
    (other / "b" / "same.png").write_bytes(trained[-1].read_bytes())
    assert main(["evaluate", str(tmp_path / "run"), "--image-folder", str(other)]) == 0
    err = capsys.readouterr().err
    assert "warning: 3 of the images that are evaluated on look like copies of training" in err
    assert "warning: 1 images are both trained and evaluated on, some perhaps" in err
