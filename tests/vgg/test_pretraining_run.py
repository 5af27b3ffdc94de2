"""The folder of a pretraining run."""

import numpy as np
import pytest

from transfer import open_source
from transfer.vgg import pretraining_run


def test_run_is_resumed_with_its_images_only(tmp_path, image_folder, monkeypatch):
    def run(train, **options):
        pretraining_run.pretrain(train, held_out, run_dir=tmp_path / "run", **options)

    monkeypatch.setattr(pretraining_run, "_train_and_save", lambda run, source: None)
    train, held_out = open_source(image_folder=str(image_folder)).train_and_eval_splits()
    fewer = train.where(np.arange(len(train)) > 0)
    run(train)
    run(train, resume=True)
    with pytest.raises(ValueError, match="its training images changed since it began"):
        run(fewer, resume=True)
    (tmp_path / "run" / "provenance.json").unlink()  # as runs of earlier versions
    run(fewer, resume=True)
    with pytest.raises(ValueError, match="changed"):
        run(train, resume=True)
