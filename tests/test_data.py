import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import make_image_folder
from PIL import Image

from transfer import data
from transfer.preprocess import Preprocess

PREPROCESS = Preprocess("none", 8)


class Unlabelled(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Like the test splits of many public datasets: the labels are kept back and given as -1."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(4, 4, 1)),
                    "label": tfds.features.ClassLabel(num_classes=2),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples([0, 1, 0, 1]),
            "test": self._generate_examples([0, -1, -1]),
        }

    def _generate_examples(self, labels):
        for key, label in enumerate(labels):
            yield key, {"image": np.zeros((4, 4, 1), np.uint8), "label": label}


def test_digits_are_scikit_learns(digits_dir):
    from sklearn.datasets import load_digits

    source = data.open_source("digits", data_dir=str(digits_dir))
    train, test = data.train_and_eval_splits(source)
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
    source = data.open_source("digits", data_dir=str(digits_dir))
    train, test = (np.bincount(split.labels) for split in data.train_and_eval_splits(source))
    np.testing.assert_allclose(test, 0.2 * (train + test), atol=0.5)


def test_a_data_dir_with_one_dataset_needs_no_name(digits_dir):
    assert data.open_source(data_dir=str(digits_dir)).name == "digits"
    direct = data.open_source(data_dir=str(digits_dir / "digits" / "1.0.0"))
    assert direct.class_names == [str(digit) for digit in range(10)]


@pytest.mark.parametrize(
    ("expression", "size"),
    [
        ("train", 1438),
        ("train[:80%]", 1150),
        ("train[100:200]", 100),
        ("test[-10:]", 10),
        ("train[:5]+test[:7]", 12),
    ],
)
def test_split_expressions_mean_what_tfds_says(digits_dir, expression, size):
    source = data.open_source("digits", data_dir=str(digits_dir))
    split = source.split(expression)
    assert len(split) == len(split.names) == size
    theirs = tfds.load("digits", data_dir=str(digits_dir), split=expression)
    assert split.labels.tolist() == [int(example["label"]) for example in theirs]


@pytest.mark.parametrize("expression", ["nope", "train[", "train[:x%]"])
def test_unknown_splits_list_those_there_are(digits_dir, expression):
    source = data.open_source("digits", data_dir=str(digits_dir))
    with pytest.raises(ValueError, match=r"its splits are \['train', 'test'\]"):
        source.split(expression)


def test_an_empty_split_is_refused(digits_dir):
    source = data.open_source("digits", data_dir=str(digits_dir))
    with pytest.raises(ValueError, match=r"split 'train\[:0\]' of 'digits' has no images"):
        source.split("train[:0]")


def test_eval_images_are_never_trained_on(digits_dir):
    source = data.open_source("digits", data_dir=str(digits_dir))
    train, held_out = data.train_and_eval_splits(source, eval_split="train[:100]")
    assert (len(train), len(held_out)) == (1338, 100)
    assert not set(train.names) & set(held_out.names)
    with pytest.raises(ValueError, match="share 50 images"):
        data.train_and_eval_splits(source, "train[:100]", "train[50:150]")


def test_stratified_holdout():
    labels = np.repeat([0, 1, 2, 3], [100, 10, 2, 1])
    names = [f"{index}.jpg" for index in range(len(labels))]
    held_out = data.stratified_holdout(labels, names, 0.2)
    assert np.bincount(labels[held_out], minlength=4).tolist() == [20, 2, 1, 0]
    backwards = data.stratified_holdout(labels[::-1], names[::-1], 0.2)
    np.testing.assert_array_equal(held_out, backwards[::-1])


def test_few_shot(digits_dir):
    train = data.open_source("digits", data_dir=str(digits_dir)).split("train")
    few = data.few_shot(train, 5, seed=1)
    assert np.bincount(few.labels).tolist() == [5] * 10
    assert few.names == data.few_shot(train, 5, seed=1).names
    assert few.names != data.few_shot(train, 5, seed=2).names
    with pytest.raises(ValueError, match="class '.' has 1.. training images; 1000 per class"):
        data.few_shot(train, 1000, seed=1)


