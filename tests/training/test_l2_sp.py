"""L2-SP: the penalty on the distance from pretrained weights."""

import keras
import numpy as np
import tensorflow as tf

from transfer.training.l2_sp import L2SP
from transfer.training.trainer import ParameterGroup, Trainer


def test_gradient_is_that_of_the_penalty_of_the_paper():
    generator = np.random.default_rng(0)
    start, now = generator.standard_normal((2, 3, 4)).astype(np.float32)
    weight = keras.Variable(start)
    penalty = L2SP(0.7, [weight])
    weight.assign(now)
    with tf.GradientTape() as tape:
        loss = 0.7 / 2 * tf.reduce_sum((weight.value - start) ** 2)
    expected = tape.gradient(loss, weight.value)
    np.testing.assert_allclose(penalty.gradient(weight), expected, rtol=1e-6)
    assert penalty.gradient(keras.Variable(now)) is None


def test_strong_penalty_returns_weights_to_their_start():
    model = keras.Sequential([keras.layers.Dense(2, kernel_initializer="zeros")])
    model.build((None, 3))
    kernel = model.layers[0].kernel
    penalty = L2SP(5.0, [kernel])
    kernel.assign(np.ones((3, 2), np.float32))
    trainer = Trainer(
        model,
        [ParameterGroup(keras.optimizers.SGD(0.1), model.trainable_variables)],
        l2_sp=penalty,
    )
    inputs, labels = np.zeros((4, 3), np.float32), np.array([0, 1, 0, 1])
    for _ in range(3):
        trainer.train_step(inputs, labels)
    np.testing.assert_allclose(kernel.numpy(), 0.125, rtol=1e-6)  # halved by each step
