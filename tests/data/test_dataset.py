import hashlib
import itertools
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from transfer.activations.extraction import Activations
from transfer.data import dataset, tfds_dataset
from transfer.data.batches import shuffled
from transfer.data.holdout import stratified_holdout
from transfer.data.sources import open_source
from transfer.data.unreadable import UnreadableImageError, find_unreadable
from transfer.images.decoding import read_image
from transfer.images.preprocess import Preprocess

PREPROCESS = Preprocess("none", 8)


class Unlabelled(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Like the test splits of many public datasets, whose labels are secret and given as -1."""

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
def test_split_expressions_equal_tfds(digits_dir, expression, size):
    source = open_source("digits", data_dir=str(digits_dir))
    split = source.split(expression)
    assert len(split) == len(split.names) == size
    theirs = tfds.load("digits", data_dir=str(digits_dir), split=expression)
    assert split.labels.tolist() == [int(example["label"]) for example in theirs]


@pytest.mark.parametrize("expression", ["nope", "train[", "train[:x%]"])
def test_unknown_split_lists_available_splits(digits_dir, expression):
    source = open_source("digits", data_dir=str(digits_dir))
    with pytest.raises(ValueError, match=r"its splits are \['train', 'test'\]"):
        source.split(expression)


def test_empty_split_is_refused(digits_dir):
    source = open_source("digits", data_dir=str(digits_dir))
    with pytest.raises(ValueError, match=r"split 'train\[:0\]' of 'digits' has no images"):
        source.split("train[:0]")


def test_train_and_eval_splits_are_disjoint(digits_dir):
    source = open_source("digits", data_dir=str(digits_dir))
    train, held_out = dataset.train_and_eval_splits(source, eval_split="train[:100]")
    assert (len(train), len(held_out)) == (1338, 100)
    assert not set(train.names) & set(held_out.names)
    with pytest.raises(ValueError, match="share 50 images"):
        dataset.train_and_eval_splits(source, "train[:100]", "train[50:150]")


def test_holdout_is_stratified():
    labels = np.repeat([0, 1, 2, 3], [100, 10, 2, 1])
    names = [f"{index}.jpg" for index in range(len(labels))]
    held_out = stratified_holdout(labels, names, 0.2)
    assert np.bincount(labels[held_out], minlength=4).tolist() == [20, 2, 1, 0]
    backwards = stratified_holdout(labels[::-1], names[::-1], 0.2)
    np.testing.assert_array_equal(held_out, backwards[::-1])


def holdout_of_single_images(labels, names, share):
    """Reference: hold out each class separately, in the order of the hashes of the names."""
    digests = np.array([hashlib.sha256(name.encode()).hexdigest() for name in names])
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(digests[members])]
        held_out[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return held_out


def test_holdout_without_groups_equals_groups_of_one():
    generator = np.random.default_rng(0)
    for count in range(1, 100):
        labels = generator.integers(0, generator.integers(1, 9), count)
        names = [f"{count}/{index}.jpg" for index in range(count)]
        expected = holdout_of_single_images(labels, names, 0.2)
        np.testing.assert_array_equal(stratified_holdout(labels, names, 0.2), expected)
        groups = [[index] for index in range(count)]
        found = stratified_holdout(labels, names, 0.2, groups)
        np.testing.assert_array_equal(found, expected)


def test_holdout_keeps_groups_together():
    generator = np.random.default_rng(1)
    for count in range(10, 200):
        labels = generator.integers(0, 4, count)
        names = [f"{count}/{index}.jpg" for index in range(count)]
        ends = np.cumsum(generator.integers(1, 5, count))
        groups = np.split(generator.permutation(count), ends[ends < count])
        groups = [group for group in groups if len(group) and generator.random() < 0.5]
        held_out = stratified_holdout(labels, names, 0.2, groups)
        assert all(len({*held_out[group]}) == 1 for group in groups)
        for label in np.unique(labels):
            share = held_out[labels == label].mean()
            assert share < 1
            if count > 100:
                assert 0.1 < share < 0.3
        order = generator.permutation(count)
        places = np.argsort(order)
        moved = [places[group] for group in groups]
        again = stratified_holdout(labels[order], [names[i] for i in order], 0.2, moved)
        np.testing.assert_array_equal(again, held_out[order])


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([60], 20),  # of 100: all from the other 40
        ([99], 1),
        ([45, 55], 45),  # the smallest, where there are only groups
        ([34, 33, 33], 33),
        ([100], 0),  # one picture: it is trained on
    ],
)
def test_holdout_takes_smallest_group_if_groups_dominate_class(sizes, expected):
    labels = np.repeat([0, 1], 100)
    names = [f"{index}.jpg" for index in range(200)]
    ends = np.cumsum(sizes)
    groups = np.split(np.arange(ends[-1]), ends[:-1])
    held_out = stratified_holdout(labels, names, 0.2, groups)
    assert held_out[:100].sum() == expected
    assert held_out[100:].sum() == 20
    assert all(len({*held_out[group]}) == 1 for group in groups)


def test_few_shot_takes_given_number_per_class(digits_dir):
    train = open_source("digits", data_dir=str(digits_dir)).split("train")
    few = dataset.few_shot(train, 5, seed=1)
    assert np.bincount(few.labels).tolist() == [5] * 10
    assert few.names == dataset.few_shot(train, 5, seed=1).names
    assert few.names != dataset.few_shot(train, 5, seed=2).names
    with pytest.raises(ValueError, match="class '.' has 1.. training images; 1000 per class"):
        dataset.few_shot(train, 1000, seed=1)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA"])
def test_all_png_types_decode(tmp_path, mode):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new(mode, (7, 5)).save(tmp_path / name / "x.png")
    split = open_source(image_folder=str(tmp_path)).split("train")
    (images, _), *_ = split.batches(PREPROCESS, 2)
    assert images.shape == (2, 8, 8, 3)


def test_unreadable_images_are_named(own_image_folder):
    (own_image_folder / "red" / "00.jpg").write_bytes(b"not a picture")
    whole = (own_image_folder / "red" / "02.jpg").read_bytes()
    (own_image_folder / "red" / "02.jpg").write_bytes(whole[: len(whole) // 3])
    split = open_source(image_folder=str(own_image_folder)).split("train")
    batches = split.batches(PREPROCESS, 24, shuffle_seed=1)
    with pytest.raises(UnreadableImageError, match="2 images cannot be decoded: ") as error:
        list(batches)
    assert error.value.reasons.keys() == {"red/00.jpg", "red/02.jpg"}
    assert "it is not an image: it begins with b'not a pi'" in str(error.value)
    assert find_unreadable(split) == error.value.reasons
    with pytest.raises(ValueError, match="skip_unreadable must be at least 0, got -1"):
        split.readable(-1)


def test_only_batch_with_unreadable_image_is_reread(own_image_folder, monkeypatch):
    broken = own_image_folder / "red" / "00.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    split = open_source(image_folder=str(own_image_folder)).split("train")
    read = []
    monkeypatch.setattr(
        "transfer.data.unreadable.read_image", lambda file: read.append(file) or read_image(file)
    )
    seen = 0
    with pytest.raises(UnreadableImageError, match="1 image cannot be decoded: 'red/00.jpg'"):
        for _ in split.batches(PREPROCESS, 5, shuffle_seed=3):
            seen += 1
    assert len(read) == min(5, 24 - 5 * seen)
    assert broken.read_bytes() in read


def test_new_images_do_not_change_held_out_images(own_image_folder):
    def held_out():
        source = open_source(image_folder=str(own_image_folder))
        return set(dataset.train_and_eval_splits(source)[1].names)

    before = held_out()
    Image.new("RGB", (9, 9)).save(own_image_folder / "red" / "new.png")
    assert len(before & held_out()) >= len(before) - 1


def test_label_out_of_range_is_named(tmp_path):
    builder = Unlabelled(data_dir=tmp_path)
    builder.download_and_prepare(file_format="tfrecord")
    source = open_source(data_dir=str(builder.data_dir))
    assert len(source.split("train")) == 4
    with pytest.raises(ValueError, match=r"2 labels .* image test/. has label -1; expected 0 to 1"):
        source.split("test")


@pytest.mark.slow
def test_shuffle_is_a_repeatable_permutation(digits_dir):
    split = open_source("digits", data_dir=str(digits_dir)).split("test")

    def labels(seed):
        return np.concatenate([y for _, y in split.batches(PREPROCESS, 32, shuffle_seed=seed)])

    np.testing.assert_array_equal(labels(1), labels(1))
    assert (labels(1) != labels(2)).any()
    np.testing.assert_array_equal(np.sort(labels(1)), np.sort(split.labels))


@pytest.mark.slow
def test_random_views_differ_between_epochs_and_repeat_with_the_seed(image_folder):
    split = open_source(image_folder=str(image_folder)).split("train")

    def views(seed, split=split):
        return next(iter(split.batches(PREPROCESS, 24, view_seed=seed)))[0].numpy()

    np.testing.assert_array_equal(views(1), views(1))
    assert (views(1) != views(2)).any()
    some = np.arange(24) % 3 == 0
    np.testing.assert_array_equal(views(1)[some], views(1, split.where(some)))


def test_id_changes_only_with_image(own_image_folder):
    def ids():
        split = open_source(image_folder=str(own_image_folder)).split("train")
        return dict(zip(split.names, split.ids, strict=True))

    before = ids()
    assert len(set(before.values())) == 24
    shutil.copy(own_image_folder / "red/01.png", own_image_folder / "red/new.png")
    shutil.copy(own_image_folder / "red/03.png", own_image_folder / "red/05.png")
    after = ids()
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"red/05.png"}
    assert after["red/new.png"] not in before.values()


def test_ids_follow_examples_of_a_dataset(digits_dir):
    source = open_source("digits", data_dir=str(digits_dir))
    train = source.split("train")
    assert len({*train.ids.tolist(), *source.split("test").ids.tolist()}) == 1797
    np.testing.assert_array_equal(source.split("train[10:20]").ids, train.ids[10:20])
    again = open_source("digits", data_dir=str(digits_dir)).split("train")
    np.testing.assert_array_equal(again.ids, train.ids)


def test_split_with_overlapping_parts_is_refused(image_folder):
    source = open_source(image_folder=str(image_folder))
    with pytest.raises(ValueError, match="has images of 'train' twice"):
        source.split("train[:60%]+train[40%:]")
    with pytest.raises(ValueError, match="has images of 'train' twice"):
        source.split("train[:60%]+train")
    assert len(source.split("train[:60%]+train[60%:]")) == 24


def test_shards_are_refused(image_folder):
    source = open_source(image_folder=str(image_folder))
    with pytest.raises(ValueError, match="shards are not known"):
        source.split("train[:1shard]")


def test_files_of_the_same_name_are_in_the_order_of_their_paths(own_image_folder, monkeypatch):
    for clip in ("b", "a", "c"):
        (own_image_folder / "red" / clip).mkdir()
        (own_image_folder / "red" / clip / "1.png").write_bytes(b"")
    walk = os.walk

    def backwards(top, **options):
        for folder, names, files in walk(top, **options):
            names.sort(reverse=True)
            yield folder, names, files

    monkeypatch.setattr(os, "walk", backwards)
    names = [*open_source(image_folder=str(own_image_folder)).split("train").names]
    assert [n for n in names if n.endswith("/1.png")] == [f"red/{clip}/1.png" for clip in "abc"]


def test_newest_version_of_a_prepared_dataset_is_chosen(tmp_path):
    for version in ("1.9.0", "1.10.0", "notes"):
        (tmp_path / "photos" / version).mkdir(parents=True)
        (tmp_path / "photos" / version / "features.json").write_text("{}")
    assert tfds_dataset.prepared_directory(tmp_path / "photos").name == "1.10.0"
    assert tfds_dataset.only_dataset_in(tmp_path) == "photos"


def test_each_image_may_have_the_seed_of_its_own_view(image_folder):
    train = open_source(image_folder=str(image_folder)).split("train")
    preprocess = Preprocess("unit", 16)

    def pixels(view_seed, **options):
        return np.concatenate(
            [x for x, _ in train.batches(preprocess, 5, view_seed=view_seed, **options)]
        )

    by_seed = [pixels(seed) for seed in (3, 4)]
    seeds = np.arange(len(train)) % 2 + 3
    expected = np.where((seeds == 3)[:, None, None, None], *by_seed)
    np.testing.assert_array_equal(pixels(seeds), expected)
    order = shuffled(len(train), 7)
    np.testing.assert_array_equal(pixels(seeds, shuffle_seed=7), expected[order])


def add_copies(root, number):
    """Add re-encoded and resized copies of ``number`` images per class, in the same or another
    class; returns pairs of names."""
    pairs = []
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    for place, folder in enumerate(folders):
        for path in sorted(folder.iterdir())[:number]:
            image = Image.open(path).convert("RGB")
            image = image.resize([round(0.8 * side) for side in image.size])
            other = folders[(place + len(pairs) % 2) % len(folders)]
            copy = other / f"copy of {path.stem} of {folder.name}.jpg"
            image.save(copy, quality=60)
            pairs.append([str(file.relative_to(root)) for file in (path, copy)])
    return pairs


def automatic_sides(root):
    train, held_out = dataset.train_and_eval_splits(open_source(image_folder=str(root)))
    assert not {*train.names} & {*held_out.names}
    return {*train.names}, {*held_out.names}


@pytest.mark.slow
def test_copies_stay_on_the_side_of_their_originals(smooth_folder):
    before = automatic_sides(smooth_folder)
    source = open_source(image_folder=str(smooth_folder))
    split = source.split("train")
    expected = stratified_holdout(split.labels, split.names, 0.2)
    assert before[1] == {name for name, out in zip(split.names, expected, strict=True) if out}
    pairs = add_copies(smooth_folder, 10)
    train, held_out = automatic_sides(smooth_folder)
    assert len(train) + len(held_out) == 80
    assert 14 <= len(held_out) <= 18
    for original, copy in pairs:
        assert (original in held_out) == (copy in held_out), (original, copy)
    # Without grouping, the copies would be on both sides.
    split = open_source(image_folder=str(smooth_folder)).split("train")
    alone = stratified_holdout(split.labels, split.names, 0.2)
    alone = {name for name, out in zip(split.names, alone, strict=True) if out}
    assert any((original in alone) != (copy in alone) for original, copy in pairs)
    # New images do not change it.
    Image.effect_mandelbrot((50, 50), (-2, -1, 1, 1), 50).save(smooth_folder / "a" / "new.png")
    assert len(held_out & automatic_sides(smooth_folder)[1]) >= len(held_out) - 1


def test_near_duplicate_search_is_skipped_for_many_images(smooth_folder):
    add_copies(smooth_folder, 10)
    split = open_source(image_folder=str(smooth_folder)).split("train")
    expected = stratified_holdout(split.labels, split.names, 0.2)
    for limit, is_same in ((79, True), (80, False)):
        source = open_source(image_folder=str(smooth_folder))
        _, held_out = dataset.train_and_eval_splits(source, max_compared=limit)
        assert np.array_equal(np.isin(split.names, held_out.names), expected) == is_same


def test_holdout_of_classes_of_near_duplicates_is_not_empty(tmp_path):
    for name, color in (("a", "red"), ("b", "blue")):
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.new("RGB", (9, 9), color).save(tmp_path / name / f"{number}.png")
    train, held_out = automatic_sides(tmp_path)
    assert (len(train), len(held_out)) == (16, 4)


@pytest.mark.slow
def test_copies_of_photos_stay_on_the_side_of_their_originals(shared_tfds, tmp_path):
    flowers = open_source("tf_flowers", data_dir=shared_tfds).split("train[:300]")
    for example in flowers.encoded():
        folder = tmp_path / flowers.source.class_names[int(example["label"])]
        folder.mkdir(exist_ok=True)
        name = example["name"].numpy().decode().replace("/", "-")
        (folder / f"{name}.jpg").write_bytes(example["image"].numpy())
    pairs = add_copies(tmp_path, 12)
    assert len(pairs) == 60
    _, held_out = automatic_sides(tmp_path)
    assert not [pair for pair in pairs if (pair[0] in held_out) != (pair[1] in held_out)]
    assert 55 <= len(held_out) <= 80


class Numbered:
    """A source whose images are their positions, sorted by class; ``reads`` records the positions
    that were read, if it is watched."""

    def __init__(self, watched=False, **sizes):
        self.watched, self.reads = watched, []
        self.labels_of = {part: np.arange(size) // 100 for part, size in sizes.items()}
        classes = [str(number) for number in range(max(sizes.values()) // 100 + 2)]
        self.source = dataset.Source(
            "numbered", classes, sizes, self.examples, self.labels, self.names, self.names
        )

    def labels(self, part):
        return self.labels_of[part]

    def names(self, part):
        return [f"{part}/{number}" for number in range(len(self.labels_of[part]))]

    def examples(self, part, positions):
        def watch():
            for position in positions.tolist():
                self.reads.append(position)
                yield position

        dataset = tf.data.Dataset.from_tensor_slices(positions)
        if self.watched:
            dataset = dataset.from_generator(watch, output_signature=dataset.element_spec)
        return dataset.map(
            lambda position: {
                "image": position,
                "label": position // 100,
                "name": tf.strings.join([f"{part}/", tf.strings.as_string(position)]),
            }
        )


def as_it_is(image):
    return image


@pytest.fixture
def undecoded(monkeypatch):
    """Batches of a ``Numbered`` source: ``(positions, labels)``."""
    monkeypatch.setattr("transfer.data.batches.decode", as_it_is)

    def batches(split, batch_size=100, **options):
        shown = split.batches(as_it_is, batch_size, **options)
        return [(images.numpy(), labels.numpy()) for images, labels in shown]

    return batches


@pytest.mark.parametrize("size", [2, 100, 16_384, pytest.param(40_000, marks=pytest.mark.slow)])
def test_shuffled_is_a_permutation_for_any_size(undecoded, size):
    split = Numbered(train=size).source.split("train")
    batches = undecoded(split, shuffle_seed=7)
    order = np.concatenate([images for images, _ in batches])
    np.testing.assert_array_equal(order, shuffled(size, 7))
    np.testing.assert_array_equal(np.sort(order), np.arange(size))
    np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), split.labels[order])
    rows = Activations([np.arange(size, dtype=np.float32)[:, None]], split.labels).batches(100, 7)
    np.testing.assert_array_equal(order, np.concatenate([x for x, _ in rows])[:, 0])
    if size <= 16_384:  # the order that earlier versions had
        before = tf.data.Dataset.range(size).shuffle(16_384, seed=7).batch(size)
        np.testing.assert_array_equal(order, before.get_single_element())
    else:  # classes are mixed from the first batch to the last, as random draws mix them
        num_classes = [len(np.unique(labels)) for _, labels in batches]
        assert min(num_classes) > 70  # of 400 classes in 100 draws, 88.5 on average
        means = np.array([images.mean() for images, _ in batches]) / size
        np.testing.assert_allclose(means, 0.5, atol=0.15)


def test_shuffle_order_of_a_seed_is_fixed():
    tf.random.set_seed(87654321)  # what TensorFlow takes where none is set; another test may have
    assert shuffled(12, 0).tolist() == [0, 2, 10, 5, 9, 8, 4, 7, 1, 6, 3, 11]
    large = [6, 4, 7, 9, 8, 11, 5, 3, 1, 2, 10, 0]
    assert shuffled(12, 2**31 + 5).tolist() == large


def test_parts_of_a_split_are_shuffled_together(undecoded):
    split = Numbered(train=300, test=120).source.split("test[20:]+train[:50%]+train[250:]")
    in_order = np.concatenate([np.arange(20, 120), np.arange(150), np.arange(250, 300)])
    shown = [images for images, _ in undecoded(split, 7, shuffle_seed=3)]
    np.testing.assert_array_equal(np.concatenate(shown), in_order[shuffled(300, 3)])
    np.testing.assert_array_equal(np.concatenate([x for x, _ in undecoded(split)]), in_order)
    some = split.where(np.arange(300) % 4 == 0)
    found = [example["name"].numpy().decode() for example in some.encoded()]
    assert found == some.names == split.names[::4]


@pytest.mark.slow_variants
@pytest.mark.parametrize("shard", [(0, 1), (0, 3), (2, 3)])
@pytest.mark.parametrize("expression", ["train", "train[:40]+test+train[60:]"])
def test_resumed_epoch_reads_remaining_batches_only(undecoded, expression, shard):
    numbered = Numbered(watched=True, train=100, test=30)
    split = numbered.source.split(expression)
    options = {"shuffle_seed": 1, "batch_size": 8, "shard": shard}
    whole = undecoded(split, **options)
    numbered.reads.clear()
    rest = undecoded(split, first_batch=9, **options)
    assert sorted(numbered.reads) == sorted(np.concatenate([images for images, _ in rest]))
    assert len(rest) == len(whole) - 9
    for found, expected in zip(rest, whole[9:], strict=True):
        np.testing.assert_array_equal(found, expected)
    assert undecoded(split, first_batch=99, **options) == []


def test_prefetch_reads_few_images(undecoded):
    numbered = Numbered(watched=True, train=40_000)
    batches = numbered.source.split("train").batches(as_it_is, 10, shuffle_seed=0)
    assert len(list(itertools.islice(batches, 20))) == 20
    assert len(numbered.reads) < 4_000


@pytest.mark.slow
def test_resumed_epoch_needs_no_files_of_earlier_batches(own_image_folder):
    split = open_source(image_folder=str(own_image_folder)).split("train")
    options = {"shuffle_seed": 2, "view_seed": 2}
    whole = list(split.batches(PREPROCESS, 5, **options))
    for position in shuffled(24, 2)[:15]:
        (own_image_folder / split.names[position]).unlink()
    rest = list(split.batches(PREPROCESS, 5, first_batch=3, **options))
    for found, expected in zip(rest, whole[3:], strict=True):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


def test_file_names_may_be_any_bytes(tmp_path):
    names = [b"a\xff.png", "ü\n.png".encode(), "\u2028.png".encode(), b"d.png"]
    names = [os.path.join(folder, name) for folder in (b"x", b"y") for name in names]
    for name in names:
        (tmp_path / os.fsdecode(name)).parent.mkdir(exist_ok=True)
        Image.new("L", (2, 2)).save(tmp_path / os.fsdecode(name))
    train, held_out = dataset.train_and_eval_splits(open_source(image_folder=str(tmp_path)))
    assert sum(len(y) for _, y in train.batches(PREPROCESS, 4, shuffle_seed=0)) == 6
    assert {os.fsencode(name) for name in [*train.names, *held_out.names]} == set(names)


def test_preprocessing_is_traced_once_for_all_pipelines(monkeypatch):
    traced = []
    resize = Preprocess.resize

    def counted(self, images):
        traced.append(images.shape)
        return resize(self, images)

    monkeypatch.setattr(Preprocess, "resize", counted)
    split = open_source("digits").split("test[:3]")
    for _ in range(2):  # of a size that no other test uses
        next(iter(split.batches(Preprocess("none", 7), 2)))
        next(iter(split.batches(Preprocess("none", 7), 2, view_seed=1)))
    assert traced == [(None, None, 3)] * 2  # once without views, and once with them


def test_preprocessing_of_a_subclass_is_used():
    class Dark(Preprocess):
        def call(self, images):
            return super().call(images) / 2

    split = open_source("digits").split("test[:3]")
    images, _ = next(iter(split.batches(Preprocess("none", 7), 3)))
    dark, _ = next(iter(split.batches(Dark("none", 7), 3)))
    np.testing.assert_array_equal(dark, images / 2)
