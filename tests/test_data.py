import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from transfer import data
from transfer.images import read_image
from transfer.preprocess import Preprocess
from transfer.sources import open_source

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
    source = open_source("digits", data_dir=str(digits_dir))
    split = source.split(expression)
    assert len(split) == len(split.names) == size
    theirs = tfds.load("digits", data_dir=str(digits_dir), split=expression)
    assert split.labels.tolist() == [int(example["label"]) for example in theirs]


@pytest.mark.parametrize("expression", ["nope", "train[", "train[:x%]"])
def test_unknown_splits_list_those_there_are(digits_dir, expression):
    source = open_source("digits", data_dir=str(digits_dir))
    with pytest.raises(ValueError, match=r"its splits are \['train', 'test'\]"):
        source.split(expression)


def test_an_empty_split_is_refused(digits_dir):
    source = open_source("digits", data_dir=str(digits_dir))
    with pytest.raises(ValueError, match=r"split 'train\[:0\]' of 'digits' has no images"):
        source.split("train[:0]")


def test_eval_images_are_never_trained_on(digits_dir):
    source = open_source("digits", data_dir=str(digits_dir))
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
    train = open_source("digits", data_dir=str(digits_dir)).split("train")
    few = data.few_shot(train, 5, seed=1)
    assert np.bincount(few.labels).tolist() == [5] * 10
    assert few.names == data.few_shot(train, 5, seed=1).names
    assert few.names != data.few_shot(train, 5, seed=2).names
    with pytest.raises(ValueError, match="class '.' has 1.. training images; 1000 per class"):
        data.few_shot(train, 1000, seed=1)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA"])
def test_all_kinds_of_png_decode(tmp_path, mode):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new(mode, (7, 5)).save(tmp_path / name / "x.png")
    split = open_source(image_folder=str(tmp_path)).split("train")
    (images, _), *_ = split.batches(PREPROCESS, 2)
    assert images.shape == (2, 8, 8, 3)


def test_unreadable_images_are_named(image_folder):
    (image_folder / "red" / "00.jpg").write_bytes(b"not a picture")
    whole = (image_folder / "red" / "02.jpg").read_bytes()
    (image_folder / "red" / "02.jpg").write_bytes(whole[: len(whole) // 3])
    split = open_source(image_folder=str(image_folder)).split("train")
    batches = split.batches(PREPROCESS, 24, shuffle_seed=1)
    with pytest.raises(data.UnreadableImageError, match="2 images cannot be decoded: ") as error:
        list(batches)
    assert error.value.reasons.keys() == {"red/00.jpg", "red/02.jpg"}
    assert "it is no image: it begins with b'not a pi'" in str(error.value)
    assert data.find_unreadable(split) == error.value.reasons


def test_only_the_batch_with_an_unreadable_image_is_read_again(image_folder, monkeypatch):
    broken = image_folder / "red" / "00.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    split = open_source(image_folder=str(image_folder)).split("train")
    read = []
    monkeypatch.setattr(data, "read_image", lambda file: read.append(file) or read_image(file))
    seen = 0
    with pytest.raises(data.UnreadableImageError, match="1 image cannot be decoded: 'red/00.jpg'"):
        for _ in split.batches(PREPROCESS, 5, shuffle_seed=3, first_batch=1):
            seen += 1
    assert len(read) == min(5, 24 - 5 * (seen + 1))
    assert broken.read_bytes() in read


def test_images_that_come_later_leave_the_held_out_ones_as_they_are(image_folder):
    def held_out():
        source = open_source(image_folder=str(image_folder))
        return set(data.train_and_eval_splits(source)[1].names)

    before = held_out()
    Image.new("RGB", (9, 9)).save(image_folder / "red" / "new.png")
    assert len(before & held_out()) >= len(before) - 1


def test_a_label_out_of_range_is_named(tmp_path):
    builder = Unlabelled(data_dir=tmp_path)
    builder.download_and_prepare(file_format="tfrecord")
    source = open_source(data_dir=str(builder.data_dir))
    assert len(source.split("train")) == 4
    with pytest.raises(ValueError, match=r"2 labels .* image test/. has label -1; expected 0 to 1"):
        source.split("test")


def test_shuffling_is_repeatable_and_complete(digits_dir):
    split = open_source("digits", data_dir=str(digits_dir)).split("test")

    def labels(seed):
        return np.concatenate([y for _, y in split.batches(PREPROCESS, 32, shuffle_seed=seed)])

    np.testing.assert_array_equal(labels(1), labels(1))
    assert (labels(1) != labels(2)).any()
    np.testing.assert_array_equal(np.sort(labels(1)), np.sort(split.labels))


def test_random_views_differ_between_epochs_and_repeat_with_the_seed(image_folder):
    split = open_source(image_folder=str(image_folder)).split("train")

    def views(seed, split=split):
        return next(iter(split.batches(PREPROCESS, 24, view_seed=seed)))[0].numpy()

    np.testing.assert_array_equal(views(1), views(1))
    assert (views(1) != views(2)).any()
    some = np.arange(24) % 3 == 0
    np.testing.assert_array_equal(views(1)[some], views(1, split.where(some)))


def test_an_id_stays_until_its_image_changes(image_folder):
    def ids():
        split = open_source(image_folder=str(image_folder)).split("train")
        return dict(zip(split.names, split.ids, strict=True))

    before = ids()
    assert len(set(before.values())) == 24
    assert {len(value) for value in before.values()} == {16}
    shutil.copy(image_folder / "red/01.png", image_folder / "red/new.png")
    shutil.copy(image_folder / "red/03.png", image_folder / "red/05.png")
    after = ids()
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"red/05.png"}
    assert after["red/new.png"] not in before.values()


def test_ids_of_a_dataset_belong_to_its_examples(digits_dir):
    source = open_source("digits", data_dir=str(digits_dir))
    train = source.split("train")
    assert len({*train.ids, *source.split("test").ids}) == 1797
    assert source.split("train[10:20]").ids == train.ids[10:20]
    assert open_source("digits", data_dir=str(digits_dir)).split("train").ids == train.ids


def test_a_split_has_no_image_twice(image_folder):
    source = open_source(image_folder=str(image_folder))
    with pytest.raises(ValueError, match="has images of 'train' twice"):
        source.split("train[:60%]+train[40%:]")
    assert len(source.split("train[:60%]+train[60%:]")) == 24
