import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.applications.imagenet_utils import preprocess_input
from PIL import Image

from transfer.images import preprocess
from transfer.images.preprocess import CONVENTIONS, Preprocess, for_card, to_channels

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 3)).astype(np.uint8)


@pytest.mark.parametrize("mode", ["caffe", "torch", "tf"])
def test_normalize_equals_keras_applications(mode):
    expected = preprocess_input(IMAGES.astype(np.float32), mode=mode)
    np.testing.assert_allclose(Preprocess(mode, 9).normalize(IMAGES), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("mode", "red"),  # of a pure red pixel: computed by hand
    [
        ("caffe", (-103.939, -116.779, 131.32)),
        ("slim", (131.32, -116.78, -103.94)),
        ("unit", (1, 0, 0)),
        ("none", (255, 0, 0)),
    ],
)
def test_normalize_by_hand(mode, red):
    pixel = np.array([[[255, 0, 0]]], np.uint8)
    np.testing.assert_allclose(Preprocess(mode, 1)(pixel)[0, 0], red, atol=1e-4)


def test_custom_means_by_hand():
    mode = {"mean": [93.594, 104.7624, 129.1863], "order": "BGR"}
    pixel = np.array([[[255, 0, 0]]], np.uint8)
    for written in (mode, json.dumps(mode)):
        found = Preprocess(written, 1)(pixel)[0, 0]
        np.testing.assert_allclose(found, (-93.594, -104.7624, 125.8137), atol=1e-4)
    scaled = {"mean": [10, 20, 30], "std": [2, 4, 5]}
    np.testing.assert_allclose(Preprocess(scaled, 1)(pixel)[0, 0], (122.5, -5, -6), atol=1e-4)
    gray = Preprocess({"mean": 100, "std": 50}, 1, channels=1)
    np.testing.assert_allclose(gray(np.full((1, 1, 1), 200, np.uint8)), [[[2]]], atol=1e-5)


