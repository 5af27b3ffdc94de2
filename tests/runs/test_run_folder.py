"""Run folders from untrusted origin, in which any name may be a link."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from commands import finetune
from conftest import make_image_folder, save_vgg

from recipes.cli import main
from transfer import Card
from transfer.core import files
from transfer.runs import run_folder

FLAGS = ("--freeze-until", "pool2", "--cache", "memory", "--max-to-keep", 1)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, images, and an evaluated run."""
    folder = tmp_path_factory.mktemp("setting")
    card = Card(input="images:0", tap="fc7:0", image_size=16, preprocess="unit")
    model = save_vgg(folder / "model" / "tiny", card=card)
    photos = make_image_folder(folder / "photos")
    assert finetune(folder / "run", model, photos, *FLAGS) == 0
    assert main(["evaluate", str(folder / "run")]) == 0
    assert main(["export", str(folder / "run"), "--format", "tflite"]) == 0
    return model, photos, folder / "run"


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def linked(source: Path, run: Path, link) -> Path:
    """A copy of a run in which all files are links."""
    for path in sorted(source.rglob("*")):
        copy = run / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(parents=True)
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            link(path, copy)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_run_does_not_write_through_links(setting, tmp_path, link) -> None:
    model, photos, run = setting
    theirs = shutil.copytree(run, tmp_path / "theirs")
    out = linked(theirs, tmp_path / "run", link)
    (out / ".lock").unlink()
    link(theirs / "metrics.json", out / ".lock")
    for name in ("metrics.json", "evaluation.json", "report.html", "confusion.csv", "labels.txt"):
        link(theirs / name, out / f".{name}.tmp")
    link(theirs / "config.yaml", out / "changes.csv")
    before = contents(theirs)
    assert main(["evaluate", str(out)]) == 0
    assert (out / "plots" / "confusion.png").read_bytes() == before["plots/confusion.png"]
    # A resumed run repeats an epoch and continues.
    assert finetune(out, model, photos, *FLAGS, "--resume", "--epochs", 4) == 0
    assert contents(theirs) == before
    assert len((out / "history.csv").read_text().splitlines()) == 1 + 4


