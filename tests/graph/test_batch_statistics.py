import pytest
import tensorflow as tf
from stock import Program

from transfer.graph.batch_statistics import batch_statistics

tf1 = tf.compat.v1


def by_hand(x):
    mean, variance = tf.nn.moments(x, [0, 1, 2], name="moments")
    return tf.nn.batch_normalization(x, mean, variance, None, None, 1e-3)


def fused(x):
    return tf1.nn.fused_batch_norm(x, tf.ones([3]), tf.zeros([3]), name="norm")[0]


def of_each_image(x):
    mean, variance = tf.nn.moments(x, [1, 2], keepdims=True)
    return tf.nn.batch_normalization(x, mean, variance, None, None, 1e-3)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [(by_hand, ["moments/mean", "moments/variance"]), (fused, ["norm"]), (of_each_image, [])],
)
def test_statistics_of_the_batch_are_found(norm, expected):
    def build():
        x = tf1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        tf.nn.relu(norm(x), name="tap")

    found = batch_statistics(Program(build).network())
    assert [name.removesuffix("/FusedBatchNormV3") for name in found] == expected
