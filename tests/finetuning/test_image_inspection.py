import io

import numpy as np
import pytest
from PIL import Image

from transfer import fine_tune, open_source
from transfer.finetuning import image_inspection
from transfer.finetuning.image_inspection import inspect_images
from transfer.finetuning.options import FineTuneOptions

OPTIONS = FineTuneOptions(cache="memory")


@pytest.mark.parametrize("most", [23, 10_000])
def test_images_that_are_both_trained_and_evaluated_on_are_reported(
    image_folder, monkeypatch, caplog, most
):
    """Also where there are too many to decode all."""
    monkeypatch.setattr(image_inspection, "MAX_COMPARED", most)
    source = open_source(image_folder=str(image_folder))
    train, held_out = source.train_and_eval_splits()
    both = source.split("+".join(source.split_names))
    assert inspect_images(train, held_out, OPTIONS, verbose=0).num_leaks == 0
    assert inspect_images(both, held_out, OPTIONS, verbose=0).num_leaks == len(held_out)
    assert f"{len(held_out)} images are both trained and evaluated on" in caplog.text


def test_copies_do_not_make_cross_validation_optimistic(tmp_path, caplog):
    """Three JPEG files of each training image, of other sizes and qualities."""
    train, held_out = open_source("digits").train_and_eval_splits()
    folder = tmp_path / "photos"
    for role, split, copies in (
        ("train", train, {96: 95, 128: 90, 160: 85}),
        ("validation", held_out, {96: 95}),
    ):
        for number, example in enumerate(split.examples(np.arange(120)).as_numpy_iterator()):
            image = Image.open(io.BytesIO(example["image"])).convert("L")
            of_class = folder / role / str(example["label"])
            of_class.mkdir(parents=True, exist_ok=True)
            for size, quality in copies.items():
                copy = image.resize((size, size), Image.Resampling.BICUBIC)
                copy.save(of_class / f"{number}-{size}.jpg", quality=quality)
    source = open_source(image_folder=str(folder))
    splits = source.split("train"), source.split("validation")
    with caplog.at_level("INFO"):
        result = fine_tune("embedded", *splits, run_dir=tmp_path / "run", cache="memory")
    assert "360 of the 360 training images are near-duplicates" in caplog.text
    found = result.metrics["solver"]["cross_validation"]
    # Each from its own copies, all would be right, with a loss of 0.002.
    assert 0.9 < found["accuracy"] < 0.99 and found["loss"] > 0.1
