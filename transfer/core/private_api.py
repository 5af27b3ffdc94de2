"""All private APIs of TensorFlow and Keras that this project uses.

They may change in any release without notice. They are used only here, each with the reason why no
public API suffices; ``tests/core/test_private_api.py`` detects which of them a release has changed.
The protocol buffers of ``tensorflow.core`` are not included: they are a stable file format.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_def_registry
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2
from tensorflow.python.util import _pywrap_util_port


def find_op_def(operation: str) -> Any:
    """The ``OpDef`` of an operation registered in TensorFlow, else None.

    The public ways to get it create a node of the operation, which must not happen for unchecked
    nodes of an untrusted graph.
    """
    return op_def_registry.get(operation)


def is_onednn_on() -> bool:
    """Whether TensorFlow computes with oneDNN, decided when it is imported.

    The default depends on the processor, so the environment variable does not tell it.
    """
    return bool(_pywrap_util_port.IsMklEnabled())


def eager_mode() -> AbstractContextManager[None]:
    """Enable eager execution, even while a graph is built or in programs that have disabled it.

    ``tf.init_scope`` leaves the graph being built, but stays in graph mode after
    ``tf.compat.v1.disable_eager_execution``.
    """
    return tf.__internal__.eager_context.eager_mode()


def with_constants(function: Any) -> Any:
    """Freeze a concrete function: convert its variables and captured variables to constants.

    ``tf.lite.TFLiteConverter`` does the same, but treats values passed as arguments to a called
    function as mutable variables.
    """
    return convert_variables_to_constants_v2(function)


def moments(optimizer: Any, variable: tf.Variable) -> tuple[tf.Variable, tf.Variable]:
    """Adam's first and second moments of a variable.

    ``Optimizer.variables`` lists them without a mapping to the variables.
    """
    index = optimizer._get_variable_index(variable)
    return optimizer._momentums[index].value, optimizer._velocities[index].value


def momentum(optimizer: Any, variable: tf.Variable) -> tf.Variable:
    """The momentum accumulator of a variable in SGD; see ``moments``."""
    return optimizer.momentums[optimizer._get_variable_index(variable)].value


def averages(optimizer: Any) -> list[Any]:
    """The moving averages that an optimizer with ``use_ema`` keeps, in the order of the variables
    with which it was built.

    ``finalize_variable_values`` assigns them to the variables for good; a trainer needs both after
    each epoch.
    """
    return list(optimizer._model_variables_moving_average) if optimizer.use_ema else []


class OptimizerOverrides:
    """Mixin that overrides Keras optimizer behaviour for ``training.Trainer``; first base class.

    Weight decay applies only to variables of rank 2 or more. It is harmful for biases and for the
    scales of normalization layers (arXiv 1812.01187, section 3.1). ``exclude_from_weight_decay``
    selects by name, but the names in other people's graphs do not identify these variables.

    Gradients are not summed over replicas: the trainer has already done so before clipping. Keras
    would sum them again, and has no option to disable that.

    The moving average of the weights covers at most half of the steps so far: after t of them its
    decay is t / (t + 2), up to ``ema_momentum``, so that the weight of a step grows with its number
    (polynomial-decay averaging, arXiv 1212.1824). With Keras' constant decay, it would consist
    mostly of the first weights until many more steps are taken than it covers.
    """

    def _use_weight_decay(self, variable: Any) -> bool:
        return len(variable.shape) > 1

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        return grads_and_vars

    def _update_model_variables_moving_average(self, trainable_variables: Any) -> None:
        optimizer: Any = self
        # ``iterations`` counts updates; with accumulated gradients, this is called more often.
        steps = tf.cast(optimizer._iterations, tf.float32)
        decay = tf.minimum(optimizer.ema_momentum, steps / (steps + 2))
        pairs = zip(trainable_variables, optimizer._model_variables_moving_average, strict=True)
        for variable, average in pairs:
            kept = tf.cast(decay, variable.dtype)
            average.assign(kept * average + (1 - kept) * variable)


def rename_operation(tensor: Any, name: str) -> None:
    """Name the Keras operation that made a Keras tensor.

    The functions of ``keras.ops`` take no name, and the names that Keras gives may be those of
    layers of the same model, which it then refuses.
    """
    tensor._keras_history.operation.name = name
