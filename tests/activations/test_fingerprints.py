import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from transfer.activations.fingerprints import remembered
from transfer.data import fingerprints
from transfer.data.sources import open_source


@pytest.fixture
def looked_at(monkeypatch):
    """The numbers of images decoded in each pass."""
    counts, decode = [], fingerprints.fingerprints

    def counted(images, *options):
        counts.append(len(images))
        return decode(images, *options)

    monkeypatch.setattr(fingerprints, "fingerprints", counted)
    return counts


def found(folder, cache):
    source = open_source(image_folder=str(folder))
    with remembered(source, cache):
        return source.split("train").fingerprints()


def test_readable_images_are_decoded_once(own_image_folder, tmp_path, looked_at):
    (own_image_folder / "red" / "00.jpg").write_bytes(b"no image")
    first = found(own_image_folder, tmp_path / "cache")
    np.testing.assert_array_equal(found(own_image_folder, tmp_path / "cache"), first)
    assert looked_at == [24, 1]
    assert first["readable"].sum() == 23
    Image.new("RGB", (9, 9)).save(own_image_folder / "red" / "new.png")
    (own_image_folder / "red" / "02.jpg").write_bytes(b"changed")
    assert len(found(own_image_folder, tmp_path / "cache")) == 25
    assert looked_at == [24, 1, 3]


def test_images_that_become_readable_are_found_readable(image_folder, tmp_path, monkeypatch):
    """The file does not change: a library was installed, or the network is back."""
    with monkeypatch.context() as patch:
        patch.setattr(fingerprints, "_thumbnail", lambda _: tf.strings.to_number("no image"))
        patch.setattr(fingerprints, "_fingerprint", lambda _: (b"", False, 0))
        assert not found(image_folder, tmp_path / "cache")["readable"].any()
    assert found(image_folder, tmp_path / "cache")["readable"].all()


def test_fingerprints_in_memory_follow_the_examples(own_image_folder, looked_at):
    (own_image_folder / "red" / "00.jpg").write_bytes(b"no image")
    train = open_source(image_folder=str(own_image_folder)).split("train")
    is_even = np.arange(len(train)) % 2 == 0
    some = train.where(is_even).fingerprints()
    whole = train.fingerprints()
    np.testing.assert_array_equal(whole[is_even], some)
    np.testing.assert_array_equal(train.where(~is_even).fingerprints(), whole[~is_even])
    assert len(train.where(is_even & ~is_even).fingerprints()) == 0
    assert looked_at == [12, 12]
    fresh = open_source(image_folder=str(own_image_folder)).split("train")
    np.testing.assert_array_equal(fresh.fingerprints(), whole)
    assert not whole.flags.writeable  # the same array is kept for later


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


def test_interrupted_scan_continues(image_folder, tmp_path, looked_at, monkeypatch):
    monkeypatch.setattr(fingerprints, "_SAVED_TOGETHER", 5)
    source = open_source(image_folder=str(image_folder))

    def interrupted(images):
        for number, image in enumerate(images):
            if number == 12:
                raise KeyboardInterrupt
            yield image

    with pytest.raises(KeyboardInterrupt), remembered(source, tmp_path / "cache"):
        source.split("train").fingerprints(interrupted)
    rest = found(image_folder, tmp_path / "cache")
    assert looked_at == [24, 14]
    np.testing.assert_array_equal(rest, found(image_folder, tmp_path / "other"))
