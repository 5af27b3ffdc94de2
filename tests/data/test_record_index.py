import os
import stat

import numpy as np
import pytest
from test_records import prepared

from transfer.data import index_files
from transfer.data.records import TFRecords
from transfer.data.sources import open_source


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes over all records."""
    made = []
    index = TFRecords.index
    monkeypatch.setattr(TFRecords, "index", lambda self, key: made.append(key) or index(self, key))
    return made


@pytest.fixture
def folder(tmp_path, monkeypatch):
    directory = tmp_path / "indexes"
    monkeypatch.setattr(index_files, "default_directory", lambda kind: directory)
    return directory


def opened(builder):
    split = open_source(data_dir=str(builder.data_dir)).split("train")
    np.testing.assert_array_equal(split.labels, np.arange(48) // 12)
    assert len([*split.encoded()]) == 48
    return split


def test_second_opening_makes_no_pass(tmp_path, folder, passes):
    builder = prepared(tmp_path)
    for _ in range(3):
        opened(builder)
    assert passes == ["label"]
    (path,) = folder.glob("*.npz")
    assert path.stat().st_size < 48 * 16 + 2000


def test_changed_shard_is_passed_again(tmp_path, folder, passes):
    builder = prepared(tmp_path)
    opened(builder)
    os.utime(builder.info.splits["train"].filepaths[2], (1, 1))
    opened(builder)
    assert len(passes) == 2
    assert len([*folder.glob("*.npz")]) == 1  # the new one replaces the old one


def test_damaged_or_foreign_index_is_made_again(tmp_path, folder, passes):
    builder = prepared(tmp_path)
    opened(builder)
    (path,) = folder.glob("*.npz")
    whole = path.read_bytes()
    with np.load(path) as arrays:
        states = arrays["states"]
    for number, content in enumerate((b"", b"?", whole[:-30], b"", whole), 2):
        path.write_bytes(content)
        if content == whole:  # of other records
            np.savez(path, states=states, labels=np.zeros(48, int), sizes=np.full(48, 50))
        opened(builder)
        assert len(passes) == number
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    path.write_bytes(changed)
    opened(builder)


def test_folder_that_cannot_be_written_to_is_reported_only(tmp_path, folder, passes, caplog):
    folder.write_text("a file")
    builder = prepared(tmp_path)
    opened(builder)
    opened(builder)
    assert len(passes) == 2
    assert "cannot be written to" in caplog.text
    assert stat.S_ISREG(folder.stat().st_mode)


def test_few_images_are_read_without_the_others(tmp_path, folder, monkeypatch):
    builder = prepared(tmp_path)
    opened(builder)
    split = open_source(data_dir=str(builder.data_dir)).split("train")
    read, pread = [], os.pread

    def counted(descriptor, size, offset):
        read.append(size)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    images = [example["image"].numpy() for example in split.examples(np.array([40, 3, 17]))]
    # Beside the image, a record has the label, names of the features, and its frame.
    assert len(read) == 3
    assert sum(map(len, images)) < sum(read) < sum(map(len, images)) + 3 * 60
