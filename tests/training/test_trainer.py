import unittest.mock

import keras
import numpy as np
import pytest
import tensorflow as tf

from transfer.training.trainer import NonFiniteLossError, ParameterGroup, Trainer, epoch_seed

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.random((50, 8), np.float32)
LABELS = (INPUTS.sum(-1) > 4).astype(np.int64)


def new_model(dropout=0.0):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input([8]),
            keras.layers.Dense(16, "relu"),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(2),
        ]
    )


def new_kernel():
    return np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)


def new_trainer(model=None, rate=0.05, optimizer=None, **arguments):
    model = model or new_model()
    group = ParameterGroup(optimizer or keras.optimizers.Adam(rate), model.trainable_variables)
    return Trainer(model, [group], **arguments)


def batches(epoch, first=0, size=16):
    order = np.random.default_rng(epoch_seed(0, epoch)).permutation(len(INPUTS))
    for start in range(first * size, len(order), size):
        chosen = order[start : start + size]
        yield INPUTS[chosen], LABELS[chosen]


def fit(trainer, epochs, **arguments):
    trainer.fit(batches, epochs=epochs, steps_per_epoch=4, **arguments)
    return trainer


def weights(model):
    return [w.numpy() for w in model.weights]


def assert_same(first, second, **tolerance):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_equals_keras_fit(smoothing):
    ours = fit(new_trainer(label_smoothing=smoothing), epochs=3)
    theirs = new_model()
    theirs.compile(
        keras.optimizers.Adam(0.05),
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing),
    )
    for epoch in range(3):
        for inputs, labels in batches(epoch):
            theirs.train_on_batch(inputs, keras.ops.one_hot(labels, 2))
    assert_same(weights(ours.model), weights(theirs), rtol=1e-4, atol=1e-5)


def test_class_weights_equal_those_of_keras_fit():
    weights_of_classes = np.array([0.5, 3.0])
    ours = fit(new_trainer(class_weights=weights_of_classes), epochs=2)
    theirs = new_model()
    theirs.compile(keras.optimizers.Adam(0.05), keras.losses.SparseCategoricalCrossentropy(True))
    for epoch in range(2):
        for inputs, labels in batches(epoch):
            theirs.train_on_batch(inputs, labels, class_weight=dict(enumerate(weights_of_classes)))
    assert_same(weights(ours.model), weights(theirs), rtol=1e-4, atol=1e-5)


def test_averaged_weights_equal_those_of_keras_fit():
    """They are evaluated after each epoch and remain at the end, but training goes on without
    them."""
    evaluated = []
    ours = new_trainer(optimizer=keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.8))
    fit(
        ours,
        epochs=2,
        validate=lambda: evaluated.append(weights(ours.model)) or {},
        callbacks=[
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: evaluated.append(weights(ours.model))
            )
        ],
    )
    theirs = new_model()
    theirs.compile(
        keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.8),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    for epoch in range(2):
        for inputs, labels in batches(epoch):
            theirs.train_on_batch(inputs, labels)
    theirs.optimizer.finalize_variable_values(theirs.trainable_variables)
    assert_same(weights(ours.model), weights(theirs), rtol=1e-4, atol=1e-5)
    assert len(evaluated) == 4
    assert_same(evaluated[0], evaluated[1])
    assert_same(evaluated[2], weights(ours.model))


