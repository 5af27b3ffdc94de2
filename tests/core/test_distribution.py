import gc
import json
import weakref
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from replicas import Process

from transfer import Preprocess
from transfer.activations.extraction import Activations
from transfer.core.distribution import (
    NO_LABEL,
    LostWorkerError,
    Replicas,
    num_workers,
    open_replicas,
    shard_indices,
    shards_of_batches,
    sum_over_replicas,
    take_shard,
)
from transfer.data.sources import open_source
from transfer.training.trainer import ParameterGroup, Trainer


@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 32])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_each_row_is_in_one_shard_with_its_mirror_row(num_rows, count):
    shards = [shard_indices(num_rows, number, count) for number in range(count)]
    np.testing.assert_array_equal(np.sort(np.concatenate(shards)), np.arange(num_rows))
    for rows in shards:
        np.testing.assert_array_equal(rows[::-1], num_rows - 1 - rows)
    assert max(map(len, shards)) - min(map(len, shards)) <= 3  # a pair, and the middle row


def test_empty_shard_gets_padding_row_without_label():
    inputs, labels = take_shard(np.arange(6.0).reshape(2, 3), np.array([4, 5]), 1, 2)
    np.testing.assert_array_equal(inputs, [[0, 1, 2]])
    np.testing.assert_array_equal(labels, [NO_LABEL])


def test_shard_of_smaller_batch_is_not_larger():
    for batch_size in range(1, 34):
        for count in (2, 3, 4, 8):
            for number in range(count):
                sizes = [
                    len(shard_indices(n, number, count, batch_size))
                    for n in range(1, batch_size + 1)
                ]
                assert sizes == sorted(sizes)
            for num_rows in range(1, batch_size):
                parts = [
                    shard_indices(num_rows, number, count, batch_size) for number in range(count)
                ]
                assert sorted(np.concatenate(parts)) == list(range(num_rows))


def test_shards_of_batches_contain_every_example_once():
    read, padding = zip(*(shards_of_batches(20, 6, number, 3) for number in range(3)), strict=True)
    counted = np.array(read, int) - np.array(padding, int)
    np.testing.assert_array_equal(counted.sum(0), 1)
    for number in range(3):  # rows of each batch
        assert all(read[number][start : start + 6].any() for start in range(0, 20, 6))


@pytest.mark.slow_variants
@pytest.mark.parametrize("first_batch", [0, 2])
@pytest.mark.parametrize("batch_size", [5, 6, 7])
def test_batches_of_images_are_sharded(image_folder, first_batch, batch_size):
    split = open_source("", image_folder=str(image_folder)).split("train")  # 24 images
    options = {"shuffle_seed": 1, "view_seed": 1, "first_batch": first_batch}

    def batches(**more):
        return list(split.batches(Preprocess("unit", 16), batch_size, **options, **more))

    whole = batches()
    parts = [batches(shard=(number, 2)) for number in range(2)]
    for (images, labels), *shards in zip(whole, *parts, strict=True):
        for number, (shard_images, shard_labels) in enumerate(shards):
            chosen = shard_indices(len(labels), number, 2, batch_size)
            if len(chosen):
                np.testing.assert_array_equal(shard_labels, labels.numpy()[chosen])
                np.testing.assert_array_equal(shard_images, images.numpy()[chosen])
            else:
                np.testing.assert_array_equal(shard_labels, [NO_LABEL])


def test_activations_are_sharded_by_worker_that_has_them():
    rows, labels = np.arange(10.0, dtype=np.float32)[:, None], np.arange(10)
    here = np.arange(10) < 7
    mine = Activations([rows[here]], labels, here)
    others = Activations([rows[~here]], labels, ~here)
    whole = Activations([rows], labels).batches(4, shuffle_seed=3)
    for (_, all_labels), first, second in zip(
        whole, mine.batches(4, 3), others.batches(4, 3), strict=True
    ):
        found = [(x, y) for part in (first, second) for x, y in zip(*part, strict=True)]
        found = [(float(x[0]), int(y)) for x, y in found if y != NO_LABEL]
        assert all(x == y for x, y in found)
        assert sorted(y for _, y in found) == sorted(all_labels)
    nobody = Activations([rows[:0]], labels, here & False)
    inputs, none = next(nobody.batches(4))
    assert inputs.shape == (1, 1)
    assert none.tolist() == [NO_LABEL]


