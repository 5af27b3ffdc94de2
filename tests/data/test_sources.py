import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_image_folder
from PIL import Image

from transfer.data import dataset
from transfer.data.sources import open_source
from transfer.data.tfds import tfds
from transfer.data.tfds_dataset import from_builder
from transfer.images.preprocess import Preprocess

PREPROCESS = Preprocess("none", 8)


def test_digits_equal_scikit_learn(digits_dir):
    from sklearn.datasets import load_digits

    source = open_source("digits", data_dir=str(digits_dir))
    train, test = dataset.train_and_eval_splits(source)
    assert source.class_names == [str(digit) for digit in range(10)]
    assert (len(train), len(test)) == (1438, 359)
    raw = Preprocess("none", 8)
    images, labels = zip(*[*train.batches(raw, 500), *test.batches(raw, 500)], strict=True)
    images = np.concatenate(images)[..., 0]
    expected = load_digits()

    def keyed(images, labels):
        return sorted((*x.ravel().tolist(), int(y)) for x, y in zip(images, labels, strict=True))

    assert keyed(images, np.concatenate(labels)) == keyed(
        np.round(expected.images * 255 / 16), expected.target
    )


def test_digits_splits_are_stratified(digits_dir):
    source = open_source("digits", data_dir=str(digits_dir))
    train, test = (np.bincount(split.labels) for split in dataset.train_and_eval_splits(source))
    np.testing.assert_allclose(test, 0.2 * (train + test), atol=0.5)


def test_data_dir_with_one_dataset_needs_no_name(digits_dir):
    assert open_source(data_dir=str(digits_dir)).name == "digits"
    direct = open_source(data_dir=str(digits_dir / "digits" / "1.0.0"))
    assert direct.class_names == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("layout", ["", "train"], ids=["classes", "splits"])
def test_image_folder_has_classes_and_labels(tmp_path, layout):
    make_image_folder(tmp_path / "photos" / layout)
    source = open_source(image_folder=str(tmp_path / "photos"))
    assert source.class_names == ["blue", "red"]
    assert source.split_names == ["train"]
    train, held_out = dataset.train_and_eval_splits(source)
    assert np.bincount(train.labels).tolist() == [10, 10]
    assert np.bincount(held_out.labels).tolist() == [2, 2]
    assert all(name.endswith((".jpg", ".png")) for name in train.names)
    for images, labels in train.batches(PREPROCESS, 4):  # the classes differ by colour
        is_red = images.numpy()[..., 0].mean((1, 2)) > images.numpy()[..., 2].mean((1, 2))
        np.testing.assert_array_equal(is_red, labels)


def test_image_folder_with_split_folders(tmp_path):
    make_image_folder(tmp_path / "train", 6)
    make_image_folder(tmp_path / "val", 3)
    source = open_source(image_folder=str(tmp_path))
    assert [len(s) for s in dataset.train_and_eval_splits(source)] == [12, 6]
    assert len(source.split("train[:50%]+val")) == 12


def test_class_missing_in_one_split_keeps_labels(tmp_path):
    make_image_folder(tmp_path / "train", 3)
    make_image_folder(tmp_path / "test", 3)
    for path in (tmp_path / "test" / "blue").iterdir():
        path.unlink()
    _, test = dataset.train_and_eval_splits(open_source(image_folder=str(tmp_path)))
    assert test.labels.tolist() == [1, 1, 1]


def test_other_files_in_image_folder_are_ignored(tmp_path):
    make_image_folder(tmp_path / "train", 4)
    train = tmp_path / "train"
    for name in (".ipynb_checkpoints", "__MACOSX", "empty"):
        (train / name).mkdir()
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (train / name / "x.jpg").write_bytes((train / "red" / "00.jpg").read_bytes())
    (train / "red" / "._00.jpg").write_bytes(b"litter")
    (train / "red" / "notes.txt").write_text("nothing to see")
    (train / "red" / "folder.jpg").mkdir()
    (tmp_path / "notes" / "drafts").mkdir(parents=True)
    (tmp_path / "test").write_text("a file")
    source = open_source(image_folder=str(tmp_path))
    assert (source.class_names, source.split_names) == (["blue", "red"], ["train"])
    assert len(source.split("train")) == 8


