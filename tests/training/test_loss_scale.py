import keras
import numpy as np
import tensorflow as tf

from transfer.training.loss_scale import LossScale


def step(scale, loss, variable, optimizer=None):
    """One step of gradient descent on ``loss(variable)``, in float16."""
    optimizer = optimizer or keras.optimizers.SGD(1.0)

    @tf.function
    def run():
        with tf.GradientTape() as tape:
            value = tf.cast(loss(tf.cast(variable.value, tf.float16)), tf.float32)
            scaled = scale.scaled(value)
        gradients = scale.unscaled(tape.gradient(scaled, [variable.value]))
        scale.update(gradients, lambda g: optimizer.apply(g, [variable]))

    optimizer.build([variable])
    run()
    return [float(v.numpy()) for v in scale.variables]


def test_gradients_too_small_for_float16_arrive():
    factor = tf.constant(2.0**-13, tf.float16)
    variable = keras.Variable(1.0)

    def loss(x):
        return x * factor * factor  # the gradient, 2**-26, is half the smallest float16 number

    step(LossScale(initial=1.0), loss, variable, keras.optimizers.SGD(2.0**10))
    assert float(variable.numpy()) == 1.0
    step(LossScale(), loss, variable, keras.optimizers.SGD(2.0**10))
    assert float(variable.numpy()) == 1 - 2.0**-16


def test_overflow_skips_the_step_and_halves_the_scale():
    variable = keras.Variable(1.0)
    optimizer = keras.optimizers.Adam(0.1)
    scale = LossScale(initial=2.0**15)
    assert step(scale, lambda x: x * 1000, variable, optimizer) == [2.0**14, 0]
    assert (float(variable.numpy()), int(optimizer.iterations)) == (1.0, 0)


def test_scale_grows_like_that_of_keras():
    ours = LossScale(initial=4.0, growth_steps=2)
    theirs = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.0), initial_scale=4.0, dynamic_growth_steps=2
    )
    variable = keras.Variable(1.0)
    theirs.build([variable])
    for value in (1.0, 1.0, 1.0, np.inf, 1.0, 1.0, 1.0, 1.0):
        theirs.apply([tf.constant(value)])
        ours.update([tf.constant(value)], lambda _: None)
        assert float(ours.variables[0].numpy()) == float(theirs.dynamic_scale.numpy())