def test_gradients_are_clipped_by_global_norm():
    ours = fit(new_trainer(clip_norm=0.01, optimizer=keras.optimizers.SGD(1.0)), epochs=1)
    theirs = new_model()
    theirs.compile(
        keras.optimizers.SGD(1.0, global_clipnorm=0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    for inputs, labels in batches(0):
        theirs.train_on_batch(inputs, labels)
    assert_same(weights(ours.model), weights(theirs), rtol=1e-4, atol=1e-6)


def test_mixup_mixes_inputs_and_targets_with_same_weight():
    seen = []

    class Spy(keras.Sequential):
        def call(self, inputs, training=False):
            seen.append(inputs)
            return super().call(inputs)

    def step(mixup, seed=0, number=0):
        model = Spy([keras.Input([8]), keras.layers.Dense(2)])
        trainer = new_trainer(model, mixup=mixup, seed=seed)
        model.set_weights([new_kernel(), np.zeros(2, np.float32)])
        inputs, labels = tf.constant(INPUTS[:16]), tf.constant(LABELS[:16])
        loss = trainer._step(inputs, labels, tf.constant(number, tf.int64), tf.constant(0.0))[0]
        return float(loss), np.asarray(seen.pop())

    loss, mixed = step(0.4)
    shares = (mixed - INPUTS[15::-1]) / (INPUTS[:16] - INPUTS[15::-1])
    share = np.median(shares)
    np.testing.assert_allclose(shares, share, atol=1e-3)
    assert 0 < share < 1
    logits = tf.constant(mixed) @ new_kernel()
    losses = [
        tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits).numpy().mean()
        for labels in (LABELS[:16], LABELS[15::-1])
    ]
    assert loss == pytest.approx(share * losses[0] + (1 - share) * losses[1], rel=1e-4)
    assert step(0.4)[0] == loss
    assert step(0.4, number=1)[0] != loss != step(0.4, seed=1)[0]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_classes_have_their_own_weights(kind):
    """Also in the gradient, for which the weighted targets do not sum to 1."""
    of_classes = np.array([0.5, 3.0], np.float32)
    model = keras.Sequential(
        [keras.Input([2, 2, 2]), keras.layers.Flatten(), keras.layers.Dense(2, use_bias=False)]
    )
    group = ParameterGroup(keras.optimizers.SGD(1.0), model.trainable_variables)
    trainer = Trainer(model, [group], class_weights=of_classes, label_smoothing=0.1, **{kind: 1.0})
    kernel = new_kernel()
    model.set_weights([kernel])
    inputs, labels = INPUTS[:16].reshape([16, 2, 2, 2]), LABELS[:16]
    mixing = trainer._mixing(tf.constant(0, tf.int64), tf.constant(inputs))
    share = float(mixing.targets(tf.constant([1.0, 0.0]))[0])
    assert 0.01 < share < 0.99
    flat = np.asarray(mixing.inputs(tf.constant(inputs))).reshape([16, 8])

    def loss(kernel):
        log_p = tf.nn.log_softmax(flat @ kernel)
        smooth = 0.9 * tf.one_hot(labels, 2) + 0.05
        of_own = -tf.reduce_sum(smooth * log_p, -1) * of_classes[labels]
        of_other = -tf.reduce_sum(smooth[::-1] * log_p, -1) * of_classes[labels[::-1]]
        return tf.reduce_mean(share * of_own + (1 - share) * of_other)

    variable = tf.Variable(kernel)
    with tf.GradientTape() as tape:
        expected = loss(variable)
    assert trainer.train_step(inputs, labels)[0] == pytest.approx(float(expected), rel=1e-5)
    after = kernel - tape.gradient(expected, variable)
    np.testing.assert_allclose(weights(model)[0], after, rtol=1e-4, atol=1e-6)


def test_callback_changes_the_learning_rates_of_all_groups():
    model = new_model()
    layers = model.layers[-1], model.layers[0]
    groups = [
        ParameterGroup(keras.optimizers.SGD(rate), layer.trainable_variables)
        for rate, layer in zip((0.1, 0.01), layers, strict=True)
    ]
    trainer = Trainer(model, groups)
    at_checkpoints = []
    checkpoint = unittest.mock.Mock()
    checkpoint.save = lambda _: at_checkpoints.append(
        [float(group.optimizer.learning_rate) for group in groups]
    )
    plateau = keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1)
    validate = unittest.mock.Mock(return_value={"loss": 1.0})
    fit(trainer, 3, callbacks=[plateau], validate=validate, checkpoint=checkpoint)
    expected = [[0.1, 0.01], [0.05, 0.005], [0.025, 0.0025]]
    np.testing.assert_allclose(at_checkpoints, expected, rtol=1e-6)


def test_learning_rate_may_be_zero_for_a_while():
    model = new_model()
    groups = [
        ParameterGroup(keras.optimizers.SGD(rate), layer.trainable_variables)
        for rate, layer in ((0.1, model.layers[-1]), (0.01, model.layers[0]))
    ]
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.2 * epoch)
    fit(Trainer(model, groups), 2, callbacks=[schedule])
    rates = [float(group.optimizer.learning_rate) for group in groups]
    np.testing.assert_allclose(rates, [0.2, 0.02], rtol=1e-6)


