"""The rule for heads: a chain of dense layers becomes an equivalent one without batch norm."""

import numpy as np
import pytest

from transfer.vgg.published.batch_norm import BatchNorm
from transfer.vgg.published.heads import (
    Activation,
    Dense,
    Normalization,
    UnsupportedHeadError,
    build,
    plain,
)

GENERATOR = np.random.default_rng(0)


def dense(inputs, outputs, name="dense"):
    return Dense(
        name, *(GENERATOR.normal(size=s).astype("f4") for s in ((inputs, outputs), outputs))
    )


def norm(width, name="norm"):
    mean, gamma, beta = GENERATOR.normal(size=(3, width)).astype("f4")
    return Normalization(name, BatchNorm(mean, GENERATOR.uniform(0.5, 2, width), 1e-3, gamma, beta))


def normalized(x, step):
    one = step.norm
    return (x - one.mean) / np.sqrt(one.variance + one.epsilon) * one.gamma + one.beta


def product(x, layer):
    return x @ layer.kernel + layer.biases


def test_batch_norm_is_folded_on_both_sides_of_an_activation():
    first, inner, after, second = norm(6), dense(6, 5), norm(5), dense(5, 3)
    between = norm(5)
    steps = [first, inner, between, Activation("a", "tanh"), after, second]
    head = build([*steps, Activation("s", "softmax")], "flatten")
    x = GENERATOR.normal(size=(4, 6))
    hidden = np.tanh(normalized(product(normalized(x, first), inner), between))
    expected = product(normalized(hidden, after), second)
    assert [layer.activation for layer in head.connected] == ["tanh", "linear"]
    found = product(np.tanh(product(x, head.connected[0])), head.connected[1])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_batch_norm_per_channel_is_folded_before_flattening():
    step, layer = norm(2), dense(2 * 9, 3)
    head = build([step, layer], "flatten")
    x = GENERATOR.normal(size=(4, 9, 2))
    expected = product(normalized(x, step).reshape(4, -1), layer)
    np.testing.assert_allclose(product(x.reshape(4, -1), head.connected[0]), expected, atol=1e-4)


def test_sigmoid_of_one_output_becomes_two_classes():
    layer = dense(4, 1)
    head = build([layer, Activation("dense", "sigmoid")], "average", ["cat", "dog"])
    x = GENERATOR.normal(size=(5, 4))
    logits = product(x, head.connected[0])
    p = 1 / (1 + np.exp(-product(x, layer)[:, 0]))
    found = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found, np.stack([1 - p, p], 1), atol=1e-6)
    assert (head.class_names, head.note) == (("cat", "dog"), "")
    assert "assumed to be a logit of two classes" in build([layer], "average").note


def test_plain_head_has_relu_between_layers():
    head = plain([dense(4, 3), dense(3, 3), dense(3, 2)], "max", ["one", "two", "three"])
    assert [layer.activation for layer in head.connected] == ["relu", "relu", "linear"]
    assert head.class_names == ()  # not as many as classes


@pytest.mark.parametrize("steps, message", [
    ([], "no dense layer"),
    ([dense(4, 3), dense(4, 2)], "takes 4 inputs; its layer dense has 3 outputs"),
    ([dense(4, 3), Activation("a", "sigmoid")], "3 outputs with activation sigmoid"),
    ([dense(4, 1), Activation("a", "softmax")], "1 outputs with activation softmax"),
    ([dense(4, 3), Activation("a", "softmax"), norm(3)], "norm comes after an activation"),
    ([norm(3), dense(4, 3)], "norm has 3 features; the next layer takes 4"),
    ([dense(4, 3), norm(4)], "norm has 4 features; its layer dense has 3 outputs"),
    ([dense(4, 3), Activation("a", "mish"), dense(3, 2)], "has activation mish; expected one of"),
    ([Activation("a", "tanh"), dense(4, 3)], r"a \(tanh\) does not follow a dense layer"),
    ([norm(4), Activation("a", "relu"), dense(4, 3)], "does not follow a dense layer"),
    ([dense(2, 2)] * 21, "over 20 dense layers"),
    ([dense(2, 2), *[norm(2)] * 100], "has 101 steps; expected at most 100"),
])  # fmt: skip
def test_other_heads_are_left_out_with_the_reason(steps, message):
    with pytest.raises(UnsupportedHeadError, match=message):
        build(steps, "average")
