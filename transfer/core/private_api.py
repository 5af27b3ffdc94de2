"""Everything of TensorFlow and Keras that this project uses and that is not public.

Such names may change in any release, without notice. They stand here only, each with the reason
why no public name will do; ``tests/core/test_private_api.py`` says which of them a release has
changed. The protocol buffers of ``tensorflow.core`` are not among them: files have that format.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_def_registry
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2


def find_op_def(operation: str) -> Any:
    """The ``OpDef`` of an operation that TensorFlow knows, else None.

    The public ways to it make a node of the operation, which is just what unchecked nodes of a
    stranger's graph must not become.
    """
    return op_def_registry.get(operation)


def eager_mode() -> AbstractContextManager[None]:
    """Eager execution, in programs that have turned it off and while a graph is built.

    ``tf.init_scope`` leaves the graph that is built, but stays in graph mode after
    ``tf.compat.v1.disable_eager_execution``.
    """
    return tf.__internal__.eager_context.eager_mode()


def with_constants(function: Any) -> Any:
    """A concrete function whose variables, and captured values of them, are constants.

    ``tf.lite.TFLiteConverter`` does the same, but takes values that reach the graph as arguments
    of a function it calls for variables that change.
    """
    return convert_variables_to_constants_v2(function)


def moments(optimizer: Any, variable: tf.Variable) -> tuple[tf.Variable, tf.Variable]:
    """Adam's averages for a variable, of gradients and of their squares.

    ``Optimizer.variables`` lists them without saying which belongs to which variable.
    """
    index = optimizer._get_variable_index(variable)
    return optimizer._momentums[index].value, optimizer._velocities[index].value


def momentum(optimizer: Any, variable: tf.Variable) -> tf.Variable:
    """The accumulator of SGD with momentum for a variable; see ``moments``."""
    return optimizer.momentums[optimizer._get_variable_index(variable)].value


class OptimizerOverrides:
    """Keras behaviour that optimizers of ``training.Trainer`` override; a base before Keras' class.

    Weight decay is for what has two dimensions or more. On biases and on the scales of norms it
    does harm (arXiv 1812.01187, section 3.1), and the names of a stranger's variables, by which
    ``exclude_from_weight_decay`` chooses, do not tell.

    Gradients are applied as they are: the trainer has added up those of all replicas before it
    clips them. Keras would add them up once more, and has no option not to.
    """

    def _use_weight_decay(self, variable: Any) -> bool:
        return len(variable.shape) > 1

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        return grads_and_vars
