"""Image files prepared without TensorFlow are like those that the model was trained on."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from transfer import Preprocess
from transfer.exports.preparing import prepare
from transfer.images.decoding import read_image
from transfer.images.preprocess import to_channels

SIZES = [16, 64, (30, 20)]


def photo(kind):
    """Smooth, larger in one direction; a PNG or JPEG file."""
    generator = np.random.default_rng(0)
    if kind == "16 bits":
        image = Image.fromarray(generator.integers(0, 2**16, (31, 50)).astype(np.uint16))
    else:
        pixels = generator.integers(0, 256, (8, 9, 4)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((50, 31), Image.Resampling.BICUBIC)
        image = image.convert("RGB" if kind in ("JPEG", "P") else kind)
        image = image.quantize(16) if kind == "P" else image
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    image.save(file, "JPEG" if kind == "JPEG" else "PNG", exif=tags)
    return file


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("kind", ["RGB", "RGBA", "LA", "L", "P", "16 bits", "JPEG"])
def test_prepared_file_is_the_resized_image(kind, channels, size):
    file, preprocess = photo(kind), Preprocess("unit", size, channels)
    expected = preprocess.resize(to_channels(read_image(file.getvalue()), channels))
    found = prepare(file, preprocess.height, preprocess.width, gray=channels == 1)
    assert found.dtype == np.float32 and found.shape == (1, *preprocess.shape)
    # The two decode JPEGs and round gray values differently.
    tolerance = 6.0 if kind == "JPEG" else 1.01 if channels == 1 else 0.01
    np.testing.assert_allclose(found[0], expected, atol=tolerance)
