import re

import numpy as np
import pytest
from conftest import make_image_folder

from transfer import fine_tune, open_source


def test_held_out_images_with_other_classes_are_refused(tmp_path, model, image_folder):
    train = open_source(image_folder=str(image_folder)).split("train")
    other = make_image_folder(tmp_path / "test")
    (other / "blue").rename(other / "yellow")
    held_out = open_source(image_folder=str(other)).split("train")
    message = "'photos' have 2 classes, and .* 'test' have 2, with blue, yellow in one of them only"
    with pytest.raises(ValueError, match=message):
        fine_tune(model, train, held_out, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("role", ["train", "held_out"])
def test_splits_without_images_are_refused(tmp_path, model, image_folder, role):
    whole = open_source(image_folder=str(image_folder)).split("train")
    splits = {"train": whole, "held_out": whole} | {role: whole.where(np.zeros(len(whole), bool))}
    with pytest.raises(ValueError, match=re.escape(f"{role} has no images")):
        fine_tune(model, splits["train"], splits["held_out"], run_dir=tmp_path / "run")
