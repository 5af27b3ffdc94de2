"""Splits of several sources as one source."""

import numpy as np
import pytest
from conftest import make_image_folder
from PIL import Image

from transfer import Preprocess, open_source
from transfer.data.joined import Member, join, unused_prefix

PREPROCESS = Preprocess("unit", 8)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Photos of blue and red, and of one more class, green."""
    folder = tmp_path_factory.mktemp("joined")
    (folder / "more" / "green").mkdir(parents=True)
    for number in range(5):
        Image.new("RGB", (9, 9), (0, 100 + 9 * number, 0)).save(
            folder / "more" / "green" / f"{number}.png"
        )
    first = open_source(image_folder=str(make_image_folder(folder / "photos", 6)))
    return first, open_source(image_folder=str(folder / "more"), min_classes=1)


@pytest.fixture(scope="module")
def members(sources):
    splits = [source.train_and_eval_splits() for source in sources]
    return [Member("", *splits[0]), Member("more", *splits[1])]


@pytest.fixture(scope="module")
def joined(members):
    return join(members, ["red", "blue", "green"])


def test_examples_are_those_of_the_members_in_their_order(joined, members):
    for split, parts in zip(
        joined, zip(*[(m.train, m.held_out) for m in members], strict=True), strict=True
    ):
        assert len(split) == sum(map(len, parts))
        assert split.ids.tolist() == [id_ for part in parts for id_ in part.ids]
        own = [e["image"].numpy() for part in parts for e in part.encoded()]
        examples = [*split.encoded()]
        assert [e["image"].numpy() for e in examples] == own
        assert [e["name"].numpy().decode() for e in examples] == [*split.names]
        assert [int(e["label"]) for e in examples] == split.labels.tolist()
        assert np.array_equal(
            split.fingerprints(), np.concatenate([part.fingerprints() for part in parts])
        )


def test_labels_and_names_are_those_of_the_joined_classes(joined):
    for split in joined:
        for name, label in zip(split.names, split.labels, strict=True):
            folder = name.split("/")[-2]
            assert split.source.class_names[label] == folder
            assert name.startswith("more/") == (folder == "green")


def test_shuffled_batches_read_each_position(joined):
    train, _ = joined
    labels = [batch[1] for batch in train.batches(PREPROCESS, 4, shuffle_seed=3)]
    assert np.sort(np.concatenate(labels)).tolist() == np.sort(train.labels).tolist()
    some = train.examples(np.array([len(train) - 1, 0, 5]))
    assert [e["name"].numpy().decode() for e in some] == [train.names[i] for i in (-1, 0, 5)]


def test_batches_in_order_are_those_of_each_member(joined, members):
    """Activations depend on the batch that they are computed in."""
    train, _ = joined
    found = [images.numpy() for images, _ in train.in_order(PREPROCESS, 4)]
    expected = [i.numpy() for m in members for i, _ in m.train.batches(PREPROCESS, 4)]
    assert len(found) == len(expected) == len(train.in_order(PREPROCESS, 4))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    labels = np.concatenate([labels for _, labels in train.in_order(PREPROCESS, 4)])
    assert labels.tolist() == train.labels.tolist()


@pytest.mark.slow
def test_random_views_are_those_of_each_member(joined, members):
    """They are cached for the member, and must be the same without a cache."""
    train, _ = join([Member("nested", *joined)], joined[0].source.class_names)
    found = [images.numpy() for images, _ in train.in_order(PREPROCESS, 4, view_seed=3)]
    parts = [member.train.batches(PREPROCESS, 4, view_seed=3) for member in members]
    expected = [images.numpy() for part in parts for images, _ in part]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_members_are_found_again_through_subsets_and_further_joins(joined, members, sources):
    train, held_out = joined
    again, _ = join([Member("", train, held_out)], train.source.class_names)
    keep = np.arange(len(again)) % 2 == 0
    parts = again.where(keep).of_members()
    assert [part.source for part in parts] == [*sources]
    assert [id_ for part in parts for id_ in part.ids] == again.ids[keep].tolist()
    assert (
        parts[0].names
        == [name for name, k in zip(again.names, keep, strict=False) if k][: len(parts[0])]
    )
    only = again.where(np.arange(len(again)) == len(again) - 1)
    assert [part.source for part in only.of_members()] == [sources[1]]
    assert members[0].train.of_members() == [members[0].train]


def test_groups_of_different_sources_differ(members):
    def grouped(member, group_by):
        source = open_source(
            image_folder=member.source.origin["image_folder"], min_classes=1, group_by=group_by
        )
        return Member(member.prefix, *source.train_and_eval_splits())

    first, second = (grouped(member, r"(\d)\.") for member in members)
    train, held_out = join([first, second], ["blue", "red", "green"])
    size = len(first.train)
    assert not {*train.groups[:size]} & {*train.groups[size:]}
    assert np.array_equal(np.unique(train.groups[:size]), np.unique(first.train.groups))
    partly, _ = join([first, members[1]], ["blue", "red", "green"])
    assert len({*partly.groups[size:]}) == len(members[1].train)  # a group each
    same, _ = join([first, Member("again", first.train, first.held_out)], ["blue", "red"])
    assert np.array_equal(same.groups[:size], same.groups[size:])
    assert held_out.groups is not None


def test_prefix_is_that_of_no_other_name():
    assert unused_prefix("more", ["a/1.jpg"]) == "more"
    assert unused_prefix("more", ["more/1.jpg", "more-2/1.jpg"]) == "more-3"
    assert unused_prefix("cmaterdb/telugu", []) == "cmaterdb-telugu"
