import numpy as np
import pytest

from transfer.activations import extraction
from transfer.activations.extraction import (
    EXTRACTION_BATCH,
    Activations,
    extract,
    stream,
    whole_batches,
)

IMAGES = np.random.default_rng(0).random((10, 2), np.float32)
LABELS = np.arange(10)


def batches(size=4):
    return [(IMAGES[i : i + size], LABELS[i : i + size]) for i in range(0, 10, size)]


def test_extract_keeps_every_example_in_order():
    np.testing.assert_array_equal(extract(lambda x: x * 2, batches(), 10), IMAGES * 2)
    assert extract(lambda x: x, batches(), 10, "float16").dtype == np.float16


def test_activations_too_large_for_float16_are_refused():
    with pytest.raises(
        ValueError, match=r"up to 7e\+04 do not fit in float16.*cache_dtype=float32"
    ):
        extract(lambda x: x + 70_000, batches(), 10, "float16")


def test_stream_equals_extract():
    streamed = np.concatenate([x for x, _ in stream(lambda x: x * 2, batches())])
    np.testing.assert_array_equal(streamed, extract(lambda x: x * 2, batches(), 10))


def test_extract_checks_number_of_examples():
    for wrong in (9, 11):
        with pytest.raises(ValueError, match=f"expected {wrong} examples, the dataset gave "):
            extract(lambda x: x, batches(), wrong)


def test_batches_are_a_repeatable_full_shuffle():
    activations = Activations([IMAGES], LABELS)
    epochs = [np.concatenate([y for _, y in activations.batches(4, seed)]) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(epochs[0], epochs[1])
    assert (epochs[0] != epochs[2]).any()
    assert sorted(epochs[0]) == sorted(epochs[2]) == list(LABELS)
    assert [len(y) for _, y in activations.batches(4)] == [4, 4, 2]
    for x, y in activations.batches(4, 1):
        np.testing.assert_array_equal(x, IMAGES[y])


def test_each_epoch_shows_another_view_of_every_image():
    views = [np.full((10, 1), number, np.float16) + LABELS[:, None] / 16 for number in range(3)]
    activations = Activations(views, LABELS)
    seen = []
    for epoch in range(3):
        inputs, labels = map(
            np.concatenate, zip(*activations.batches(4, 7 + epoch, epoch), strict=True)
        )
        assert inputs.dtype == np.float32
        np.testing.assert_array_equal(np.sort(labels), LABELS)
        np.testing.assert_allclose(inputs[:, 0] % 1, labels / 16)
        assert len(set(inputs[:, 0] // 1)) == 3
        seen.append((inputs[:, 0] // 1)[np.argsort(labels)])
    np.testing.assert_array_equal(np.sort(seen, axis=0), [[0] * 10, [1] * 10, [2] * 10])


def test_whole_batches_extends_mask_to_batches():
    missing = np.zeros(10, bool)
    missing[[1, 9]] = True
    expected = [True] * 4 + [False] * 4 + [True] * 2
    np.testing.assert_array_equal(whole_batches(missing, 4), expected)
    assert not whole_batches(np.zeros(10, bool), 4).any()
    assert len(whole_batches(np.zeros(0, bool))) == 0


@pytest.mark.parametrize(
    ("machine", "has_onednn", "gpus", "expected"),
    [
        ("x86_64", True, [], {}),  # as by the command line; the key is that of earlier versions
        ("x86_64", False, [], {"kernels": "eigen"}),
        ("arm64", False, [], {}),
        ("x86_64", True, ["/device:GPU:0"], {"kernels": "gpu"}),
    ],
)
def test_kernels_are_named_unless_they_are_usual(monkeypatch, machine, has_onednn, gpus, expected):
    monkeypatch.setattr(extraction.platform, "machine", lambda: machine)
    monkeypatch.setattr(extraction, "is_onednn_on", lambda: has_onednn)
    monkeypatch.setattr(extraction.tf.config, "list_logical_devices", lambda kind: gpus)
    assert extraction.kernels() == expected


def test_filled_batches_are_computed_in_one_size():
    images = np.arange(3.0, dtype=np.float32).reshape(3, 1, 1, 1)
    sizes = []

    def prefix(batch):
        sizes.append(len(batch))
        return batch[:, 0, 0]

    batches = [(images[:2], np.zeros(2)), (images[2:], np.zeros(1))]
    for fill, expected in ((False, [2, 1]), (True, [EXTRACTION_BATCH] * 2)):
        sizes.clear()
        assert extract(prefix, batches, 3, fill=fill).ravel().tolist() == [0, 1, 2]
        assert sizes == expected
