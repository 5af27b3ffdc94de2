import keras
import numpy as np
import pytest
from conftest import NUM_CLASSES, TINY

from transfer import Backbone, Preprocess, load_meta_graph, save_meta_graph
from transfer.data.sources import open_source
from transfer.vgg import architectures, pretraining
from transfer.vgg.pretraining import DecodedImages


def trained_model():
    keras.utils.set_random_seed(0)
    model = pretraining.trainable_model(TINY, NUM_CLASSES, dropout=0.1)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    images = np.random.default_rng(0).random((64, 16, 16, 3), np.float32)
    model.fit(images, np.arange(64) % NUM_CLASSES, epochs=2, verbose=0)
    return model


def test_folded_model_equals_trained_model(tmp_path, images):
    model = trained_model()
    graph = architectures.build_graph(TINY, NUM_CLASSES)
    save_meta_graph(graph, tmp_path / "m", pretraining.folded(model))
    plain = Backbone(load_meta_graph(tmp_path / "m"), tap="fc8")
    np.testing.assert_allclose(plain(images), model(images, training=False), rtol=1e-4, atol=1e-5)


def test_halves_compose_to_model_and_share_weights(images):
    model = trained_model()
    convolutions, fully_connected = pretraining.halves(model)
    np.testing.assert_allclose(fully_connected(convolutions(images)), model(images), atol=1e-6)
    names = {v.path.split("/")[0] for v in fully_connected.trainable_variables}
    assert names == {"fc6", "fc6_norm", "fc7", "fc7_norm", "fc8"}


def test_new_fully_connected_layers_keep_the_convolutions(images):
    model = trained_model()
    new = pretraining.with_new_fully_connected(model, TINY)
    np.testing.assert_array_equal(
        pretraining.halves(new)[0](images), pretraining.halves(model)[0](images)
    )
    assert not np.allclose(new.get_layer("fc7").kernel, model.get_layer("fc7").kernel)
    assert new.output.shape == model.output.shape


def test_smaller_images_with_same_pooled_size_are_accepted(images):
    model = trained_model()
    assert model(images[:, :13, :13]).shape == model(images).shape


def test_fused_batch_norm_equals_keras():
    ours = pretraining.FusedBatchNormalization(momentum=0.5)
    theirs = keras.layers.BatchNormalization(momentum=0.5)
    for shape in ((8, 5, 5, 3), (8, 3)):
        inputs = np.random.default_rng(0).normal(2, 3, shape).astype(np.float32)
        for layer in (ours, theirs):
            layer.build(shape)
        np.testing.assert_allclose(
            ours(inputs, training=True), theirs(inputs, training=True), atol=1e-4
        )
        np.testing.assert_allclose(ours.moving_mean.numpy(), theirs.moving_mean.numpy(), rtol=1e-5)
        count = inputs.size // 3  # the fused operation uses the unbiased variance: n / (n - 1)
        np.testing.assert_allclose(
            ours.moving_variance.numpy() - 0.5,
            (theirs.moving_variance.numpy() - 0.5) * count / (count - 1),
            rtol=1e-4,
        )
        ours = pretraining.FusedBatchNormalization(momentum=0.5)
        theirs = keras.layers.BatchNormalization(momentum=0.5)


def test_learning_rate_warms_up_and_decays_to_zero():
    rate = pretraining.optimizer(0.1, 5e-4, steps_per_epoch=10, epochs=4)._learning_rate
    assert float(rate(0)) == 0
    assert float(rate(5)) == pytest.approx(0.1)
    assert float(rate(40)) == pytest.approx(0, abs=1e-6)


def test_weight_decay_applies_to_kernels_only():
    model = trained_model()
    sgd = pretraining.optimizer(0.1, 0.5, 10, 4)
    sgd.build(model.trainable_variables)
    decaying = [v for v in model.trainable_variables if sgd._use_weight_decay(v)]
    assert {variable.name for variable in decaying} == {"kernel"}


def test_decoded_images_equal_images_of_split(image_folder):
    split = open_source("", image_folder=str(image_folder)).split("train")
    preprocess = Preprocess("torch", 16)
    decoded = DecodedImages(split.batches(Preprocess("none", 16), 5), len(split), split.labels)
    kept = decoded.batches(preprocess, 7, seed=3, augment=False, first_batch=1)
    read = split.batches(preprocess, 7, shuffle_seed=3, first_batch=1)
    for (images, labels), (expected, expected_labels) in zip(kept, read, strict=True):
        np.testing.assert_array_equal(labels, expected_labels)
        # Cached as integers: half a gray level of 255, divided by a standard deviation of about
        # 0.22.
        np.testing.assert_allclose(images, expected, atol=0.5 / 255 / 0.22)


def test_views_of_decoded_images_depend_on_seed(image_folder):
    split = open_source("", image_folder=str(image_folder)).split("train")
    decoded = DecodedImages(split.batches(Preprocess("none", 16), 5), len(split), split.labels)

    def second_batch(seed: int, first_batch: int) -> np.ndarray:
        batches = decoded.batches(
            Preprocess("none", 16), 7, seed, augment=True, first_batch=first_batch
        )
        return list(batches)[1 - first_batch][0].numpy()

    np.testing.assert_array_equal(second_batch(3, 0), second_batch(3, 1))
    assert (second_batch(3, 0) != second_batch(4, 0)).any()
