"""The activations of a network, of programs whose nonlinearities are known."""

import tensorflow as tf
from stock import Program

from transfer.graph import activations

tf1 = tf.compat.v1


def activations_of(build):
    def program():
        x = tf1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        net = tf.nn.conv2d(x, tf.ones([3, 3, 3, 4]), 1, "SAME", name="conv")
        tf.identity(build(net), name="out")

    return activations(Program(program).network("out"))


def test_outputs_of_nonlinearities_are_found_in_order():
    def build(net):
        net = tf.nn.max_pool2d(tf.nn.relu(net, name="first"), 2, 2, "SAME")
        net = tf.nn.leaky_relu(net + 1.0, name="second")
        return tf.tanh(tf.reduce_mean(net, [1, 2]), name="third")

    assert activations_of(build) == ["first:0", "second:0", "third:0"]


def test_logits_and_softmax_are_left_out():
    def build(net):
        vector = tf.nn.relu(tf.reduce_mean(net, [1, 2]), name="vector")
        return tf.nn.softmax(tf.matmul(vector, tf.ones([4, 2])))

    assert activations_of(build) == ["vector:0"]


def test_swish_is_the_product_and_a_gate_of_channels_is_left_out():
    def build(net):
        net = tf.multiply(net, tf.sigmoid(net), name="swish")
        net = tf.multiply(net, tf.nn.relu6(net + 3.0) / 6.0, name="hard_swish")
        gate = tf.sigmoid(tf.reduce_mean(net, [1, 2], keepdims=True))
        return net * gate

    assert activations_of(build) == ["swish:0", "hard_swish:0"]