@pytest.mark.parametrize("layout", ["", "train"], ids=["classes", "splits"])
def test_image_folder(tmp_path, layout):
    make_image_folder(tmp_path / "photos" / layout)
    source = data.open_source(image_folder=str(tmp_path / "photos"))
    assert source.class_names == ["blue", "red"]
    assert source.split_names == ["train"]
    train, held_out = data.train_and_eval_splits(source)
    assert np.bincount(train.labels).tolist() == [10, 10]
    assert np.bincount(held_out.labels).tolist() == [2, 2]
    assert all(name.endswith((".jpg", ".png")) for name in train.names)
    for images, labels in train.batches(PREPROCESS, 4):  # colours tell the classes
        is_red = images.numpy()[..., 0].mean((1, 2)) > images.numpy()[..., 2].mean((1, 2))
        np.testing.assert_array_equal(is_red, labels)


def test_image_folder_with_splits_of_its_own(tmp_path):
    make_image_folder(tmp_path / "train", 6)
    make_image_folder(tmp_path / "val", 3)
    source = data.open_source(image_folder=str(tmp_path))
    assert [len(s) for s in data.train_and_eval_splits(source)] == [12, 6]
    assert len(source.split("train[:50%]+val")) == 12


def test_a_class_that_one_split_lacks_keeps_the_numbers(tmp_path):
    make_image_folder(tmp_path / "train", 3)
    make_image_folder(tmp_path / "test", 3)
    for path in (tmp_path / "test" / "blue").iterdir():
        path.unlink()
    _, test = data.train_and_eval_splits(data.open_source(image_folder=str(tmp_path)))
    assert test.labels.tolist() == [1, 1, 1]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA"])
def test_all_kinds_of_png_decode(tmp_path, mode):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new(mode, (7, 5)).save(tmp_path / name / "x.png")
    split = data.open_source(image_folder=str(tmp_path)).split("train")
    (images, _), *_ = split.batches(PREPROCESS, 2)
    assert images.shape == (2, 8, 8, 3)


