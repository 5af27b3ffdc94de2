"""Signals during a run, in this process and in a child process."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml
from commands import finetune, largest_difference, metrics
from conftest import make_run

from recipes.cli import main
from transfer.evaluation.prediction import predict_logits
from transfer.runs import run_folder
from transfer.runs.interruption import Interrupted, Signals, resumable
from transfer.training.trainer import Trainer

FLAGS = ("--freeze-until", "pool2", "--dropout", 0.2, "--early-stopping", 2)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Model, images, and an uninterrupted run with ``FLAGS``."""
    return make_run(tmp_path_factory.mktemp("interruption"), *FLAGS)


def assert_same_end(first, second):
    assert largest_difference(first / "model", second / "model") == 0
    assert (first / "history.csv").read_bytes() == (second / "history.csv").read_bytes()
    for part in ("eval", "params"):
        assert metrics(first)[part] == metrics(second)[part]
    of_time = {"epoch_s"}
    trained = [{k: v for k, v in metrics(r)["train"].items() if k not in of_time}
               for r in (first, second)]  # fmt: skip
    assert trained[0] == trained[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, status, step", [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 5)]
)
def test_signal_stops_after_step_and_run_is_resumable(
    tmp_path, setting, monkeypatch, capsys, number, status, step
):
    model, photos, whole = setting
    train_step = Trainer.train_step

    def signalled(self, *arguments):
        if self.step == step:
            os.kill(os.getpid(), number)
        return train_step(self, *arguments)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        assert finetune(out, model, photos, *FLAGS) == status
    error = capsys.readouterr().err
    assert "finishing the step" in error
    assert f"resume with: vgg-transfer finetune --config {out}/config.yaml" in error
    command = error.splitlines()[-1].split("vgg-transfer ")[1].split()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    steps = []

    def counted(self, *arguments):
        steps.append(self.step)
        return train_step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", counted)
        assert main(command) == 0
    assert steps[0] == step + 1  # no step is repeated
    assert_same_end(whole, out)


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 2])
def test_signal_during_validation_is_resumable(tmp_path, setting, monkeypatch, call):
    """The dropout state of the network is also restored."""
    model, photos, whole = setting
    calls = []

    def signalled(*arguments):
        calls.append(None)
        found = predict_logits(*arguments)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("transfer.finetuning.inputs.predict_logits", signalled)
        assert finetune(out, model, photos, *FLAGS) == 143
    assert finetune(out, model, photos, *FLAGS, "--resume") == 0
    assert_same_end(whole, out)


@pytest.mark.slow
def test_resume_restores_best_weights_of_finished_stage(tmp_path, setting, monkeypatch):
    model, photos, _ = setting
    flags = ["--schedule", "fc7:4:0.5,pool2:2:0.01", "--early-stopping", 1]
    assert finetune(tmp_path / "whole", model, photos, *flags) == 0
    train_step, out = Trainer.train_step, tmp_path / "parts"

    def killed(self, *arguments):
        if len(self.groups[0].variables) > 2:  # the second stage
            raise RuntimeError("killed")
        return train_step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed)
        assert finetune(out, model, photos, *flags) == 1
    assert finetune(out, model, photos, *flags, "--resume") == 0
    assert_same_end(tmp_path / "whole", out)


@pytest.mark.slow
def test_resume_rejects_other_images(tmp_path, setting, capsys):
    import shutil

    model, photos, _ = setting
    own = shutil.copytree(photos, tmp_path / "photos")
    assert finetune(tmp_path / "run", model, own) == 0
    held_out = (tmp_path / "run" / "held_out.txt").read_text()
    image = next((own / "red").iterdir())
    shutil.copy(image, image.with_name("another.png"))
    assert finetune(tmp_path / "run", model, own, "--resume") == 1
    assert "its dataset changed since it began" in capsys.readouterr().err
    assert (tmp_path / "run" / "held_out.txt").read_text() == held_out


