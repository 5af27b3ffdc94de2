import io

import numpy as np
import pytest
from PIL import Image

from transfer import data_checks
from transfer.sources import open_source


def photo(seed, size=(64, 48)):
    """Something smooth, as photos are."""
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


def look(root):
    split = open_source("", image_folder=str(root)).split("train")
    return data_checks.look(split), split.names


def groups(root):
    found, names = look(root)
    return [{names[index] for index in group} for group in data_checks.duplicates(found)]


def test_different_photos_are_different(folder):
    assert groups(folder) == []


def test_copies_and_other_sizes_and_qualities(folder):
    (folder / "b" / "copy.png").write_bytes((folder / "a" / "3.png").read_bytes())
    photo(5).save(folder / "b" / "worse.jpg", quality=60)
    photo(5).resize((200, 150)).save(folder / "a" / "larger.png")
    found = groups(folder)
    assert len(found) == 2
    assert {"a/3.png", "b/copy.png"} in found
    assert {"a/5.png", "a/larger.png", "b/worse.jpg"} in found


def test_flat_pictures_are_the_same_only_if_the_files_are(folder):
    for number, value in enumerate((10, 11, 10)):
        Image.new("RGB", (20, 20), (value, 0, 0)).save(folder / "a" / f"flat{number}.png")
    assert groups(folder) == [{"a/flat0.png", "a/flat2.png"}]


def test_unreadable_and_truncated(folder):
    data = io.BytesIO()
    photo(1).save(data, "JPEG")
    (folder / "a" / "half.jpg").write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    (folder / "a" / "text.png").write_bytes(b"no image")
    found, names = look(folder)
    assert {names[i] for i in np.flatnonzero(found.unreadable)} == {"a/half.jpg", "a/text.png"}
    assert data_checks.duplicates(found) == []


def test_wrong_labels_come_first():
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 40)
    features = generator.normal(size=(120, 10)).astype(np.float32)
    features[np.arange(120), labels] += 6
    given = labels.copy()
    wrong = [3, 50, 90]
    given[wrong] = (labels[wrong] + 1) % 3
    p, order = data_checks.doubtful_labels(features, given)
    assert {*order[:3]} == {*wrong}
    assert len(order) <= 6
    np.testing.assert_allclose(p.sum(-1), 1)
    np.testing.assert_array_equal(p.argmax(-1)[wrong], labels[wrong])


def test_labels_of_single_images_cannot_be_judged():
    with pytest.raises(ValueError, match="at least 2 images"):
        data_checks.doubtful_labels(np.zeros((3, 2), np.float32), np.array([0, 0, 1]))


def test_balance():
    names = ["a", "b", "c"]
    train = np.array([0] * 30 + [1] * 3)
    lines = data_checks.describe_balance(names, train, np.array([0, 1, 2]))
    assert lines == [
        "1 classes have no images to train on: c",
        "1 classes have less than a tenth of the training images of 'a': b; consider "
        "--class-weights balanced",
    ]
    assert data_checks.describe_balance(names[:2], np.array([0, 1]), np.array([0, 1])) == []
