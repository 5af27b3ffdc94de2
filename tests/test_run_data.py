"""The images of a finished run."""

import numpy as np
import pytest
import tensorflow as tf

from transfer.data import Source
from transfer.runs import run_data, run_folder


@pytest.fixture
def source():
    """A test split whose labels nobody knows, as those of competitions."""
    labels = {"train": [0, 1, 0, 1], "validation": [0, 1], "test": [-1, -1]}

    def read(part):
        numbers = np.array(labels[part], np.int64)
        return tf.data.Dataset.from_tensor_slices({"label": numbers})

    sizes = {part: len(values) for part, values in labels.items()}
    names = {part: [f"{part}/{n}" for n in range(size)] for part, size in sizes.items()}
    return Source("quiz", ["a", "b"], sizes, read, names.__getitem__, names.__getitem__)


def run_of(folder, names):
    (folder / run_folder.HELD_OUT).write_text("".join(f"{name}\n" for name in names))
    (folder / run_folder.CONFIG).write_text("train_split: auto\neval_split: auto\n")
    return folder


def test_a_split_without_labels_does_not_matter(tmp_path, source):
    run = run_of(tmp_path, ["validation/0", "validation/1"])
    held_out = run_data.held_out(run, source)
    assert held_out.names == ["validation/0", "validation/1"]
    assert held_out.labels.tolist() == [0, 1]
    assert run_data.trained_on(run, source).names == [f"train/{n}" for n in range(4)]
    assert run_data.num_not_held_out(run, source.split("train+validation")) == 4


def test_images_that_are_gone_are_named(tmp_path, source):
    run = run_of(tmp_path, ["validation/0", "validation/7"])
    with pytest.raises(ValueError, match="1 of the 2 images .* are gone .* 'validation/7'"):
        run_data.held_out(run, source)