def test_trainer_learns_and_counts_steps():
    trainer = new_trainer()
    before = weights(trainer.model)
    history = keras.callbacks.History()
    fit(trainer, epochs=60, callbacks=[history])
    assert (trainer.epoch, trainer.step) == (60, 240)
    assert history.history["accuracy"][-1] > 0.9
    assert history.history["loss"][-1] < history.history["loss"][0] / 2
    assert all((a != b).any() for a, b in zip(before, weights(trainer.model), strict=True))


def test_mean_loss_weights_partial_batch_by_size():
    trainer = new_trainer(rate=0.0)
    logs = trainer.train_epoch(batches(0), keras.callbacks.CallbackList())
    logits = trainer.model(INPUTS)
    expected = tf.nn.sparse_softmax_cross_entropy_with_logits(LABELS, logits).numpy().mean()
    assert logs["loss"] == pytest.approx(expected, rel=1e-5)
    assert logs["accuracy"] == pytest.approx((logits.numpy().argmax(-1) == LABELS).mean())


def test_validation_metrics_are_added_to_logs():
    history = keras.callbacks.History()
    fit(new_trainer(), epochs=2, callbacks=[history], validate=lambda: {"accuracy": 0.25})
    assert history.history["val_accuracy"] == [0.25, 0.25]


def test_callback_can_stop_training():
    stop = keras.callbacks.EarlyStopping("val_loss", patience=2)
    trainer = fit(new_trainer(), 50, callbacks=[stop], validate=lambda: {"loss": 1.0})
    assert trainer.epoch == 3


def test_checkpoint_is_complete_although_a_callback_fails_at_the_end():
    def fail(logs):
        raise ValueError("in a callback")

    checkpoint = unittest.mock.Mock()
    callbacks = [keras.callbacks.LambdaCallback(on_train_end=fail)]
    with pytest.raises(ValueError, match="in a callback"):
        fit(new_trainer(), 0, callbacks=callbacks, checkpoint=checkpoint)
    checkpoint.end.assert_called_once_with()


def test_variables_in_no_group_are_not_trained():
    model = new_model()
    before = weights(model)
    head = ParameterGroup(keras.optimizers.Adam(0.05), model.layers[-1].trainable_variables)
    fit(Trainer(model, [head]), epochs=2)
    after = weights(model)
    assert_same(before[:2], after[:2])
    assert (before[2] != after[2]).any()


def test_each_group_has_its_own_learning_rate():
    model = new_model()
    before = weights(model)
    groups = [
        ParameterGroup(keras.optimizers.SGD(rate), layer.trainable_variables)
        for rate, layer in ((0.1, model.layers[-1]), (0.0, model.layers[0]))
    ]
    fit(Trainer(model, groups), epochs=1)
    assert_same(before[:2], weights(model)[:2])
    assert (before[2] != weights(model)[2]).any()


def test_frozen_inputs_equal_precomputed_ones():
    prefix = keras.layers.Dense(8, "relu")
    prefix.build((None, 8))
    ours = fit(new_trainer(frozen=prefix), epochs=2)
    cached = new_trainer()
    cached.fit(
        lambda epoch, first: ((prefix(x), y) for x, y in batches(epoch, first)),
        epochs=2,
        steps_per_epoch=4,
    )
    assert_same(weights(ours.model), weights(cached.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_loss_names_step_and_learning_rate(value):
    def bad(epoch, first):
        for step, (inputs, labels) in enumerate(batches(epoch)):
            yield (inputs * value if step == 2 else inputs), labels

    linear = keras.Sequential([keras.Input([8]), keras.layers.Dense(2)])
    with pytest.raises(NonFiniteLossError, match=r"at step 3 \(epoch 1\) with learning rate 0.05"):
        new_trainer(linear).fit(bad, epochs=1, steps_per_epoch=4)


def test_epoch_seeds_differ():
    assert len({epoch_seed(seed, epoch) for seed in range(5) for epoch in range(20)}) == 100
