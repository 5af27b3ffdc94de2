import numpy as np
import tensorflow as tf

from transfer.augment import random_view

IMAGE = np.arange(20 * 30 * 3, dtype=np.float32).reshape(20, 30, 3)


def test_the_same_seed_gives_the_same_view_and_another_another():
    views = [random_view(IMAGE, tf.constant(seed)).numpy() for seed in ([1, 2], [1, 2], [1, 3])]
    np.testing.assert_array_equal(views[0], views[1])
    assert views[0].shape != views[2].shape or (views[0] != views[2]).any()


def test_views_are_parts_of_the_image_and_half_are_flipped():
    flipped = 0
    for seed in range(60):
        view = random_view(IMAGE, tf.constant([0, seed])).numpy()
        assert view.shape[0] * view.shape[1] >= 0.45 * 20 * 30
        assert set(view.ravel()) <= set(IMAGE.ravel())
        flipped += view[0, 0, 0] > view[0, -1, 0]
    assert 15 <= flipped <= 45
