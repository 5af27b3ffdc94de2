"""Decoding of all formats compared with Pillow and TensorFlow."""

import io
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import ExifTags, Image, ImageOps

from transfer.exports import decoding
from transfer.images.decoding import (
    _BY_PILLOW,
    _decoder,
    _pixels_of_gif,
    decode,
    read_image,
    read_tensor,
    suffixes,
)
from transfer.images.orientation import orientation, oriented

GENERATOR = np.random.default_rng(0)
PIXELS = GENERATOR.integers(0, 255, (12, 17, 3)).astype(np.uint8)
SMOOTH = np.broadcast_to(np.linspace(0, 255, 17, dtype=np.uint8)[None, :, None], (12, 17, 3))
SLOPE = SMOOTH // 2 + np.linspace(0, 127, 12, dtype=np.uint8)[:, None, None]


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def exif(code):
    found = Image.Exif()
    found[ExifTags.Base.Orientation] = code
    return found


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "JPEG"])
def test_tensorflow_formats_equal_decode_image(kind):
    data = encoded(Image.fromarray(PIXELS), kind)
    expected = tf.io.decode_image(data, channels=3, expand_animations=False)
    np.testing.assert_array_equal(read_image(data), expected)


@pytest.mark.parametrize(
    "kind, mode", [("PNG", "RGB"), ("TIFF", "RGB"), ("TIFF", "F"), ("PPM", "L")]
)
def test_tensors_equal_arrays_and_own_their_memory(kind, mode):
    data = encoded(Image.fromarray(PIXELS).convert(mode), kind)
    tensors = [read_tensor(data) for _ in range(20)]
    assert tensors[0].dtype == tf.uint8
    for tensor in tensors:
        np.testing.assert_array_equal(tensor, read_image(data))
        np.testing.assert_array_equal(tf.reverse(tensor, [0])[::-1], read_image(data))


def test_palette_of_bmp_is_applied():
    """TensorFlow alone returns palette indices."""
    image = Image.fromarray(SMOOTH).convert("P", palette=Image.Palette.ADAPTIVE, colors=60)
    data = encoded(image, "BMP")
    np.testing.assert_array_equal(decode(data), np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(read_image(data), decode(data))
    gray = Image.fromarray(SMOOTH[..., 0])
    np.testing.assert_array_equal(decode(encoded(gray, "BMP"))[..., 1], SMOOTH[..., 0])


@pytest.mark.parametrize("kind, mode", [("JPEG", "CMYK"), ("PNG", "I;16"), ("MPO", "RGB")])
def test_read_image_equals_decode_for_special_jpeg_and_png(kind, mode):
    gray = mode == "I;16"
    image = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257) if gray else None
    image = image or Image.fromarray(SLOPE).convert(mode)
    extra = {"append_images": [image], "save_all": True} if kind == "MPO" else {}
    data = encoded(image, kind, **extra)
    np.testing.assert_array_equal(read_image(data), decode(data))


@pytest.mark.parametrize("kind, options", [("WEBP", {"lossless": True}), ("TIFF", {})])
def test_other_formats_are_read_by_pillow(kind, options):
    np.testing.assert_array_equal(
        read_image(encoded(Image.fromarray(PIXELS), kind, **options)), PIXELS
    )


@pytest.mark.parametrize("code", range(1, 9))
def test_tiff_orientation_is_applied(code):
    data = encoded(Image.fromarray(SLOPE), "TIFF", exif=exif(code))
    with Image.open(io.BytesIO(data)) as tagged:
        upright = np.asarray(ImageOps.exif_transpose(tagged))
    np.testing.assert_array_equal(read_image(data), upright)
    np.testing.assert_array_equal(oriented(SLOPE, code), upright)


def test_orientation_is_applied_in_graph():
    data = [encoded(Image.fromarray(SMOOTH), "JPEG", exif=exif(code)) for code in (1, 6)]
    shapes = tf.data.Dataset.from_tensor_slices(data).map(decode).map(tf.shape)
    assert [shape.tolist() for shape in shapes.as_numpy_iterator()] == [[12, 17, 3], [17, 12, 3]]


@pytest.mark.parametrize("data", [
    b"",
    b"\xff\xe1",
    b"\xff\xd8\xff\xe1\0\x20Exif\0\0",
    b"\xff\xd8\xff\xe1\0\x20Exif\0\0II*\0\xff\xff\xff\xff",
    b"\xff\xd8\xff\xe1\0\x20Exif\0\0MM\0*\0\0\0\x08\xff\xff",
    b"\xff\xd8\xff\xe1\0\x20Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x09",
    bytes(4090) + b"\xff\xe1\0\x20Exif\0\0",
])  # fmt: skip
def test_missing_or_damaged_exif_means_upright(data):
    assert orientation(data) == 1


def test_gray_is_repeated_and_alpha_dropped():
    gray = PIXELS[..., 0]
    expected = np.repeat(gray[..., None], 3, -1)
    for image in (Image.fromarray(gray), Image.fromarray(gray).convert("LA")):
        np.testing.assert_array_equal(read_image(encoded(image, "PNG")), expected)
    alpha = Image.fromarray(np.dstack([PIXELS, gray]))
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(read_image(encoded(alpha, kind)), PIXELS)


def test_16_bit_images_are_reduced_to_8_bits():
    gray = SMOOTH[..., 0].astype(np.uint16) * 257
    for kind in ("PNG", "TIFF"):
        found = read_image(encoded(Image.fromarray(gray), kind))
        np.testing.assert_array_equal(found, SMOOTH)
    floats = Image.fromarray(SMOOTH[..., 0].astype(np.float32) / 255)
    assert np.abs(read_image(encoded(floats, "TIFF")).astype(int) - SMOOTH).max() <= 1


