"""The images of a finished run."""

import os
from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf

from transfer.core.files import write_names
from transfer.data.dataset import Source, Split
from transfer.runs import run_data, run_folder


@pytest.fixture
def source():
    """A source with an unlabelled test split, as in competitions."""
    labels = {"train": [0, 1, 0, 1], "validation": [0, 1], "test": [-1, -1]}

    def examples(part, positions):
        return tf.data.Dataset.from_tensor_slices({"label": of(part)[positions]})

    def of(part):
        return np.array(labels[part], np.int64)

    sizes = {part: len(values) for part, values in labels.items()}
    names = {part: [f"{part}/{n}" for n in range(size)] for part, size in sizes.items()}
    return Source("quiz", ["a", "b"], sizes, examples, of, names.__getitem__, names.__getitem__)


def run_of(folder, names):
    (folder / run_folder.HELD_OUT).write_text("".join(f"{name}\n" for name in names))
    (folder / run_folder.CONFIG).write_text("train_split: auto\neval_split: auto\n")
    return folder


def test_unlabelled_split_is_ignored(tmp_path, source):
    run = run_of(tmp_path, ["validation/0", "validation/1"])
    held_out = run_data.held_out(run, source)
    assert held_out.names == ["validation/0", "validation/1"]
    assert held_out.labels.tolist() == [0, 1]
    assert run_data.trained_on(run, source).names == [f"train/{n}" for n in range(4)]
    assert run_data.num_not_held_out(run, source.split("train+validation")) == 4


def test_a_run_from_python_records_no_split_expressions(tmp_path, source):
    run = run_of(tmp_path, ["validation/0"])
    (run / run_folder.CONFIG).write_text("dataset: quiz\n")
    assert run_data.trained_on(run, source).names == [f"train/{n}" for n in range(4)]


def test_missing_held_out_images_are_named(tmp_path, source):
    run = run_of(tmp_path, ["validation/0", "validation/7"])
    with pytest.raises(ValueError, match="1 of the 2 images .* are gone .* 'validation/7'"):
        run_data.held_out(run, source)


ODD = [
    "validation/a\nb.jpg",
    "validation/c\u2028d.jpg",
    "validation/\udcff.jpg",
    "validation/e\\n.jpg",
]


def test_held_out_images_may_have_any_name(tmp_path, source):
    by_part = {"train": ["train/0"], "validation": ODD, "test": []}
    sizes = {part: len(names) for part, names in by_part.items()}
    source = replace(source, sizes=sizes, names=by_part.__getitem__)
    run = run_of(tmp_path, [])
    write_names(run / run_folder.HELD_OUT, ODD[:3])
    assert run_data.held_out(run, source).names == ODD[:3]
    assert run_data.num_not_held_out(run, Split(source, (("validation", np.arange(4)),))) == 1


def test_a_run_whose_images_came_from_a_program_is_not_opened_as_another_dataset(tmp_path):
    run = run_of(tmp_path, ["train/0"])
    with pytest.raises(ValueError, match="came from a Python program .* image_folder=DIR"):
        run_data.open_data(run)
    (run / run_folder.CONFIG).write_text("dataset: digits\n")
    assert run_data.open_data(run).name == "digits"


def test_empty_or_special_held_out_list_is_refused(tmp_path, source):
    run = run_of(tmp_path, [])
    with pytest.raises(ValueError, match=r"'.*held_out.txt' names no images"):
        run_data.held_out(run, source)
    (run / run_folder.HELD_OUT).unlink()
    os.mkfifo(run / run_folder.HELD_OUT)
    for read in (run_data.held_out, run_data.trained_on):
        with pytest.raises(ValueError, match=r"held_out.txt' is not a regular file"):
            read(run, source)
