"""Detect changes of the private APIs of TensorFlow and Keras that are used."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from transfer.core import private_api

ROOT = Path(__file__).resolve().parents[2]
PRIVATE = re.compile(
    r"^\s*(?:from|import) (?:tensorflow\.python|keras\.src)\b|__internal__"
    r"|\._get_variable_index|\._momentums|\._velocities|def _all_reduce|def _use_weight_decay"
    r"|def _update_model_variables|\._keras_history",
    re.MULTILINE,
)


def test_private_apis_are_used_in_one_module_only():
    users = [
        str(path.relative_to(ROOT))
        for package in ("transfer", "recipes", "benchmarks")
        for path in (ROOT / package).rglob("*.py")
        if PRIVATE.search(path.read_text())
    ]
    assert users == ["transfer/core/private_api.py"]


def test_op_defs_are_found():
    definition = private_api.find_op_def("SplitV")
    assert [arg.name for arg in definition.input_arg] == ["value", "size_splits", "split_dim"]
    assert definition.output_arg[0].number_attr == "num_split"
    assert private_api.find_op_def("NoSuchOperation") is None


def test_eager_mode_runs_operations_while_a_graph_is_built():
    with tf.Graph().as_default():
        assert not tf.executing_eagerly()
        with private_api.eager_mode():
            assert tf.constant(2.0).numpy() == 2.0
        assert not tf.executing_eagerly()


def test_with_constants_removes_all_variables():
    variable = tf.Variable([1.0, 2.0])
    function = tf.function(lambda x: x * variable).get_concrete_function(tf.TensorSpec([2]))
    frozen = private_api.with_constants(function)
    assert not frozen.graph.variables
    assert len(frozen.inputs) == 1  # that of the variable is gone
    np.testing.assert_array_equal(frozen(tf.constant([3.0, 4.0]))[0], [3.0, 8.0])


def test_moments_are_those_of_the_variable():
    variables = [keras.Variable(np.zeros(size, np.float32)) for size in (2, 3)]
    adam = keras.optimizers.Adam(0.1)
    adam.build(variables)
    gradients = [tf.constant([1.0, 2.0]), tf.constant([3.0, 4.0, 5.0])]
    adam.apply(gradients, variables)
    for variable, gradient in zip(variables, gradients, strict=True):
        first, second = private_api.moments(adam, variable.value)
        np.testing.assert_allclose(first, 0.1 * gradient, rtol=1e-6)
        np.testing.assert_allclose(second, 0.001 * gradient**2, rtol=1e-5)


def test_momentum_is_that_of_the_variable():
    variables = [keras.Variable(np.zeros(size, np.float32)) for size in (2, 3)]
    sgd = keras.optimizers.SGD(0.1, momentum=0.9)
    sgd.build(variables)
    sgd.apply([tf.ones(2), 2 * tf.ones(3)], variables)
    np.testing.assert_allclose(private_api.momentum(sgd, variables[1].value), [-0.2] * 3)


@pytest.mark.parametrize(
    "name",
    [
        "_use_weight_decay",
        "_all_reduce_sum_gradients",
        "_update_model_variables_moving_average",
    ],
)
def test_keras_calls_overridden_methods(name):
    overridden = getattr(private_api.OptimizerOverrides, name)
    calls = []

    def counted(self, argument):
        calls.append(argument)
        return overridden(self, argument)

    kind = type("Counted", (private_api.OptimizerOverrides, keras.optimizers.SGD), {name: counted})
    optimizer = kind(0.1, weight_decay=0.1, use_ema=True)
    variables = [keras.Variable(np.ones((2, 2), np.float32)), keras.Variable(np.ones(2, "float32"))]
    optimizer.apply([tf.zeros((2, 2)), tf.zeros(2)], variables)
    assert calls, f"Keras {keras.__version__} does not call {name}"
    np.testing.assert_allclose(variables[0].numpy(), 0.99)  # decayed
    np.testing.assert_array_equal(variables[1].numpy(), 1.0)


@pytest.mark.parametrize("accumulate", [None, 4])
def test_average_covers_half_of_the_steps_at_most(accumulate):
    """Without a limit, a mean whose weights grow with the number of the step."""
    kind = type("Averaging", (private_api.OptimizerOverrides, keras.optimizers.SGD), {})
    growing, constant = (
        kind(1.0, use_ema=True, ema_momentum=decay, gradient_accumulation_steps=accumulate)
        for decay in (1.0, 0.5)
    )
    weights = []
    values = {name: keras.Variable(np.zeros(1, np.float32)) for name in ("growing", "constant")}
    for _ in range(40):
        growing.apply([tf.constant([-1.0])], [values["growing"]])
        constant.apply([tf.constant([-1.0])], [values["constant"]])
        weights.append(values["growing"].numpy()[0])
    steps = np.arange(1, 41)
    expected = (steps * weights).sum() / steps.sum()
    np.testing.assert_allclose(private_api.averages(growing)[0].numpy(), expected, rtol=1e-5)
    average = 0.0
    for step, value in enumerate(weights):
        decay = min(0.5, step / (step + 2))
        average = decay * average + (1 - decay) * value
    np.testing.assert_allclose(private_api.averages(constant)[0].numpy(), average, rtol=1e-5)


def test_operations_of_keras_can_be_named():
    values = keras.ops.square(keras.Input((2,)))
    private_api.rename_operation(values, "squares")
    assert (
        keras.Model(values._keras_history.operation.input, values).operations[-1].name == "squares"
    )