@pytest.mark.parametrize("mode", CONVENTIONS)
def test_named_convention_written_out_is_the_same(mode):
    known = CONVENTIONS[mode]
    written = {
        "mean": list(known.mean),
        "std": list(known.scale),
        "order": "BGR" if known.bgr else "RGB",
    }
    assert Preprocess(written, 8).mode == Preprocess(json.dumps(written), 8).mode == mode
    assert for_card(written) == mode


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ({"mean": [1, 2]}, "mean .1, 2.; expected one number, or one a channel"),
        ({"mean": [1, 2, float("nan")]}, "expected one number, or one a channel"),
        ({"mean": [1, 2, 3], "std": [0, 1, 1]}, "expected numbers above 0"),
        ({"mean": [1, 2, 3], "order": "GBR"}, "expected RGB or BGR"),
        ({"means": [1, 2, 3]}, "has 'means'; expected 'mean'"),
        ('{"mean": [1, 2', "is not JSON"),
        ("[1, 2, 3]", "is not known; choose from"),
    ],
)
def test_invalid_means_are_rejected(mode, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(mode, 8)


@pytest.mark.parametrize("mode", CONVENTIONS)
def test_single_image_batch_and_dataset_agree(mode):
    preprocess = Preprocess(mode, 6)
    batch = preprocess(tf.constant(IMAGES))
    assert (batch.shape, batch.dtype) == ((2, 6, 6, 3), tf.float32)
    np.testing.assert_allclose(preprocess(tf.constant(IMAGES[0])), batch[0], atol=1e-5)
    dataset = tf.data.Dataset.from_tensor_slices(IMAGES).map(preprocess)
    np.testing.assert_allclose(np.stack(list(dataset)), batch, atol=1e-5)


@pytest.mark.parametrize("shape", [(10, 30), (30, 10), (3, 9), (17, 23)])
def test_the_centre_is_cropped_and_the_aspect_ratio_kept(shape):
    """A centered square in a black border stays square and centered."""
    height, width = shape
    image = np.zeros((height, width, 1), np.uint8)
    side = min(shape)
    top, left = (height - side) // 2, (width - side) // 2
    image[top : top + side, left : left + side] = 200
    result = Preprocess("none", 8)(image).numpy()
    assert result.shape == (8, 8, 3)
    assert result[1:-1, 1:-1].min() > 199


def test_long_thin_image_is_not_enlarged_as_a_whole():
    image = np.zeros((1, 2**20, 3), np.uint8)
    image[:, 2**19 - 8 :] = 200
    result = Preprocess("none", 16)(image).numpy()  # as a whole it would take 3 GB
    assert result.shape == (16, 16, 3)
    assert result.max() > 190


def test_resize_equals_pillow():
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(Preprocess("none", 16)(image), expected, atol=1.0)  # it rounds


@pytest.mark.parametrize(("given", "wanted"), [(1, 3), (3, 3), (4, 3), (3, 1), (4, 1), (1, 1)])
def test_channels_are_converted(given, wanted):
    image = np.full((5, 5, given), 100, np.uint8)
    result = Preprocess("none", 5, wanted)(image)
    assert result.shape == (5, 5, wanted)
    np.testing.assert_allclose(result, 100, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vgg", 8), "preprocess='vgg' is not known; choose from: caffe, slim"),
        (("tf", 0), "1 to 16,384 pixels, got 0"),
        (("tf", 8, 2), "channels must be 1 or 3, got 2"),
        (("caffe", 8, 1), "'caffe' is for colour images but the network takes gray ones"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(*arguments)


def test_images_with_two_channels_are_rejected():
    with pytest.raises(ValueError, match="images have 2 channels"):
        Preprocess("tf", 8)(np.zeros((4, 4, 2)))


@pytest.mark.parametrize("shape", [(40, 200), (300, 90), (100, 100), (7, 9)])
@pytest.mark.parametrize("size", [(20, 50), (50, 20)])
def test_rectangular_size_is_covered_and_center_cropped(shape, size):
    """Compared with Pillow: resized to cover the size, then center-cropped."""
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3)).astype(np.uint8)
    found = Preprocess("none", size)(image)
    assert found.shape == (*size, 3)
    scale = max(size[0] / shape[0], size[1] / shape[1])
    height, width = (round(side * scale) for side in shape)
    channels = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    resized = np.stack(
        [c.resize((width, height), Image.Resampling.BILINEAR) for c in channels], axis=-1
    )
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    expected = resized[top : top + size[0], left : left + size[1]]
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_size_as_one_number_equals_two_equal_numbers():
    settings = [Preprocess("none", size).settings() for size in ((9, 9), [9, 9], 9)]
    assert settings[0] == settings[1] == settings[2]
    assert Preprocess("none", [2, 3]).shape == (2, 3, 3)
    for size in ((0, 3), (1, 2, 3), (1.5, 2)):
        with pytest.raises(ValueError, match="image size"):
            Preprocess("none", size)


@pytest.mark.parametrize("height", [255, 256, 600])
def test_large_image_is_converted_to_gray_like_small_one(height, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (height, 37, 3)).astype(np.uint8)
    expected = to_channels(image, 1)
    monkeypatch.setattr(preprocess, "_LARGE", 0)
    found = tf.function(
        lambda image: to_channels(image, 1),
        input_signature=[tf.TensorSpec([None, None, 3], tf.uint8)],
        autograph=False,
    )(image)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(to_channels(image, 1), expected)


PHOTOS = np.random.default_rng(1).integers(0, 256, (3, 20, 30, 3)).astype(np.uint8)


def test_arrays_tensors_keras_models_pillow_images_and_paths_give_the_same(tmp_path):
    layer = Preprocess("caffe", 16)
    expected = layer(PHOTOS).numpy()
    np.testing.assert_array_equal(layer(tf.constant(PHOTOS)), expected)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, photo in zip(paths, PHOTOS, strict=True):
        Image.fromarray(photo).save(path)
    np.testing.assert_array_equal(layer(paths), expected)
    np.testing.assert_array_equal(layer([str(path) for path in paths]), expected)
    np.testing.assert_array_equal(layer(paths[0]), expected[0])
    np.testing.assert_array_equal(layer([Image.fromarray(photo) for photo in PHOTOS]), expected)
    np.testing.assert_array_equal(layer(Image.fromarray(PHOTOS[1])), expected[1])
    model = keras.Sequential([keras.Input((None, None, 3), dtype="uint8"), layer])
    assert model.output_shape == (None, 16, 16, 3)
    np.testing.assert_allclose(model(PHOTOS), expected, atol=1e-4)


def test_model_with_preprocessing_is_saved_and_loaded(tmp_path):
    layer = Preprocess({"mean": [10, 20, 30], "std": [2, 4, 5]}, (16, 8))
    keras.Sequential([keras.Input((None, None, 3)), layer]).save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    found = loaded.layers[0]
    assert type(found) is Preprocess
    assert (found.mode, found.size, found.channels) == (layer.mode, (16, 8), 3)
    floats = PHOTOS.astype(np.float32)
    np.testing.assert_array_equal(loaded(floats), layer(floats))


def test_uint8_images_keep_their_type_until_they_are_resized():
    layer = Preprocess("none", 16, channels=1)
    expected = layer.normalize(layer.resize(to_channels(PHOTOS, 1)))
    np.testing.assert_array_equal(layer(PHOTOS), expected)


def test_gradients_reach_the_images():
    image = tf.Variable(PHOTOS.astype(np.float32))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(Preprocess("torch", 16)(image) ** 2)
    assert np.abs(tape.gradient(loss, image)).max() > 0


def test_upright_pixels_of_a_rotated_pillow_image(tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(PHOTOS[0]).save(tmp_path / "photo.png", exif=tags)
    with Image.open(tmp_path / "photo.png") as image:
        found = Preprocess("none", 16)(image)
    np.testing.assert_array_equal(found, Preprocess("none", 16)(tmp_path / "photo.png"))
    assert not np.array_equal(found, Preprocess("none", 16)(PHOTOS[0]))


def test_file_that_is_not_an_image_is_named(tmp_path):
    (tmp_path / "photo.png").write_text("no image")
    with pytest.raises(ValueError, match=r"photo.png': it is not an image"):
        Preprocess("none", 16)(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="images have 2 channels"):
        Preprocess("none", 16)(keras.Input((8, 8, 2)))