def test_images_in_subfolders_of_a_class_are_found(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "2024").mkdir(parents=True)
        for file in ("x.JPG", "x.bmp", "x.gif", "2024/y.jpeg", "2024/y.PNG"):
            kind = {"jpg": "jpeg"}.get(file[-3:].lower(), file.rpartition(".")[2])
            Image.new("RGB", (7, 5)).save(tmp_path / name / file, format=kind)
    split = open_source(image_folder=str(tmp_path)).split("train")
    assert sum(len(labels) for _, labels in split.batches(PREPROCESS, 3)) == len(split) == 10


def test_dataset_name_must_match_prepared_directory(digits_dir):
    for directory in (digits_dir / "digits" / "1.0.0", digits_dir / "digits"):
        assert open_source(data_dir=str(directory)).name == "digits"
        assert open_source("digits", data_dir=str(directory)).name == "digits"
        with pytest.raises(ValueError, match="is that of the dataset 'digits', not of 'mnist'"):
            open_source("mnist", data_dir=str(directory))


def test_empty_image_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no images; expected one folder per class"):
        open_source(image_folder=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_source(image_folder=str(tmp_path / "nowhere"))


def test_image_folder_with_one_class_is_refused(tmp_path):
    make_image_folder(tmp_path)
    for path in (tmp_path / "blue").iterdir():
        path.unlink()
    (tmp_path / "blue").rmdir()
    with pytest.raises(ValueError, match=r"has 1 class \['red'\]; a classifier needs at least 2"):
        open_source(image_folder=str(tmp_path))


def test_class_names_that_are_not_utf_8_are_refused(tmp_path):
    make_image_folder(tmp_path)
    (tmp_path / "blue").rename(os.fsdecode(os.fsencode(tmp_path) + b"/bl\xfc"))
    with pytest.raises(ValueError, match="class names that are not UTF-8 text: 'bl.*udcfc'; ren"):
        open_source(image_folder=str(tmp_path))


def test_images_of_floats_are_refused():
    # tfds stores float32 as PNG files with four channels of bytes.
    image = tfds.features.Image(shape=(4, 4, 1), dtype=np.float32)
    features = {"image": image, "label": tfds.features.ClassLabel(num_classes=2)}
    builder = SimpleNamespace(info=SimpleNamespace(features=tfds.features.FeaturesDict(features)))
    with pytest.raises(ValueError, match="images of dtype float32; expected uint8 or uint16"):
        from_builder(builder, "floats")


@pytest.mark.timeout(300)
def test_unprepared_dataset_without_network_fails_fast(tmp_path, monkeypatch):
    """Simulates a machine without a network."""

    answer = threading.Event()

    def hang(*_, **__):
        answer.wait()
        raise OSError

    monkeypatch.setattr("urllib.request.urlopen", hang)
    with pytest.raises(ValueError, match="'beans' is not prepared in .* no network .* `tfds build"):
        open_source("beans", data_dir=str(tmp_path))
    answer.set()


def test_unknown_dataset_suggests_similar_names(tmp_path):
    with pytest.raises(ValueError, match="no dataset 'tf_flower'; did you mean tf_flowers"):
        open_source("tf_flower", data_dir=str(tmp_path))


def test_missing_data_dir_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="data dir .* does not exist"):
        open_source("tf_flowers", data_dir=str(tmp_path / "nowhere"))


@pytest.mark.slow
def test_prepared_datasets_are_opened(shared_tfds):
    for name, classes, size in (("tf_flowers", 5, 3670), ("cmaterdb/telugu", 10, None)):
        source = open_source(name, data_dir=shared_tfds)
        train, held_out = dataset.train_and_eval_splits(source)
        assert len(source.class_names) == classes
        assert size is None or len(train) + len(held_out) == size
        images, labels = next(iter(held_out.batches(Preprocess("torch", 32), 8)))
        assert (images.shape, labels.shape) == ((8, 32, 32, 3), (8,))