def test_unreadable_images_are_named(image_folder):
    (image_folder / "red" / "00.jpg").write_bytes(b"not a picture")
    whole = (image_folder / "red" / "02.jpg").read_bytes()
    (image_folder / "red" / "02.jpg").write_bytes(whole[: len(whole) // 3])
    split = data.open_source(image_folder=str(image_folder)).split("train")
    with pytest.raises(ValueError, match="2 of 24 images cannot be decoded: ") as error:
        list(split.batches(PREPROCESS, 4))
    assert "red/00.jpg" in str(error.value)
    assert "red/02.jpg" in str(error.value)


def test_litter_in_a_folder_is_no_class_and_no_image(tmp_path):
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
    source = data.open_source(image_folder=str(tmp_path))
    assert (source.class_names, source.split_names) == (["blue", "red"], ["train"])
    assert len(source.split("train")) == 8


def test_all_kinds_of_files_below_a_class_are_found(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "2024").mkdir(parents=True)
        for file in ("x.JPG", "x.bmp", "x.gif", "2024/y.jpeg", "2024/y.PNG"):
            kind = {"jpg": "jpeg"}.get(file[-3:].lower(), file.rpartition(".")[2])
            Image.new("RGB", (7, 5)).save(tmp_path / name / file, format=kind)
    split = data.open_source(image_folder=str(tmp_path)).split("train")
    assert sum(len(labels) for _, labels in split.batches(PREPROCESS, 3)) == len(split) == 10


def test_images_that_come_later_leave_the_held_out_ones_as_they_are(image_folder):
    def held_out():
        source = data.open_source(image_folder=str(image_folder))
        return set(data.train_and_eval_splits(source)[1].names)

    before = held_out()
    Image.new("RGB", (9, 9)).save(image_folder / "red" / "new.png")
    assert len(before & held_out()) >= len(before) - 1


def test_a_name_that_is_not_that_of_the_directory_is_refused(digits_dir):
    for directory in (digits_dir / "digits" / "1.0.0", digits_dir / "digits"):
        assert data.open_source(data_dir=str(directory)).name == "digits"
        assert data.open_source("digits", data_dir=str(directory)).name == "digits"
        with pytest.raises(ValueError, match="is that of the dataset 'digits', not of 'mnist'"):
            data.open_source("mnist", data_dir=str(directory))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no images; expected one folder per class"):
        data.open_source(image_folder=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        data.open_source(image_folder=str(tmp_path / "nowhere"))


def test_one_class_is_refused(tmp_path):
    make_image_folder(tmp_path)
    for path in (tmp_path / "blue").iterdir():
        path.unlink()
    (tmp_path / "blue").rmdir()
    with pytest.raises(ValueError, match=r"has 1 class \['red'\]; a classifier needs at least 2"):
        data.open_source(image_folder=str(tmp_path))


def test_a_label_out_of_range_is_named(tmp_path):
    builder = Unlabelled(data_dir=tmp_path)
    builder.download_and_prepare(file_format="tfrecord")
    source = data.open_source(data_dir=str(builder.data_dir))
    assert len(source.split("train")) == 4
    with pytest.raises(ValueError, match=r"2 labels .* image test/. has label -1; expected 0 to 1"):
        source.split("test")


def test_shuffling_is_repeatable_and_complete(digits_dir):
    split = data.open_source("digits", data_dir=str(digits_dir)).split("test")

    def labels(seed):
        return np.concatenate([y for _, y in split.batches(PREPROCESS, 32, shuffle_seed=seed)])

    np.testing.assert_array_equal(labels(1), labels(1))
    assert (labels(1) != labels(2)).any()
    np.testing.assert_array_equal(np.sort(labels(1)), np.sort(split.labels))


def test_random_views_differ_between_epochs_and_repeat_with_the_seed(image_folder):
    split = data.open_source(image_folder=str(image_folder)).split("train")

    def views(seed):
        batches = split.batches(PREPROCESS, 24, shuffle_seed=seed, augment=True)
        return next(iter(batches))[0].numpy()

    np.testing.assert_array_equal(views(1), views(1))
    assert (np.sort(views(1), axis=0) != np.sort(views(2), axis=0)).any()
    with pytest.raises(ValueError, match="random views need a seed"):
        split.batches(PREPROCESS, 24, augment=True)


def test_a_dataset_that_cannot_be_had_fails_fast(tmp_path, monkeypatch):
    """As on a machine without network: nothing answers."""

    answer = threading.Event()

    def hang(*_, **__):
        answer.wait()
        raise OSError

    monkeypatch.setattr("urllib.request.urlopen", hang)
    start = time.monotonic()
    with pytest.raises(ValueError, match="'beans' is not prepared in .* no network .* `tfds build"):
        data.open_source("beans", data_dir=str(tmp_path))
    assert time.monotonic() - start < 10
    answer.set()


def test_an_unknown_dataset_suggests_near_ones(tmp_path):
    with pytest.raises(ValueError, match="no dataset 'tf_flower'; did you mean tf_flowers"):
        data.open_source("tf_flower", data_dir=str(tmp_path))


def test_a_data_dir_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="data dir .* does not exist"):
        data.open_source("tf_flowers", data_dir=str(tmp_path / "nowhere"))


def test_prepared_datasets(shared_tfds):
    for name, classes, size in (("tf_flowers", 5, 3670), ("cmaterdb/telugu", 10, None)):
        source = data.open_source(name, data_dir=shared_tfds)
        train, held_out = data.train_and_eval_splits(source)
        assert len(source.class_names) == classes
        assert size is None or len(train) + len(held_out) == size
        images, labels = next(iter(held_out.batches(Preprocess("torch", 32), 8)))
        assert (images.shape, labels.shape) == ((8, 32, 32, 3), (8,))
