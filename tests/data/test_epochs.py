import threading

import pytest

from transfer.data.epochs import Epochs


def numbered(epoch, first_batch):
    return ((epoch, batch) for batch in range(first_batch, 3))


def test_batches_equal_those_of_single_epochs():
    epochs = Epochs(numbered, 3, 4)
    assert [*epochs(1, 2)] == [(1, 2)]
    for epoch in (2, 3):
        assert [*epochs(epoch)] == [(epoch, batch) for batch in range(3)]
    assert [*epochs(0, 1)] == [(0, 1), (0, 2)]


def test_next_epoch_is_started_with_the_last_batch():
    started, is_begun = [], threading.Event()

    def batches(epoch, first_batch):
        started.append(epoch)
        for batch in range(first_batch, 3):
            if epoch == 1:
                is_begun.set()
            yield batch

    epochs = Epochs(batches, 3, 2)
    for batch in epochs(0):
        assert (started == [0]) or batch == 2
    assert is_begun.wait(10)
    assert [*epochs(1)] == [0, 1, 2]
    assert started == [0, 1]  # neither a second time, nor beyond the last epoch


def test_an_error_of_the_next_epoch_is_raised_in_it():
    def batches(epoch, first_batch):
        if epoch:
            raise ValueError("epoch 1 cannot be read")
        return numbered(epoch, first_batch)

    epochs = Epochs(batches, 3, 3)
    assert len([*epochs(0)]) == 3
    with pytest.raises(ValueError, match="epoch 1 cannot be read"):
        next(epochs(1))
