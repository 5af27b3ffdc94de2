import numpy as np
import tensorflow as tf

from transfer.images.augment import random_view, random_views

IMAGE = np.arange(16 * 24 * 3, dtype=np.float32).reshape(16, 24, 3)


def test_view_is_determined_by_seed():
    views = [random_view(IMAGE, tf.constant(seed)).numpy() for seed in ([1, 2], [1, 2], [1, 3])]
    np.testing.assert_array_equal(views[0], views[1])
    assert (views[0] != views[2]).any()


def test_views_shift_by_at_most_an_eighth_and_half_are_flipped():
    padded = np.pad(IMAGE, [(2, 2), (2, 2), (0, 0)], "symmetric")
    windows = [padded[y : y + 16, x : x + 24] for y in range(5) for x in range(5)]
    flips, shifts = 0, set()
    for seed in range(60):
        view = random_view(IMAGE, tf.constant([0, seed])).numpy()
        plain = [i for i, w in enumerate(windows) if np.array_equal(view, w)]
        flipped = [i for i, w in enumerate(windows) if np.array_equal(view[:, ::-1], w)]
        assert len(plain) + len(flipped) == 1
        flips += len(flipped)
        shifts.update(plain + flipped)
    assert 15 <= flips <= 45
    assert len(shifts) > 15


def test_images_of_a_batch_have_independent_views():
    views = random_views(np.stack([IMAGE] * 20), tf.constant([0, 1])).numpy()
    assert len(np.unique(views, axis=0)) > 10
    np.testing.assert_array_equal(views[0], random_view(IMAGE, tf.constant([0, 1])))
