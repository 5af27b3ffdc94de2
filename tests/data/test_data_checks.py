import io

import numpy as np
import pytest
from PIL import Image

from transfer.data import data_checks, fingerprints
from transfer.data.fingerprints import FINGERPRINT
from transfer.data.sources import open_source


def photo(seed, size=(64, 48)):
    """A smooth random image."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for label, name in enumerate(("a", "b")):
        (root / name).mkdir(parents=True)
        for number in range(8):
            photo(100 * label + number).save(root / name / f"{number}.png")
    return root


def scan(root):
    split = open_source("", image_folder=str(root)).split("train")
    return data_checks.scan(split), split.names


def groups(root):
    found, names = scan(root)
    return [{names[index] for index in group} for group in data_checks.duplicates(found)]


def test_different_photos_are_not_duplicates(folder):
    assert groups(folder) == []


def test_copies_of_other_size_and_quality_are_duplicates(folder):
    (folder / "b" / "copy.png").write_bytes((folder / "a" / "3.png").read_bytes())
    photo(5).save(folder / "b" / "worse.jpg", quality=60)
    photo(5).resize((200, 150)).save(folder / "a" / "larger.png")
    found = groups(folder)
    assert len(found) == 2
    assert {"a/3.png", "b/copy.png"} in found
    assert {"a/5.png", "a/larger.png", "b/worse.jpg"} in found


def test_blank_images_are_duplicates_only_if_files_are_equal(folder):
    for number, value in enumerate((10, 11, 10)):
        Image.new("RGB", (20, 20), (value, 0, 0)).save(folder / "a" / f"flat{number}.png")
    assert groups(folder) == [{"a/flat0.png", "a/flat2.png"}]


def test_unreadable_and_truncated_images_are_found(folder):
    data = io.BytesIO()
    photo(1).save(data, "JPEG")
    (folder / "a" / "half.jpg").write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    (folder / "a" / "text.png").write_bytes(b"no image")
    found, names = scan(folder)
    assert {names[i] for i in np.flatnonzero(found.unreadable)} == {"a/half.jpg", "a/text.png"}
    assert data_checks.duplicates(found) == []


def test_missing_and_rare_classes_are_described():
    names = ["a", "b", "c"]
    train = np.array([0] * 30 + [1] * 3)
    lines = data_checks.describe_balance(names, train, np.array([0, 1, 2]))
    assert lines == [
        "1 class has no images to train on: c",
        "1 class has less than a tenth of the training images of 'a': b; consider "
        "class_weights=balanced",
    ]
    assert data_checks.describe_balance(names[:2], np.array([0, 1]), np.array([0, 1])) == []
    names, labels = ["Cat", "cat", "caf\u00e9", "cafe\u0301", "dog"], np.arange(5)
    (line,) = data_checks.describe_balance(names, labels, labels)
    assert line.startswith("4 classes have names that differ only in case or Unicode form: Cat, ca")


def test_large_photos_match_small_copies(folder):
    """Large photos are decoded at 1/8 of their size."""
    for seed in (3, 4):
        large = photo(seed, (1210, 1117))
        large.save(folder / "a" / f"large{seed}.jpg", quality=90)
        turned = large.transpose(Image.Transpose.ROTATE_90)  # shown upright by EXIF: 6
        exif = Image.Exif()
        exif[0x0112] = 6
        turned.save(folder / "b" / f"turned{seed}.jpg", exif=exif)
        large.resize((121, 112)).save(folder / "b" / f"small{seed}.jpg", quality=70)
    (folder / "a" / "3.png").unlink()
    (folder / "a" / "4.png").unlink()
    assert groups(folder) == [
        {f"a/large{seed}.jpg", f"b/small{seed}.jpg", f"b/turned{seed}.jpg"} for seed in (3, 4)
    ]


def test_very_large_images_have_same_thumbnail(folder, monkeypatch):
    split = open_source("", image_folder=str(folder)).split("train")
    expected = fingerprints.fingerprints(split)["thumbnail"]
    monkeypatch.setattr(fingerprints, "_LARGE", 0)
    found = fingerprints.fingerprints(split)["thumbnail"]
    np.testing.assert_allclose(found.astype(int), expected, atol=1)


def test_many_copies_are_one_group():
    found = np.zeros(1000, FINGERPRINT)
    generator = np.random.default_rng(0)
    found["sha256"] = [generator.bytes(32) for _ in found]
    found["readable"] = True
    found["thumbnail"] = np.asarray(photo(0, (32, 32)).convert("L"))
    assert data_checks.near_duplicates(found) == [[*range(1000)]]


@pytest.mark.slow
def test_duplicates_in_public_dataset_are_found(shared_tfds):
    """Expected counts come from comparing all pairs of full-size thumbnails."""
    split = open_source("tf_flowers", data_dir=shared_tfds).split("train")
    found = data_checks.duplicates(data_checks.scan(split))
    assert found == [
        [214, 1204],
        [725, 1007],
        [1050, 2568],
        [1739, 2380],
        [1987, 2916],
        [2215, 3061],
        [2468, 2485],
    ]