def test_cmyk_is_converted_to_rgb():
    image = Image.fromarray(np.array(SMOOTH)).convert("CMYK")
    found = read_image(encoded(image, "JPEG", quality=100))
    assert np.abs(found.astype(int) - SMOOTH).max() < 12


def test_palette_is_applied_and_first_frame_of_animation_is_used():
    image = Image.fromarray(PIXELS).quantize(64)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(read_image(encoded(image, "PNG")), expected)
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (10, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image(data).max() < 20


def test_frames_of_a_gif_count_as_pixels(monkeypatch):
    """TensorFlow would decode all of them, whatever the size of the image."""
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (10, 200, 90)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    expected = read_image(data)
    monkeypatch.setattr("transfer.images.decoding.MAX_PIXELS", 40)
    assert _pixels_of_gif(data) == 48
    assert _decoder(data) == _BY_PILLOW
    np.testing.assert_array_equal(read_image(data), expected)
    position = data.index(b"\x2c\0\0\0\0\4\0\4\0")
    huge = data[: position + 5] + b"\xff\xff\xff\xff" + data[position + 9 :]
    with pytest.raises(ValueError, match="pixels; expected at most 40|cannot be decoded"):
        read_image(huge)


def test_gray_floats_beyond_255_are_refused():
    values = np.linspace(0, 4000, 64, dtype=np.float32).reshape(8, 8)
    with pytest.raises(ValueError, match="up to 4000; expected 0 to 255, or 0 to 1 in floats"):
        read_image(encoded(Image.fromarray(values), "TIFF"))
    values = values / 4000
    values[0, 0] = np.nan
    assert read_image(encoded(Image.fromarray(values), "TIFF")).max() == 255


BROKEN = {
    "empty": (b"", "it is empty"),
    "text": (b"hello, world", "it is not an image: it begins with b'hello"),
    "half a JPEG": (encoded(Image.fromarray(PIXELS), "JPEG")[:300], "cannot be decoded"),
    "half a PNG": (encoded(Image.fromarray(PIXELS), "PNG")[:300], "cannot be decoded"),
    "half a TIFF": (encoded(Image.fromarray(PIXELS), "TIFF")[:300], "decoded|no image"),
    "half a WebP": (encoded(Image.fromarray(PIXELS), "WEBP")[:100], "decoded|no image"),
    "a header only": (encoded(Image.fromarray(PIXELS), "PNG")[:16], "decoded|no image"),
}


@pytest.mark.parametrize("data, message", BROKEN.values(), ids=BROKEN)
def test_damaged_files_raise_with_reason(data, message):
    with pytest.raises(ValueError, match=message):
        read_image(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_decompression_bomb_is_rejected(monkeypatch, kind):
    """Eagerly and in a pipeline."""
    monkeypatch.setattr("transfer.images.decoding.MAX_PIXELS", 100)
    data = encoded(Image.fromarray(PIXELS), kind)
    with pytest.raises(ValueError, match="1[27] x 1[27] pixels; expected at most 100"):
        read_image(data)
    with pytest.raises(tf.errors.InvalidArgumentError, match="expected at most 100"):
        list(tf.data.Dataset.from_tensors(data).map(decode))


def kinds_of_bmp():
    """Name to the bytes of a BMP that TensorFlow decodes wrongly or not at all."""
    rgb = Image.fromarray(PIXELS)
    out = {"1 bit": encoded(rgb.convert("1"), "BMP")}
    rows = PIXELS[::-1].astype(np.uint32)
    header = struct.pack("<IiiHHIIiiII", 40, 17, 12, 1, 32, 3, 0, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xFF000000, 0xFF0000, 0xFF00)  # the padding byte first
    pixels = (rows[..., 0] << 24 | rows[..., 1] << 16 | rows[..., 2] << 8).tobytes()
    start = 14 + len(header) + len(masks)
    head = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start)
    out["masks"] = head + header + masks + pixels
    return out


@pytest.mark.parametrize("name", kinds_of_bmp())
def test_bmp_unsupported_by_tensorflow_is_read_by_pillow(name):
    data = kinds_of_bmp()[name]
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    (found,) = tf.data.Dataset.from_tensors(data).map(decode)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(tf.errors.InvalidArgumentError, match="kind of BMP is not decoded here"):
        tf.function(decoding.decode)(tf.constant(data))


@pytest.mark.parametrize("kind", sorted({"WEBP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "QOI"}))
def test_decode_in_dataset_equals_read_image(kind):
    data = encoded(Image.fromarray(SLOPE), kind)
    (found,) = tf.data.Dataset.from_tensors(data).map(decode, num_parallel_calls=2)
    np.testing.assert_array_equal(found, read_image(data))
    assert np.abs(np.asarray(found).astype(int) - SLOPE).max() <= 30


def test_postscript_is_not_executed():
    data = encoded(Image.fromarray(PIXELS), "EPS")
    with pytest.raises(ValueError, match="it is not an image"):
        read_image(data)
    assert not suffixes() & {".eps", ".ps", ".pdf", ".wmf", ".mpg"}


def test_heic_error_names_package_to_install():
    if ".heic" in suffixes():
        pytest.skip("pillow-heif is installed")
    with pytest.raises(ValueError, match=r"it is HEIC, which needs .* 'vgg-transfer\[heif\]'"):
        read_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