def test_examples_are_assigned_in_whole_batches():
    assigned = [Replicas(worker=n, num_workers=2).examples_of_worker(10, 4) for n in range(2)]
    np.testing.assert_array_equal(assigned[0], [True] * 4 + [False] * 4 + [True] * 2)
    np.testing.assert_array_equal(assigned[0], ~assigned[1])


def test_single_replica_does_not_communicate():
    alone = Replicas()
    rows = np.arange(3)
    assert alone.is_chief
    assert alone.join(rows, np.ones(3, bool)) is rows
    assert alone.from_chief("runs/ä") == "runs/ä"
    assert alone.total(5) == 5
    alone.check_same("model", "one")


class TwoProcesses(Replicas):
    """Simulates the values sent by another process."""

    others: list[np.ndarray]

    def gather(self, rows):
        return np.concatenate([rows, self.others.pop(0)])


def test_check_same_names_workers_that_differ():
    replicas = TwoProcesses(worker=0, num_workers=2)
    object.__setattr__(replicas, "others", [np.array([1]), np.zeros((1, 32), np.int32)])
    with pytest.raises(ValueError, match=r"workers \[1\] have another model than worker 0"):
        replicas.check_same("model", "one")


def test_join_restores_order_of_examples():
    replicas = TwoProcesses(worker=0, num_workers=2)
    object.__setattr__(replicas, "others", [np.array([10, 30]), np.array([1, 3])])
    mine = np.array([True, False, True, False])
    np.testing.assert_array_equal(replicas.join(np.array([0, 20]), mine), [0, 10, 20, 30])


def test_lost_worker_error_states_remedy():
    error = tf.errors.UnavailableError(None, None, "Connection reset by peer")
    said = pytest.raises(LostWorkerError, match=r"worker 1 of 2 stops.*resume=True")
    with said, Replicas(worker=1, num_workers=2).watched():
        raise error
    with pytest.raises(tf.errors.UnavailableError), Replicas().watched():
        raise error


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"cluster": {"worker": ["a:1"]}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "ps", "index": 0}}',
    ],
)
def test_invalid_tf_config_is_shown(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match="TF_CONFIG"):
        open_replicas("multi_worker")


def test_workers_are_counted(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert num_workers() == 0
    with pytest.raises(ValueError, match="TF_CONFIG"):
        open_replicas("multi_worker")
    cluster = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}
    config = {"cluster": cluster, "task": {"type": "worker", "index": 1}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert num_workers() == 3


def test_auto_strategy_uses_one_replica_with_one_device(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert open_replicas("auto").count == open_replicas("none").count == 1


def test_optimizers_that_sum_gradients_themselves_are_rejected():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    group = ParameterGroup(keras.optimizers.SGD(0.1), model.trainable_variables)
    strategy = SimpleNamespace(num_replicas_in_sync=2)
    with pytest.raises(ValueError, match=r"transfer\.training\.optimizers"):
        Trainer(model, [group], replicas=Replicas(strategy))


DROPOUT = """
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from transfer import Head
from transfer.core.distribution import open_replicas
replicas = open_replicas("mirrored")
with replicas.strategy.scope():
    head = Head(2, dropout=0.5, seed=1)
    head.build([None, 64])
dropout = head.dropout_layers[0]
draw = tf.function(lambda: replicas.strategy.run(lambda: dropout(tf.ones([1, 64]), training=True)))
local = replicas.strategy.experimental_local_results
masks = [np.array(mask) for _ in range(2) for mask in local(draw())]
assert len(np.unique(masks, axis=0)) == 4, masks
"""


@pytest.mark.slow
def test_dropout_masks_differ_between_replicas():
    status, says = Process("-c", DROPOUT).wait()
    assert status == 0, says


def test_graph_with_a_sum_over_one_replica_is_released():
    """TensorFlow keeps the gradients of reductions, and with them their graphs, for good."""
    step = tf.function(lambda value: Replicas().run(lambda it: sum_over_replicas([it]), value))
    graph = weakref.ref(step.get_concrete_function(tf.constant(2.0)).graph)
    assert step(tf.constant(2.0))[0] == 2.0
    del step
    gc.collect()
    assert graph() is None
