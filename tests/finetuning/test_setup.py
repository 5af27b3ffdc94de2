"""What a run refuses before any slow work."""

import numpy as np
import pytest
from PIL import Image

from transfer import fine_tune, open_source


def split_of_folder(folder, class_names):
    for place, name in enumerate(class_names):
        (folder / name).mkdir(parents=True)
        for shade in range(2):
            pixels = np.full((4, 4, 3), 100 * place + 40 * shade, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{shade}.png")
    return open_source(image_folder=folder).split("train")


@pytest.mark.parametrize("others", [("bird", "cat"), ("cat", "dog", "fox")], ids=["same", "more"])
def test_held_out_images_of_other_classes_are_refused(tmp_path, others):
    train = split_of_folder(tmp_path / "train", ("cat", "dog"))
    held_out = split_of_folder(tmp_path / "held_out", others)
    with pytest.raises(ValueError, match=rf"'cat', 'dog', held_out .* has '{others[0]}'"):
        fine_tune("embedded", train, held_out, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
