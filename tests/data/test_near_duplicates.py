import numpy as np
import pytest

from transfer.data import near_duplicates as module
from transfer.data.fingerprints import FINGERPRINT
from transfer.data.near_duplicates import near_duplicates

NUM_IMAGES, NUM_COPIES = 600, 40


def prints_of(thumbnails):
    prints = np.zeros(len(thumbnails), FINGERPRINT)
    prints["readable"] = True
    prints["thumbnail"] = thumbnails
    generator = np.random.default_rng(1)
    prints["sha256"] = np.frombuffer(generator.bytes(32 * len(prints)), "V32")
    return prints


def random_thumbnails(block, num_images=NUM_IMAGES):
    """Gray levels of squares of ``block`` pixels; 1 is noise."""
    shape = (num_images, 32 // block, 32 // block)
    levels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    return levels.repeat(block, 1).repeat(block, 2)


def with_noise(thumbnails, seed):
    noise = np.random.default_rng(seed).normal(0, 2, thumbnails.shape)
    return np.clip(thumbnails + noise, 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("block", [1, 4, 8])
def test_same_groups_as_by_comparing_all_pairs(block):
    thumbnails = random_thumbnails(block)
    thumbnails = np.concatenate([thumbnails, with_noise(thumbnails[:NUM_COPIES], 2)])
    expected = []
    for first in range(len(thumbnails) - 1):
        others = thumbnails[first + 1 :]
        is_same = module._are_same(thumbnails[[first]], others)
        expected += [[first, first + 1 + int(other)] for other in np.flatnonzero(is_same)]
    assert near_duplicates(prints_of(thumbnails)) == expected
    assert len(expected) == NUM_COPIES


def test_many_similar_images_are_one_group():
    frames = with_noise(random_thumbnails(8, 1).repeat(3000, 0), 3)
    assert near_duplicates(prints_of(frames)) == [[*range(3000)]]


def test_few_or_no_images_have_no_duplicates():
    prints = prints_of(random_thumbnails(4, 3))
    assert (
        near_duplicates(prints[:0]) == near_duplicates(prints[:1]) == near_duplicates(prints) == []
    )
