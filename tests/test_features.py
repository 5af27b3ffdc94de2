import numpy as np
import pytest

from transfer.features import Activations, extract, stream

IMAGES = np.random.default_rng(0).random((10, 2), np.float32)
LABELS = np.arange(10)


def batches(size=4):
    return [(IMAGES[i : i + size], LABELS[i : i + size]) for i in range(0, 10, size)]


def test_extract_keeps_every_example_in_order():
    activations = extract(lambda x: x * 2, batches(), 10)
    np.testing.assert_array_equal(activations.inputs, IMAGES * 2)
    np.testing.assert_array_equal(activations.labels, LABELS)


def test_stream_gives_the_same():
    streamed = np.concatenate([x for x, _ in stream(lambda x: x * 2, batches())])
    np.testing.assert_array_equal(streamed, extract(lambda x: x * 2, batches(), 10).inputs)


def test_extract_counts():
    for wrong in (9, 11):
        with pytest.raises(ValueError, match=f"expected {wrong} examples, the dataset gave "):
            extract(lambda x: x, batches(), wrong)


def test_batches_shuffle_perfectly_and_repeatably():
    activations = Activations(IMAGES, LABELS)
    epochs = [np.concatenate([y for _, y in activations.batches(4, seed)]) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(epochs[0], epochs[1])
    assert (epochs[0] != epochs[2]).any()
    assert sorted(epochs[0]) == sorted(epochs[2]) == list(LABELS)
    assert [len(y) for _, y in activations.batches(4)] == [4, 4, 2]
    for x, y in activations.batches(4, 1):
        np.testing.assert_array_equal(x, IMAGES[y])