@pytest.mark.slow
def test_broken_links_create_no_files(setting, tmp_path) -> None:
    model, photos, run = setting
    out = shutil.copytree(run, tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    names = ["evaluation.json", "report.html", "predictions.csv", "confusion.csv", "history.csv"]
    names += [".lock", "plots/confusion.png", ".metrics.json.tmp", "changes.csv"]
    for name in names:
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(elsewhere / Path(name).name)
    shutil.rmtree(out / "checkpoints")  # so that no completed epoch is kept
    assert main(["evaluate", str(out)]) == 0
    assert finetune(out, model, photos, *FLAGS, "--resume") == 0
    assert list(elsewhere.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plots", "events", "events/train", "checkpoints", "export"])
def test_linked_subfolder_of_a_run_is_refused(setting, tmp_path, capfd, name) -> None:
    model, photos, run = setting
    out = shutil.copytree(run, tmp_path / "run")
    shutil.move(out / name, tmp_path / "theirs")
    (out / name).symlink_to(tmp_path / "theirs")
    before = contents(tmp_path / "theirs")
    if name == "plots":
        assert main(["evaluate", str(out)]) == 1
    elif name == "export":
        assert main(["export", str(out), "--format", "tflite"]) == 1
    else:
        assert finetune(out, model, photos, *FLAGS, "--resume", "--epochs", 4) == 1
    (line,) = [li for li in capfd.readouterr().err.splitlines() if li.startswith("error: ")]
    assert f"{name}' is a link; expected a folder" in line
    assert contents(tmp_path / "theirs") == before


@pytest.mark.slow
def test_folder_in_place_of_a_file_is_named(setting, tmp_path, capfd) -> None:
    out = shutil.copytree(setting[2], tmp_path / "run")
    (out / "plots" / "confusion.png").unlink()
    (out / "plots" / "confusion.png").mkdir()
    assert main(["evaluate", str(out)]) == 1
    (line,) = [li for li in capfd.readouterr().err.splitlines() if li.startswith("error: ")]
    assert "Is a directory: " in line and "plots/confusion.png" in line


@pytest.mark.slow
def test_run_folder_may_be_a_link(setting, tmp_path) -> None:
    model, photos, _ = setting
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    assert finetune(tmp_path / "run", model, photos, "--cache", "memory", "--epochs", 1) == 0
    assert (tmp_path / "disk" / "metrics.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["notes.txt", "model_float32.tflite"])
def test_export_keeps_user_files(setting, tmp_path, capfd, name) -> None:
    out = shutil.copytree(setting[2], tmp_path / "run")
    notes = out / "export" / "tflite" / name
    if name == "notes.txt":
        notes.write_text("mine")
    else:
        (tmp_path / "theirs").write_text("mine")
        notes.unlink()
        notes.symlink_to(tmp_path / "theirs")
    (out / "export" / ".tflite.tmp").mkdir()
    (out / "export" / ".tflite.tmp" / "a.jpg").write_text("mine")
    assert main(["export", str(out), "--format", "tflite"]) == 1
    assert f"{name}' is not part of an export" in capfd.readouterr().err
    assert notes.read_text() == "mine"
    notes.unlink()
    if name == "notes.txt":
        assert main(["export", str(out), "--format", "tflite"]) == 0
    assert (out / "export" / ".tflite.tmp" / "a.jpg").read_text() == "mine"


def test_remove_refuses_run_of_another_process(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("epochs: 1")
    with files.locked_folder(tmp_path), pytest.raises(BlockingIOError, match="another process"):
        run_folder.remove(tmp_path)
    assert (tmp_path / "config.yaml").exists()
    run_folder.remove(tmp_path)
    assert not tmp_path.exists()


def test_remove_deletes_run_files_only(finished_run, tmp_path) -> None:
    out = shutil.copytree(finished_run, tmp_path / "run")
    (out / "plots").mkdir(exist_ok=True)
    mine = {"notes.txt", "events/notes.txt", "checkpoints/notes.txt", "model.notes.txt"}
    written_by_evaluate = {"evaluation.json", "report.html", "predictions.csv", "confusion.csv"}
    for name in (*mine, *written_by_evaluate, "plots/confusion.png"):
        (out / name).write_text("kept")
    run_folder.remove(out, only_working=True)
    left = contents(out).keys()
    assert {"checkpoints/notes.txt", "events/notes.txt", "model.meta", "metrics.json"} <= left
    assert not any(name.startswith("checkpoints/stage") or "tfevents" in name for name in left)
    run_folder.remove(out)
    assert (out / "plots" / "confusion.png").is_file()
    left = {name for name in contents(out) if not name.startswith("plots/")}
    assert left == mine | written_by_evaluate


def test_default_folder_is_that_of_no_other_run(tmp_path) -> None:
    """Runs that start in the same second have the same default."""
    out = tmp_path / "runs" / "20260101-000000-digits-0.5"
    created = [run_folder.create(out).name for _ in range(3)]
    assert created == [out.name, f"{out.name}-2", f"{out.name}-3"]


def test_resumed_run_may_cache_elsewhere(tmp_path) -> None:
    began = {"seed": 1, "cache_dir": tmp_path / "a", "cache_limit": 20.0}
    with run_folder.opened(tmp_path / "run", began):
        pass
    later = {"seed": 1, "cache_limit": 5.0, "checkpoint_minutes": 2.0}
    with run_folder.opened(tmp_path / "run", later, resume=True):
        assert run_folder.read_config(tmp_path / "run") == later
    with (
        pytest.raises(ValueError, match="seed=1, now 2"),
        run_folder.opened(tmp_path / "run", later | {"seed": 2}, resume=True),
    ):
        pass
