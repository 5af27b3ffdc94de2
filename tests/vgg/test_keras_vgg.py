"""Converted Keras models give Keras' outputs, or an error names the layer that prevents it."""

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from published_files import NUM_CLASSES, SMALL

from recipes.cli import main
from transfer import Backbone, load_meta_graph
from transfer.vgg.published import containers, layouts

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.normal(size=(2, 64, 64, 3)).astype(np.float32)


def vgg(between=None, *, top="flatten", first=None, fc=SMALL.fc, norm_dense=None, named=False):
    """A Keras model with a small VGG's convolutions.

    ``between`` gives the layers between a convolution (linear) and the next one, ``first`` is put
    before the first convolution.
    """
    between = between or (lambda: [keras.layers.ReLU()])
    layers = [keras.Input((64, 64, 3))] + ([first] if first is not None else [])
    for number, block in enumerate(SMALL.blocks, 1):
        for index, width in enumerate(block, 1):
            name = f"block{number}_conv{index}" if named else None
            layers.append(keras.layers.Conv2D(width, 3, padding="same", name=name))
            layers += between()
        layers.append(keras.layers.MaxPooling2D())
    if top == "flatten":
        layers.append(keras.layers.Flatten())
    elif top == "average":
        layers.append(keras.layers.GlobalAveragePooling2D())
    if top:
        for _ in range(2):
            if norm_dense:
                layers += [keras.layers.Dense(fc), *norm_dense(), keras.layers.ReLU()]
            else:
                layers.append(keras.layers.Dense(fc, activation="relu"))
        layers.append(keras.layers.Dense(NUM_CLASSES, activation="softmax"))
    model = keras.Sequential(layers)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([_values(layer, v) for v in layer.weights])
    return model


def _values(layer, variable):
    shape = tuple(variable.shape)
    if variable.path.endswith(("moving_variance", "gamma")):
        return GENERATOR.uniform(0.5, 2, shape)
    return GENERATOR.normal(size=shape)


def functional(model, name="vgg16"):
    """The same layers as a nested model."""
    base = keras.Model(model.inputs, model.layers[-5].output, name=name)
    net = inputs = keras.Input((64, 64, 3))
    net = base(net)
    for layer in model.layers[-4:]:
        net = layer(net)
    return keras.Model(inputs, net)


def save(model, path):
    (model.save_weights if path.name.endswith(".weights.h5") else model.save)(path)
    return path


def converted(path, out, *flags):
    assert main(["convert", str(path), "--out", str(out), *flags]) == 0
    return load_meta_graph(out)


def assert_same(graph, model, images=IMAGES):
    found = np.asarray(Backbone(graph, "prob")(images))
    np.testing.assert_allclose(found, model(images, training=False), atol=1e-4)


BN = keras.layers.BatchNormalization


@pytest.mark.slow_variants
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
@pytest.mark.parametrize("named", [True, False])
def test_batch_norm_before_relu_is_folded(tmp_path, suffix, named):
    epsilon = 1e-3 if suffix == ".weights.h5" else 0.3  # weight files do not contain it
    model = vgg(lambda: [BN(epsilon=epsilon), keras.layers.Activation("relu")], named=named)
    graph = converted(save(model, tmp_path / f"m{suffix}"), tmp_path / "vgg")
    assert_same(graph, model)


@pytest.mark.slow_variants
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("options", [{"scale": False}, {"center": False}])
def test_batch_norm_without_gamma_or_beta_is_folded(tmp_path, suffix, options):
    options = options | {"epsilon": 0.3}
    model = vgg(lambda: [BN(**options), keras.layers.ReLU()], norm_dense=lambda: [BN(**options)])
    assert_same(converted(save(model, tmp_path / f"m{suffix}"), tmp_path / "vgg"), model)


@pytest.mark.slow_variants
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_nested_model_is_read(tmp_path, suffix):
    model = functional(vgg(lambda: [BN(), keras.layers.ReLU()]))
    assert_same(converted(save(model, tmp_path / f"m{suffix}"), tmp_path / "vgg"), model)


@pytest.mark.slow_variants
@pytest.mark.parametrize("is_nested", [True, False])
def test_tensorflow_checkpoint_is_read(tmp_path, is_nested):
    """With its optimizer, which has shorter paths to the variables."""
    model = vgg(lambda: [BN(), keras.layers.ReLU()])
    model = functional(model) if is_nested else model
    optimizer = keras.optimizers.SGD(momentum=0.9)
    optimizer.build(model.trainable_variables)
    checkpoint = tf.train.Checkpoint(step=tf.Variable(1), optimizer=optimizer, net=model)
    checkpoint.write(str(tmp_path / "ckpt"))
    assert_same(converted(tmp_path / "ckpt", tmp_path / "vgg"), model)


