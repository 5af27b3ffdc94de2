import keras
import numpy as np
import pytest
import tensorflow as tf

from transfer.training.optimizers import FusedAdam, FusedSGD, cosine, make_optimizer

GENERATOR = np.random.default_rng(0)
SHAPES = ((7, 5), (5,), (3, 3, 2, 4))
VALUES = [GENERATOR.normal(size=shape).astype(np.float32) for shape in SHAPES]
GRADIENTS = [
    [GENERATOR.normal(size=shape).astype(np.float32) for shape in SHAPES] for _ in range(12)
]
PAIRS = {
    "adam": (FusedAdam, keras.optimizers.Adam, {}),
    "adam with another epsilon": (FusedAdam, keras.optimizers.Adam, {"epsilon": 1e-3}),
    "amsgrad": (FusedAdam, keras.optimizers.Adam, {"amsgrad": True}),
    "momentum": (FusedSGD, keras.optimizers.SGD, {"momentum": 0.9}),
    "nesterov": (FusedSGD, keras.optimizers.SGD, {"momentum": 0.9, "nesterov": True}),
    "plain sgd": (FusedSGD, keras.optimizers.SGD, {}),
    "clipped": (FusedAdam, keras.optimizers.Adam, {"global_clipnorm": 0.5}),
    "accumulated": (FusedAdam, keras.optimizers.Adam, {"gradient_accumulation_steps": 3}),
}


def new_variables():
    return [keras.Variable(value) for value in VALUES]


def updated(optimizer, gradients=GRADIENTS, variables=None):
    variables = variables or new_variables()
    optimizer.build(variables)
    step = tf.function(lambda values: optimizer.apply(values, variables), autograph=False)
    for values in gradients:
        step([tf.constant(value) for value in values])
    return [variable.numpy() for variable in variables]


def assert_close(first, second):
    # Relative to the distance of twelve steps of 0.05, the tolerance is 1e-5.
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=6e-6)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_fused_optimizers_equal_keras(pair):
    fused, stock, options = pair
    ours, theirs = fused(0.05, **options), stock(0.05, **options)
    results = updated(ours)
    assert_close(results, updated(theirs))
    assert any((a != b).any() for a, b in zip(results, VALUES, strict=True))
    assert_close([v.numpy() for v in ours.variables], [v.numpy() for v in theirs.variables])


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_update_is_one_operation_per_variable(kind):
    optimizer, variables = make_optimizer(kind, 0.1), new_variables()
    optimizer.build(variables)
    function = tf.function(lambda *values: optimizer.apply(list(values), variables))
    graph = function.get_concrete_function(*map(tf.constant, GRADIENTS[0])).graph
    assert sum(op.type.startswith("ResourceApply") for op in graph.get_operations()) == 3


def test_fused_optimizer_loads_keras_state():
    theirs = keras.optimizers.Adam(0.05)
    variables = new_variables()
    updated(theirs, GRADIENTS[:6], variables)
    ours = FusedAdam(0.05)
    ours.build(variables)
    for mine, its in zip(ours.variables, theirs.variables, strict=True):
        mine.assign(its)
    assert_close(
        updated(ours, GRADIENTS[6:], variables), updated(keras.optimizers.Adam(0.05), GRADIENTS)
    )


def test_sparse_gradients_use_keras_update():
    sparse = tf.IndexedSlices(tf.ones([1, 5]), tf.constant([2]), tf.constant([7, 5]))

    def result(optimizer):
        variable = keras.Variable(VALUES[0])
        optimizer.build([variable])
        optimizer.apply([sparse], [variable])
        return variable.numpy()

    assert_close([result(FusedAdam(0.05))], [result(keras.optimizers.Adam(0.05))])


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_weight_decay_applies_to_kernels_only(kind):
    zeros = [[np.zeros(shape, np.float32) for shape in SHAPES]]
    after = updated(make_optimizer(kind, 0.5, weight_decay=0.1), zeros)
    np.testing.assert_allclose(after[0], VALUES[0] * (1 - 0.5 * 0.1), rtol=1e-6)
    np.testing.assert_array_equal(after[1], VALUES[1])
    np.testing.assert_allclose(after[2], VALUES[2] * (1 - 0.5 * 0.1), rtol=1e-6)


def test_fused_optimizers_work_under_mirrored_strategy():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        variables, optimizer = new_variables(), FusedAdam(0.05)
        optimizer.build(variables)

    def replica(*slopes):
        with tf.GradientTape() as tape:
            values = [variable.value for variable in variables]
            loss = tf.add_n([tf.reduce_sum(v * s) for v, s in zip(values, slopes, strict=True)])
        optimizer.apply(tape.gradient(loss, values), variables)
        return loss

    step = tf.function(lambda *slopes: strategy.run(replica, slopes), autograph=False)
    for slopes in GRADIENTS:
        step(*map(tf.constant, slopes))
    assert_close([v.numpy() for v in variables], updated(keras.optimizers.Adam(0.05)))


def test_config_round_trip():
    optimizer = make_optimizer("adam", cosine(0.1, 100, 10), weight_decay=0.01, accumulate=2)
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(copy) is FusedAdam
    assert copy.get_config() == optimizer.get_config()


def test_cosine_schedule_warms_up_and_decays():
    schedule = cosine(0.2, 100, 10)
    rates = [float(schedule(step)) for step in (0, 5, 10, 55, 100, 120)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.1, 0.0, 0.0], abs=1e-6)
    assert float(cosine(0.2, 100, 0)(0)) == pytest.approx(0.2)


def test_unknown_optimizer_is_refused():
    with pytest.raises(
        ValueError, match="optimizer 'rmsprop' is not known; choose from: adam, sgd"
    ):
        make_optimizer("rmsprop", 0.1)
