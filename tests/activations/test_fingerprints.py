import numpy as np
import pytest
from PIL import Image

from transfer.activations.fingerprints import remembered
from transfer.data import dataset, near_duplicates
from transfer.data.sources import open_source


@pytest.fixture
def looked_at(monkeypatch):
    """The numbers of images decoded in each pass."""
    counts = []

    def fingerprints(images, progress=iter):
        counts.append(len(images))
        return near_duplicates.fingerprints(images, progress)

    monkeypatch.setattr(dataset, "fingerprints", fingerprints)
    return counts


def found(folder, cache):
    source = open_source(image_folder=str(folder))
    with remembered(source, cache):
        return source.split("train").fingerprints()


def test_images_are_decoded_once(image_folder, tmp_path, looked_at):
    (image_folder / "red" / "00.jpg").write_bytes(b"no image")
    first = found(image_folder, tmp_path / "cache")
    np.testing.assert_array_equal(found(image_folder, tmp_path / "cache"), first)
    assert looked_at == [24]
    assert first["readable"].sum() == 23
    Image.new("RGB", (9, 9)).save(image_folder / "red" / "new.png")
    (image_folder / "red" / "02.jpg").write_bytes(b"changed")
    assert len(found(image_folder, tmp_path / "cache")) == 25
    assert looked_at == [24, 2]


def test_unusable_caches_are_ignored(image_folder, tmp_path, looked_at):
    first = found(image_folder, tmp_path / "cache")
    (rows,) = (tmp_path / "cache").rglob("rows-*.bin")
    data = bytearray(rows.read_bytes())
    data[100] ^= 1
    rows.write_bytes(data)
    np.testing.assert_array_equal(found(image_folder, tmp_path / "cache"), first)
    (tmp_path / "file").write_text("")
    np.testing.assert_array_equal(found(image_folder, tmp_path / "file"), first)
    assert looked_at == [24, 1, 24]
