"""Full or read-only disks, removed folders and other faults during a run.

The faults are real: the run is on its own small file system, which needs root to mount.
"""

import os
import subprocess
import sys

import pytest
from commands import finetune, largest_difference, metrics
from conftest import make_run

from recipes.cli import main
from transfer.training.checkpoints import RunCheckpoint
from transfer.training.trainer import Trainer

FLAGS = ("--freeze-until", "pool2", "--cache", "memory")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Model, images, and an undisturbed run with ``FLAGS``."""
    return make_run(tmp_path_factory.mktemp("faults"), *FLAGS)


@pytest.fixture
def disk(tmp_path):
    """A file system of 2 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0 or not mounted(path, "size=2m"):
        pytest.skip("needs root, to mount a small file system")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def mounted(path, options):
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def finetune_with_a_fault(monkeypatch, out, setting, fault, *flags):
    """Exit status of a run in which ``fault`` is called after the first epoch's checkpoint."""
    model, photos, _ = setting
    train_epoch = Trainer.train_epoch

    def then(self, *arguments, **options):
        if self.epoch == 1:
            options["checkpoint"].wait()  # it would meet the fault at one moment or another
            fault()
        return train_epoch(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", then)
        return finetune(out, model, photos, *FLAGS, *flags)


def assert_resumed_ends_like(out, setting):
    model, photos, whole = setting
    assert finetune(out, model, photos, *FLAGS, "--resume") == 0
    assert largest_difference(whole / "model", out / "model") == 0
    assert metrics(whole)["eval"] == metrics(out)["eval"]


def error_of(capsys):
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


@pytest.mark.slow
def test_full_disk_is_an_error_and_run_resumes(disk, setting, monkeypatch, capsys):
    filler = disk / "filler"

    def fill():
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))

    assert finetune_with_a_fault(monkeypatch, disk / "run", setting, fill) == 1
    error = error_of(capsys)
    assert "No space left on device" in error or "cannot write checkpoint" in error, error
    assert str(disk / "run") in error, error
    filler.unlink()
    assert_resumed_ends_like(disk / "run", setting)


@pytest.mark.slow
def test_read_only_disk_is_an_error_and_run_resumes(disk, setting, monkeypatch, capsys):
    def remount(how):
        subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)

    def interrupt():
        raise KeyboardInterrupt

    model, photos, _ = setting
    assert finetune_with_a_fault(monkeypatch, disk / "run", setting, interrupt) == 130
    capsys.readouterr()
    remount("ro")
    assert finetune(disk / "run", model, photos, *FLAGS, "--resume") == 1
    assert "Read-only file system" in error_of(capsys)
    assert finetune(disk / "new", model, photos, *FLAGS) == 1
    assert "Read-only file system" in error_of(capsys)
    remount("rw")
    assert_resumed_ends_like(disk / "run", setting)


@pytest.mark.slow
def test_removed_run_folder_is_an_error(tmp_path, setting, monkeypatch, capsys):
    out = tmp_path / "run"

    def remove():
        out.rename(tmp_path / "trash")

    status = finetune_with_a_fault(monkeypatch, out, setting, remove)
    assert status == 1
    assert "was removed while the run went on" in error_of(capsys)
    assert not (out / "checkpoints").exists()


@pytest.mark.slow
def test_run_folder_removed_after_training_is_an_error(tmp_path, setting, monkeypatch, capsys):
    model, photos, _ = setting
    out, end = tmp_path / "run", RunCheckpoint.end

    def remove_then(self):
        end(self)
        out.rename(tmp_path / "trash")

    monkeypatch.setattr(RunCheckpoint, "end", remove_then)
    assert finetune(out, model, photos, *FLAGS) == 1
    assert "was removed while the run went on" in error_of(capsys)
    assert not out.exists()


@pytest.mark.slow
def test_jumping_clock_does_not_change_results(tmp_path, setting, monkeypatch):
    import time

    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 10**9 * (int(now() * 10) % 2))
    model, photos, whole = setting
    assert finetune(tmp_path / "run", model, photos, *FLAGS) == 0
    assert largest_difference(whole / "model", tmp_path / "run" / "model") == 0


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_resume_skips_damaged_checkpoint(tmp_path, setting, capsys):
    model, photos, _ = setting
    out = tmp_path / "run"
    assert finetune(out, model, photos, *FLAGS, "--epochs", 2) == 0
    path = out / "checkpoints" / "stage-0" / "step-2.data-00000-of-00001"
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    assert finetune(out, model, photos, *FLAGS, "--epochs", 2, "--resume") == 0
    assert "step-2' cannot be read" in capsys.readouterr().err
    assert main(["evaluate", str(out)]) == 0
