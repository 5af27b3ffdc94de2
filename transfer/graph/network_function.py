"""A network as a ``tf.function`` of its input and weights, with checks of input and output shapes.

Data contract: the input has the rank, height, width and channels that the graph fixes, and the
output has one row per row of the input. A reshape to ``[-1, width]`` would otherwise split images
larger than the network's, and merge smaller ones. Shapes that are unknown during tracing are
asserted at run time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from transfer.graph import SEED, Network, canonical, output_shapes, trials


def as_function(network: Network) -> Callable[[Any, Sequence[Any], Any], Any]:
    """A function ``(inputs, list of weights, seed) -> output``, computed by a ``tf.function``.

    The output of a network with several taps is a dict of their names to tensors.

    It needs its own ``tf.function`` because a gradient tape does not record operations imported
    into the function in which it was opened. The seed, int32 ``[2]``, may be ``None`` if the
    network uses no random numbers.

    Raises:
        ValueError: if the input does not have the shape of the network's input, or the output does
            not have one row per row of the input.
    """
    names = [canonical(variable.name) for variable in network.variables]

    def apply(inputs: tf.Tensor, weights: list[tf.Tensor], seed: tf.Tensor | None) -> Any:
        tensors = {network.input: inputs, **dict(zip(names, weights, strict=True))}
        outputs = {name: tf.identity(tensors[name]) for name in network.outputs if name in tensors}
        computed = [name for name in dict.fromkeys(network.outputs) if name not in tensors]
        if computed:
            outputs |= dict(zip(computed, imported(computed, tensors, seed), strict=True))
        if network.taps:
            return {name: outputs[tensor] for name, tensor in network.taps.items()}
        return outputs[network.output]

    def imported(
        computed: list[str], tensors: dict[str, tf.Tensor], seed: tf.Tensor | None
    ) -> list[tf.Tensor]:
        inputs, *weights = tensors.values()
        tensors[SEED] = tf.zeros([2], tf.int32) if seed is None else seed
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in (inputs, *weights)]
        graph_def = trials.checked_graph(network, specs[0], specs[1:])
        # Each graph uses its own subset of the weights. The identity captures a tensor of an outer
        # function, which the import does not.
        used = {canonical(edge) for node in graph_def.node for edge in node.input}
        outputs = tf.graph_util.import_graph_def(
            graph_def,
            input_map={name: tf.identity(t) for name, t in tensors.items() if name in used},
            return_elements=computed,
            name="network",
        )
        return _with_a_row_each(network, inputs, dict(zip(computed, outputs, strict=True)))

    def run(inputs: tf.Tensor, weights: list[tf.Tensor], seed: tf.Tensor | None) -> Any:
        inputs = as_input(network, inputs)
        if network.batch_size is None:
            return apply(inputs, weights, seed)

        def one(batch: tf.Tensor, number: tf.Tensor) -> Any:
            own = None if seed is None else tf.random.fold_in(seed, number)
            return apply(batch, weights, own)

        return _in_batches(one, inputs, network.batch_size)

    compiled = compiled_per_rank(run)

    def call(inputs: Any, weights: Sequence[Any], seed: tf.Tensor | None) -> Any:
        return compiled(_checked(network, tf.convert_to_tensor(inputs)), list(weights), seed)

    return call


def compiled_per_rank(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function in one ``tf.function`` per rank of its first argument.

    A single one would relax two ranks to an unknown rank, with which oneDNN kernels abort the
    process.
    """
    functions: dict[int | None, Any] = {}

    def call(inputs: Any, *more: Any) -> Any:
        inputs = tf.convert_to_tensor(inputs)
        rank = inputs.shape.rank
        if rank not in functions:
            functions[rank] = tf.function(function, autograph=False, reduce_retracing=True)
        return functions[rank](inputs, *more)

    return call


def output_shape(network: Network, example: Sequence[int | None]) -> tf.TensorShape:
    """The static output shape for any number of examples of this shape.

    It includes a width that the graph computes from the batch size, which inference with an unknown
    batch size does not find.
    """
    return _in_common(_probe(network, example).get(network.output, {}).values())


def _probe(network: Network, example: Sequence[int | None]) -> dict[str, dict[int, tf.TensorShape]]:
    """For each output, batch size to its shape; empty if the graph does not accept any batch
    size."""
    try:
        probes = output_shapes(network, example)
    except ValueError:
        return {}
    return {
        name: {batch: tf.TensorShape(shapes[name]) for batch, shapes in probes.items()}
        for name in network.outputs
    }


def _in_common(shapes: Iterable[tf.TensorShape]) -> tf.TensorShape:
    first, *others = [*shapes] or [tf.TensorShape(None)]
    return functools.reduce(tf.TensorShape.most_specific_compatible_shape, others, first)


def as_input(network: Network, images: tf.Tensor) -> tf.Tensor:
    """Convert images to the network's input dtype, and flatten them if it takes vectors."""
    if network.input_shape is not None and (len(network.input_shape), images.shape.rank) == (2, 4):
        example = images.shape[1:]
        width = math.prod(example) if example.is_fully_defined() else network.input_shape[1]
        batch = -1 if example.is_fully_defined() else tf.shape(images)[0]
        images = tf.reshape(images, [batch, -1 if width is None else width])
    if network.input_dtype not in (None, images.dtype):
        if images.dtype.is_bool:
            return tf.cast(images, network.input_dtype)
        if network.input_dtype.is_integer:
            images = tf.round(tf.cast(images, tf.float32))
        images = tf.saturate_cast(images, network.input_dtype)
    return images


