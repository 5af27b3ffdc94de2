import numpy as np
import pytest
import tensorflow as tf

from transfer.training.mixing import cutmix

BATCH = np.random.default_rng(0).random([5, 9, 12, 2]).astype(np.float32)


def seed(number):
    return tf.constant([0, number], tf.int64)


@pytest.mark.parametrize("number", range(20))
def test_cutmix_replaces_a_box_and_mixes_targets_by_its_area(number):
    mixing = cutmix(1.0, seed(number), tf.constant(BATCH))
    mixed = mixing.inputs(tf.constant(BATCH)).numpy()
    is_other = (mixed != BATCH).any((0, 3))
    rows, columns = (np.flatnonzero(is_other.any(axis)) for axis in (1, 0))
    np.testing.assert_array_equal(is_other.sum(), len(rows) * len(columns))  # one box
    if len(rows):
        assert (np.ptp(rows), np.ptp(columns)) == (len(rows) - 1, len(columns) - 1)
    np.testing.assert_array_equal(mixed[:, is_other], BATCH[::-1][:, is_other])
    targets = np.eye(5, dtype=np.float32)
    share = 1 - is_other.mean()
    expected = share * targets + (1 - share) * targets[::-1]
    np.testing.assert_allclose(mixing.targets(tf.constant(targets)), expected, atol=1e-6)


def test_cutmix_depends_on_its_seed_alone():
    def mixed(number):
        return cutmix(1.0, seed(number), tf.constant(BATCH)).inputs(tf.constant(BATCH)).numpy()

    np.testing.assert_array_equal(mixed(0), mixed(0))
    assert any((mixed(number) != mixed(0)).any() for number in range(1, 4))
