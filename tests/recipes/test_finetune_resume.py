"""`finetune --resume` from end to end, on small networks and generated photos."""

import keras
import pytest
from commands import finetune, metrics

from recipes.cli import main
from transfer.training.trainer import Trainer


@pytest.fixture(autouse=True)
def _own_session():
    keras.backend.clear_session()


@pytest.mark.slow
def test_resume_ends_where_an_uninterrupted_run_ends(
    tmp_path, model, image_folder, monkeypatch, capsys
):
    flags = ["--freeze-until", "pool2", "--dropout", 0.2, "--epochs", 4]
    assert finetune(tmp_path / "whole", model, image_folder, *flags) == 0
    train_epoch = Trainer.train_epoch

    def interrupted(self, *arguments, **options):
        if self.epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", interrupted)
        assert finetune(tmp_path / "parts", model, image_folder, *flags) == 130
    out = tmp_path / "parts"
    hint = f"resume with: vgg-transfer finetune --config {out}/config.yaml --out {out} --resume"
    assert capsys.readouterr().err.endswith(f"error: interrupted; {hint}\n")
    assert finetune(tmp_path / "parts", model, image_folder, *flags, "--resume") == 0
    data = "model.data-00000-of-00001"
    assert (tmp_path / "whole" / data).read_bytes() == (tmp_path / "parts" / data).read_bytes()
    assert metrics(tmp_path / "whole")["eval"] == metrics(tmp_path / "parts")["eval"]
    assert len((tmp_path / "parts" / "history.csv").read_text().splitlines()) == 5


@pytest.mark.slow
def test_resume_with_more_epochs_continues(tmp_path, model, image_folder):
    assert finetune(tmp_path / "whole", model, image_folder, "--epochs", 4) == 0
    assert finetune(tmp_path / "parts", model, image_folder, "--epochs", 2) == 0
    assert finetune(tmp_path / "parts", model, image_folder, "--epochs", 4, "--resume") == 0
    assert metrics(tmp_path / "whole")["eval"] == metrics(tmp_path / "parts")["eval"]


@pytest.mark.slow
def test_resume_accepts_runs_older_than_a_flag(tmp_path, model, image_folder):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder, "--epochs", 1) == 0
    config = out / "config.yaml"
    kept = [line for line in config.read_text().splitlines(True) if "skip_unreadable" not in line]
    config.write_text("".join(kept))
    assert finetune(out, model, image_folder, "--epochs", 2, "--resume") == 0
    assert metrics(out)["train"]["epochs"] == 2


@pytest.mark.slow
def test_resume_rejects_other_flags(tmp_path, model, image_folder, capsys):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder, "--epochs", 1) == 0
    config = (out / "config.yaml").read_text()
    flags = ["--resume", "--epochs", 2, "--learning-rate", 0.5, "--hidden", 4]
    assert finetune(out, model, image_folder, *flags) == 1
    error = capsys.readouterr().err
    assert "--hidden None, now [4]; --learning-rate 0." in error
    assert (out / "config.yaml").read_text() == config
    assert main(["finetune", "--resume"]) == 1
    assert "--resume needs the folder of the run" in capsys.readouterr().err


@pytest.mark.slow
def test_resume_with_fewer_epochs_than_there_are_is_refused(tmp_path, model, image_folder, capsys):
    out = tmp_path / "run"
    assert finetune(out, model, image_folder, "--epochs", 3) == 0
    config = (out / "config.yaml").read_text()
    assert finetune(out, model, image_folder, "--epochs", 2, "--resume") == 1
    error = capsys.readouterr().err
    assert "already has 3 epochs, and --epochs 2 would end it before; give --epochs 3 or" in error
    assert (out / "config.yaml").read_text() == config
    assert finetune(out, model, image_folder, "--epochs", 3, "--resume") == 0