@pytest.mark.slow_variants
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
@pytest.mark.parametrize(
    "between",
    [
        lambda: [keras.layers.ReLU(), BN()],
        lambda: [keras.layers.GroupNormalization(1), keras.layers.ReLU()],
        lambda: [keras.layers.LayerNormalization(), keras.layers.ReLU()],
    ],
    ids=["after ReLU", "group", "layer"],
)
def test_unfoldable_normalization_is_refused_by_name(tmp_path, capsys, suffix, between):
    model = vgg(between)
    for layer in model.layers:  # means of the output of a ReLU
        if isinstance(layer, BN):
            gamma, beta, mean, variance = layer.get_weights()
            layer.set_weights([gamma, beta, np.abs(mean), variance])
    path = save(model, tmp_path / f"m{suffix}")
    assert main(["convert", str(path), "--out", str(tmp_path / "vgg")]) == 1
    error = capsys.readouterr().err
    assert "normalization" in error, error
    assert not (tmp_path / "vgg.meta").exists()


def test_other_layers_are_refused_by_name(tmp_path, capsys):
    for first, between, message in (
        (BN(), None, "before its first convolution"),
        (None, lambda: [keras.layers.LeakyReLU()], "(LeakyReLU) stands after its convolution"),
        (None, lambda: [keras.layers.ReLU(6.0)], "(ReLU) stands after its convolution"),
    ):
        path = save(vgg(between, first=first), tmp_path / "m.keras")
        assert main(["convert", str(path), "--out", str(tmp_path / "vgg")]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_rescaling_layer_sets_preprocessing(tmp_path):
    for layer, expected in (
        (keras.layers.Rescaling(1 / 255), "unit"),
        (keras.layers.Rescaling(1 / 127.5, offset=-1), "tf"),
        (keras.layers.Rescaling(0.02, offset=-2), {"mean": [100.0], "std": [50.0], "order": "RGB"}),
    ):
        model = vgg(first=layer)
        out = tmp_path / f"vgg{layer.scale}"
        graph = converted(save(model, tmp_path / "m.keras"), out)
        assert graph.card.preprocess == expected
        pixels = GENERATOR.uniform(0, 255, (2, 64, 64, 3)).astype(np.float32)
        found = np.asarray(Backbone(graph, "prob")(graph.preprocess("images:0")(pixels)))
        np.testing.assert_allclose(found, model(pixels, training=False), atol=1e-4)


@pytest.mark.slow_variants
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_global_average_pooling_before_head_is_kept(tmp_path, suffix):
    model = vgg(top="average", fc=SMALL.blocks[-1][-1])
    graph = converted(save(model, tmp_path / f"m{suffix}"), tmp_path / "vgg")
    assert graph.card.image_size == SMALL.image_size
    assert_same(graph, model)


@pytest.mark.slow
def test_ambiguous_head_is_left_out_by_name(tmp_path, capsys):
    model = vgg(top="average", fc=SMALL.blocks[-1][-1])
    path = save(model, tmp_path / "m.weights.h5")
    assert_same(converted(path, tmp_path / "told"), model)
    with h5py.File(path, "a") as file:
        del file["layers/global_average_pooling2d"]  # older versions do not write it
    graph = converted(path, tmp_path / "vgg")
    assert "left out: dense, dense_1, dense_2" in capsys.readouterr().out
    assert (graph.card.tap, graph.card.outputs) == ("pool5:0", {})
    assert_same(converted(path, tmp_path / "kept", "--pooling", "average"), model)


def write_saved_model(model, folder, config=b""):
    """A SavedModel with the variables of ``model.export``, and the configuration that Keras 2 puts
    beside them."""
    values = [variable.value for variable in model.variables]
    tf.train.Checkpoint(variables=values).write(str(folder / "variables" / "variables"))
    (folder / "saved_model.pb").write_bytes(b"")
    if config:
        metadata = b'{"name": "m", "model_config": ' + config + b"}"
        node = field(2, b"") + field(3, b"root") + field(5, metadata)
        (folder / "keras_metadata.pb").write_bytes(field(1, node))


def field(number, data):
    """A field of a protocol buffer."""
    size, length = len(data), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


@pytest.mark.parametrize("has_config", [True, False])
def test_keras_model_in_a_saved_model_is_read(tmp_path, has_config):
    epsilon = 0.3 if has_config else 1e-3  # weights alone do not contain it
    model = vgg(lambda: [BN(epsilon=epsilon), keras.layers.ReLU()])
    config = b""
    if has_config:
        model.save(tmp_path / "m.h5")
        with h5py.File(tmp_path / "m.h5") as file:
            config = file.attrs["model_config"].encode()
        shape = b'{"class_name": "__tuple__", "items": [null, 64, 64, 3]}'
        assert b"[null, 64, 64, 3]" in config
        config = config.replace(b"[null, 64, 64, 3]", shape)
    write_saved_model(model, tmp_path / "saved", config)
    assert_same(converted(tmp_path / "saved", tmp_path / "vgg"), model)


def test_saved_model_without_keras_model_is_used_as_it_is(tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"")
    with pytest.raises(ValueError, match="is a SavedModel, which is used without conversion"):
        containers.read(tmp_path)
    tf.train.Checkpoint(a=tf.Variable(1.0)).write(str(tmp_path / "variables" / "variables"))
    with pytest.raises(ValueError, match="It has no Keras VGG"):
        containers.read(tmp_path)


@pytest.mark.slow
def test_head_of_kerashub_classifier_is_in_another_file(tmp_path):
    """Its 7x7 convolution takes the feature map of 2x2 pixels here, with a 2x2 kernel."""
    model = vgg(top=None)
    save(model, tmp_path / "model.weights.h5")
    (tmp_path / "config.json").write_text('{"registered_name": "keras_hub>VGGBackbone"}')
    net = model.outputs[0]
    layers = [
        keras.layers.Conv2D(SMALL.fc, net.shape[1], activation="relu"),
        keras.layers.Dropout(0.1),
        keras.layers.Conv2D(SMALL.fc, 1, activation="relu"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(NUM_CLASSES, activation="softmax"),
    ]
    head = keras.Sequential([keras.Input(net.shape[1:]), *layers])
    save(head, tmp_path / "head.weights.h5")
    with (
        h5py.File(tmp_path / "head.weights.h5") as source,
        h5py.File(tmp_path / "task.weights.h5", "w") as file,
    ):
        source.copy("layers", file.create_group("layers/sequential"))
    whole = keras.Sequential([*model.layers, *layers])
    assert_same(converted(tmp_path, tmp_path / "out" / "vgg"), whole)
    assert_same(converted(tmp_path / "task.weights.h5", tmp_path / "out" / "other"), whole)
    (tmp_path / "model.weights.h5").unlink()
    with pytest.raises(ValueError, match=r"without its base, model\.weights\.h5"):
        containers.read(tmp_path / "task.weights.h5")


def test_other_head_is_left_out_by_name(tmp_path, capsys):
    model = vgg(top=None)
    net = keras.layers.Conv2D(5, 1, name="mine")(model.outputs[0])
    net = keras.layers.GlobalMaxPooling2D()(net)
    path = save(keras.Model(model.inputs, net), tmp_path / "m.keras")
    graph = converted(path, tmp_path / "vgg")
    printed = capsys.readouterr().out
    assert "left out: mine" in printed and "it begins with mine (Conv2D)" in printed
    found = np.asarray(Backbone(graph, "pool5")(IMAGES))
    expected = np.asarray(model(IMAGES)).mean((1, 2))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_flipped_channels_are_those_of_bgr(tmp_path):
    """As ``to_keras`` and the ``keras`` export of this package reverse them."""
    base, inputs = vgg(top=None), keras.Input((64, 64, 3))
    for name, axis in (("bgr", -1), ("mirrored", 2)):
        net = keras.layers.Rescaling(1.0, [-1.0, -2.0, -3.0])(keras.ops.flip(inputs, axis))
        save(keras.Model(inputs, base(net)), tmp_path / f"{name}.keras")
    preprocess = layouts.identify(containers.read(tmp_path / "bgr.keras")).preprocess
    assert (preprocess["mean"], preprocess["order"]) == ([1, 2, 3], "BGR")
    with pytest.raises(ValueError, match=r"\(Flip\) stands before its first convolution"):
        layouts.identify(containers.read(tmp_path / "mirrored.keras"))


def test_kerashub_preset_sets_preprocessing(tmp_path):
    save(vgg(top=None), tmp_path / "model.weights.h5")
    (tmp_path / "config.json").write_text('{"registered_name": "keras_hub>VGGBackbone"}')
    found = containers.read(tmp_path / "model.weights.h5")
    graph = converted(tmp_path / "model.weights.h5", tmp_path / "vgg")
    assert graph.card.preprocess == "torch"
    assert layouts.identify(found).preprocess["std"] == [58.395, 57.12, 57.375]
    (tmp_path / "preprocessor.json").write_text(
        '{"config": {"image_converter": {"config": {"scale": [0.01, 0.02, 0.04], '
        '"offset": [-1, -1, -2]}}}}'
    )
    graph = converted(tmp_path / "model.weights.h5", tmp_path / "other")
    assert graph.card.preprocess == {"mean": [100, 50, 50], "std": [100, 50, 25], "order": "RGB"}
