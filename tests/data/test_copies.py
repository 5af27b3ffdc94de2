import dataclasses

import numpy as np
import pytest
from conftest import make_image_folder

from transfer import open_source
from transfer.data.copies import keep_together


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """24 images of each of two classes, the first of which comes first."""
    return open_source(image_folder=str(make_image_folder(tmp_path_factory.mktemp("photos"))))


def test_near_duplicates_are_one_group_in_every_selection(source):
    train = source.split("train[20:]+train[:10]")
    assert keep_together(train, []).groups is None
    joined = keep_together(train, [[0, 3], [5, 7]])
    assert [*joined.names] == [*train.names] and (joined.ids == train.ids).all()
    numbers = joined.groups
    assert numbers[0] == numbers[3] and numbers[5] == numbers[7]
    assert len(np.unique(numbers)) == len(train) - 2
    few = joined.where(np.arange(len(train)) % 2 == 1)
    assert few.groups[2] == few.groups[3], "the fifth and the seventh"
    assert len(np.unique(few.groups)) == len(few) - 1


def test_groups_of_the_source_are_kept(source):
    size = source.sizes["train"]
    of = {"train": np.arange(size) // 2}
    train = dataclasses.replace(source, groups=of.__getitem__).split("train")
    numbers = keep_together(train, [[1, 4]]).groups
    assert len({*numbers[[0, 1, 4, 5]]}) == 1
    assert len(np.unique(numbers)) == size // 2 - 1


def test_a_class_of_one_picture_can_still_be_left_out(source, caplog):
    train = source.split("train")
    first = np.flatnonzero(train.labels == 0).tolist()
    assert keep_together(train, [first]).groups is None
    assert f"all training images of {source.class_names[0]!r} are near-duplicates" in caplog.text
    numbers = keep_together(train, [first, [len(train) - 1, len(train) - 2]]).groups
    assert len(np.unique(numbers)) == len(train) - 1