def test_signal_outside_of_a_step_stops_immediately(tmp_path):
    expected = pytest.raises(Interrupted, match="call again with run_dir=.*, resume=True")
    with expected as caught, resumable(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.status == 143


def test_second_signal_stops_immediately():
    signals = Signals()
    with pytest.raises(KeyboardInterrupt), signals.held():
        signals.handle(signal.SIGINT, None)
        signals.handle(signal.SIGINT, None)
        raise AssertionError("it went on")


# Programs that kill themselves with SIGKILL, so that nothing can be cleaned up.
KILLED_BEFORE_A_STEP = """
from transfer.training.trainer import Trainer
train_step = Trainer.train_step
def killed(self, *arguments):
    if self.step == 6: os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self, *arguments)
Trainer.train_step = killed
"""
# The best weights are written, the checkpoint is not complete, and training has gone on.
KILLED_WHILE_A_CHECKPOINT_IS_WRITTEN = """
import threading
from transfer.training.checkpoints import RunCheckpoint
from transfer.training.trainer import Trainer
write, train_step, has_begun = RunCheckpoint._write, Trainer.train_step, threading.Event()
def unfinished(self, name, state):
    if name == "step-2":
        has_begun.set()
        time.sleep(60)
    write(self, name, state)
def killed(self, *arguments):
    results = train_step(self, *arguments)
    if self.step == 10:
        has_begun.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return results
RunCheckpoint._write, Trainer.train_step = unfinished, killed
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "patch", [KILLED_BEFORE_A_STEP, KILLED_WHILE_A_CHECKPOINT_IS_WRITTEN], ids=["step", "writing"]
)
def test_killed_process_is_resumable(tmp_path, setting, patch):
    *_, whole = setting
    out = tmp_path / "run"
    config = yaml.safe_load((whole / "config.yaml").read_text()) | {"out": str(out)}
    (tmp_path / "flags.yaml").write_text(yaml.safe_dump(config))
    program = f"""
import os, sys, signal, time
from recipes.cli import main
{patch}
sys.exit(main(sys.argv[1:]))
"""
    flags = ["finetune", "--config", str(tmp_path / "flags.yaml"), "--resume"]
    done = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (out / "metrics.json").exists()
    assert main(flags) == 0
    assert_same_end(whole, out)
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["dataset"]["training"]["images"] == 20
    assert "--resume" in provenance["command"]


@pytest.mark.slow
def test_second_run_in_same_folder_is_refused(tmp_path, setting, capsys):
    import filelock

    model, photos, _ = setting
    assert finetune(tmp_path, model, photos) == 0
    with filelock.FileLock(tmp_path / ".lock"):
        assert finetune(tmp_path, model, photos, "--resume") == 1
    assert "another process works in" in capsys.readouterr().err


def test_history_is_truncated_to_checkpoint(tmp_path):
    path = tmp_path / "history.csv"
    path.write_bytes(b"epoch,loss\r\n0,1.5\r\n1,1.25\r\n2,1.0\r\n3,0.")  # as Keras writes it
    run_folder.keep_history(tmp_path, 3)
    assert path.read_bytes().endswith(b"2,1.0\r\n")
    run_folder.keep_history(tmp_path, 2)
    assert path.read_bytes() == b"epoch,loss\r\n0,1.5\r\n1,1.25\r\n"
    run_folder.keep_history(tmp_path, 0)
    assert not path.exists()
    run_folder.keep_history(tmp_path, 0)


def test_resume_rejects_foreign_folder(tmp_path, model, image_folder, capsys):
    (tmp_path / ".config.yaml.tmp").write_text("of a run that was killed as it began")
    run_folder.check(tmp_path, resume=True)
    (tmp_path / "photo.jpg").write_bytes(b"")
    assert finetune(tmp_path, model, image_folder, "--resume") == 1
    assert "holds no run to resume" in capsys.readouterr().err