def _checked(network: Network, inputs: tf.Tensor) -> tf.Tensor:
    """Check the input and set the static shape that the network fixes."""
    dtype, expected, actual = inputs.dtype, network.input_shape, inputs.shape
    if not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
        raise ValueError(f"the input is of type {dtype.name}; expected numbers, e.g. float32")
    if actual.rank is None:
        if expected is None:
            raise ValueError(
                "neither the input nor the graph says how many dimensions the input has; give it a "
                "static shape, e.g. tf.ensure_shape(images, [None, 224, 224, 3])"
            )
        return tf.ensure_shape(inputs, [None, *expected[1:]])
    if expected is None:
        return inputs
    if actual.rank == 0 and len(expected):
        raise ValueError("the input is a single number; expected a batch")
    if len(expected) == 2 and actual.rank == 4:  # images for a network that takes vectors
        if actual[1:].is_fully_defined() and expected[1] not in (None, math.prod(actual[1:])):
            raise ValueError(_mismatch(actual, expected))
        return inputs
    if not actual[1:].is_compatible_with(expected[1:]):
        raise ValueError(_mismatch(actual, expected))
    if any(f is None and e is not None for f, e in zip(actual[1:], expected[1:], strict=True)):
        return _asserted(inputs, [None, *expected[1:]])
    return inputs


def _asserted(inputs: tf.Tensor, expected: Sequence[int | None]) -> tf.Tensor:
    """Assert the shape of an input at run time."""
    sizes = tf.shape(inputs)
    fixed = [(number, size) for number, size in enumerate(expected) if size is not None]
    is_equal = [tf.equal(sizes[number], size) for number, size in fixed]
    message = _mismatch(inputs.shape, expected)
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(is_equal), [message, sizes])]):
        inputs = tf.identity(inputs)
    inputs.set_shape(expected)
    return inputs


def _mismatch(actual: Any, expected: Sequence[int | None]) -> str:
    actual = tuple(actual)  # None is an unknown size, or the number of examples
    takes = f"the network takes {(None, *expected[1:])}"
    if len(actual) == len(expected) - 1:
        return f"the input has shape {actual}; {takes}: add the batch axis, images[None]"
    way = "resize or convert the images, e.g. with transfer.Preprocess"
    return f"the input has shape {actual}; {takes}: {way}"


def _with_a_row_each(
    network: Network, inputs: tf.Tensor, outputs: Mapping[str, tf.Tensor]
) -> list[tf.Tensor]:
    """Check that the outputs have as many rows as the input; a scalar, such as a loss, is exempt.

    Args:
        network: the network.
        inputs: its input.
        outputs: the name of each output in the graph to its value.
    """
    example, probe = inputs.shape[1:], functools.cache(lambda: _probe(network, example.as_list()))

    def checked(name: str, output: tf.Tensor) -> tf.Tensor:
        if output.shape.rank == 0:
            return output
        if inputs.shape[0] is not None and output.shape.rank is not None:
            if output.shape[0] is not None:
                _check_rows(inputs.shape[0], output.shape[0], example)
                return output
        elif _has_a_row_each(probe().get(name, {}), example, output):
            return output
        counts = [tf.shape(inputs)[0], tf.shape(output)[0]]
        message = _mixes("other than", "its", example)
        with tf.control_dependencies([tf.debugging.Assert(tf.equal(*counts), [message, *counts])]):
            return tf.identity(output)

    return [checked(name, output) for name, output in outputs.items()]


def _has_a_row_each(
    shapes: Mapping[int, tf.TensorShape], example: tf.TensorShape, output: tf.Tensor
) -> bool:
    """Whether there is one row per example for every batch size; sets the output's static shape."""
    output.set_shape(_in_common(shapes.values()))
    rows = {batch: shape[0] if shape.rank else None for batch, shape in shapes.items()}
    for batch, number in rows.items():
        if number is not None:
            _check_rows(batch, number, example)
    return bool(rows) and None not in rows.values()


def _check_rows(batch: int, rows: int, example: tf.TensorShape) -> None:
    if rows != batch:
        raise ValueError(_mixes(str(rows), str(batch), example))


def _mixes(rows: str, batch: str, example: tf.TensorShape) -> str:
    return (
        f"the network gives {rows} rows for {batch} examples of shape {tuple(example)}, so it "
        "mixes or splits them; expected a row for each: resize the images to the size that the "
        "network was made for, e.g. with transfer.Preprocess, or choose another input or tap"
    )


def _in_batches(function: Any, inputs: tf.Tensor, size: int) -> Any:
    """Apply a function that takes batches of ``size`` examples to any number of examples; the last
    batch is padded with the first examples, whose outputs are dropped."""
    count = tf.shape(inputs)[0]
    num_batches = -(-count // size)
    missing = tf.range(num_batches * size - count) % tf.maximum(count, 1)
    filled = tf.concat([inputs, tf.gather(inputs, missing)], 0)
    batches = tf.reshape(filled, tf.concat([[num_batches, size], tf.shape(inputs)[1:]], 0))
    batches = tf.ensure_shape(batches, [None, size, *inputs.shape[1:]])
    one_batch = tf.TensorSpec([size, *inputs.shape[1:]], inputs.dtype)
    number = tf.TensorSpec([], tf.int32)
    specs = tf.function(function).get_concrete_function(one_batch, number).structured_outputs
    outputs = tf.map_fn(
        lambda batch: function(*batch),
        (batches, tf.range(num_batches)),
        fn_output_signature=tf.nest.map_structure(
            lambda spec: tf.TensorSpec(spec.shape, spec.dtype), specs
        ),
    )

    def joined(output: tf.Tensor) -> tf.Tensor:
        return tf.reshape(output, tf.concat([[-1], tf.shape(output)[2:]], 0))[:count]

    return tf.nest.map_structure(joined, outputs)
