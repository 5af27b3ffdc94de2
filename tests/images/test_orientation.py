"""Orientation of rotated images compared with Pillow's ``exif_transpose``."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, features

from transfer.exports import decoding as graph_decoding
from transfer.images import decoding
from transfer.images.orientation import orientation

SLOPE = np.linspace(0, 127, 17, dtype=np.uint8)[None, :, None] + np.linspace(
    0, 120, 12, dtype=np.uint8
)[:, None, None].repeat(3, -1)
KINDS = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    **({"AVIF": {"quality": 100, "subsampling": "4:4:4"}} if features.check("avif") else {}),
}


def encoded(kind, image=SLOPE, **options):
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **KINDS[kind], **options)
    return out.getvalue()


def exif(code, order="<"):
    tags = Image.Exif()
    tags[ExifTags.Base.Make], tags[ExifTags.Base.Orientation] = "a camera", code
    tags.endian = order
    return tags.tobytes()


def png_with(*chunks, after=False):
    """A PNG with additional chunks, before or after its pixels."""
    data = encoded("PNG")
    more = b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    place = len(data) - 12 if after else 33
    return data[:place] + more + data[place:]


def xmp(code, *, is_tag=False):
    text = (
        f"<tiff:Orientation>{code}</tiff:Orientation>" if is_tag else f'tiff:Orientation="{code}"'
    )
    return f"<x:xmpmeta>{text}</x:xmpmeta>".encode()


def profile(code):
    """EXIF in a text chunk, as written by ImageMagick."""
    digits = exif(code).hex()
    lines = [digits[i : i + 72] for i in range(0, len(digits), 72)]
    return "\n".join(["", "exif", f"{len(digits) // 2:8}", *lines, ""])


def png_text(keyword, text, **options):
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "a program")
    (info.add_itxt if options.pop("international", False) else info.add_text)(
        keyword, text, **options
    )
    return encoded("PNG", pnginfo=info)


def odd_files(code):
    """Metadata at unusual places, by name."""
    keyword = "XML:com.adobe.xmp"
    tags = exif(code, ">")
    return {
        "big-endian JPEG": encoded("JPEG", exif=tags),
        "big-endian PNG": encoded("PNG", exif=tags),
        "JPEG after a large profile": _behind(encoded("JPEG", exif=tags)),
        "JPEG with XMP": encoded("JPEG", xmp=xmp(code)),
        "JPEG with an XMP tag": encoded("JPEG", xmp=xmp(code, is_tag=True)),
        "EXIF goes before XMP": encoded("JPEG", exif=tags, xmp=xmp(code % 8 + 1)),
        "WebP with XMP": encoded("WEBP", xmp=xmp(code)),
        "PNG with XMP": png_text(keyword, xmp(code).decode(), international=True),
        "PNG with packed XMP": png_text(
            keyword, xmp(code).decode(), international=True, lang="en", tkey="it", zip=True
        ),
        "PNG by ImageMagick": png_text("Raw profile type exif", profile(code)),
        "PNG by ImageMagick, packed": png_text("Raw profile type exif", profile(code), zip=True),
        "PNG with EXIF at its end": png_with((b"eXIf", tags[6:]), after=True),
        "PNG with two": png_with((b"eXIf", exif(code % 8 + 1)[6:]), (b"eXIf", tags[6:])),
        "a number of 32 bits": png_with((b"eXIf", _entry(4, 1, struct.pack(">I", code)))),
        "two numbers": png_with((b"eXIf", _entry(3, 2, struct.pack(">HH", code, code)))),
    }


def _behind(jpeg):
    """The metadata of a JPEG after 70,000 bytes of a colour profile."""
    segment = b"\xff\xe2" + struct.pack(">H", 35_002) + bytes(35_000)
    return jpeg[:2] + 2 * segment + jpeg[2:]


def _entry(kind, count, value):
    return b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHI", 0x0112, kind, count) + value + bytes(4)


def upright(data):
    """Pillow's result, without its warnings about invalid metadata."""
    with Image.open(io.BytesIO(data)) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def close(found, expected):
    """JPEG decoders differ by a few levels; other orientations differ by a hundred."""
    found = np.asarray(found)
    return found.shape == expected.shape and np.abs(found.astype(int) - expected).max() <= 8


exported = tf.function(
    graph_decoding.decode, input_signature=[tf.TensorSpec([], tf.string)], autograph=False
)


@pytest.mark.parametrize("kind", KINDS)
def test_all_decoders_apply_orientation_like_pillow(kind):
    files = [encoded(kind, exif=exif(code)) for code in range(1, 9)]
    in_pipeline = list(tf.data.Dataset.from_tensor_slices(files).map(decoding.decode))
    for code, (data, found) in enumerate(zip(files, in_pipeline, strict=True), 1):
        expected = upright(data)
        assert expected.shape == ((12, 17, 3) if code < 5 else (17, 12, 3))
        assert close(found, expected), code
        np.testing.assert_array_equal(decoding.read_image(data), found)
        np.testing.assert_array_equal(decoding.decode(tf.constant(data)), found)
        if kind in ("JPEG", "PNG", "WEBP"):
            np.testing.assert_array_equal(exported(data), found)
        else:
            with pytest.raises(tf.errors.InvalidArgumentError, match="Unknown image file format"):
                exported(data)


@pytest.mark.parametrize("name", odd_files(1))
def test_unusual_metadata_is_read_like_pillow(name):
    for code in (1, 3, 6):
        data = odd_files(code)[name]
        expected = upright(data)
        assert close(decoding.read_image(data), expected)
        assert close(exported(data), expected)


def test_damaged_metadata_is_read_equally_in_graph_and_python():
    generator = np.random.default_rng(0)
    in_graph = tf.function(
        graph_decoding.orientation, input_signature=[tf.TensorSpec([], tf.string)], autograph=False
    )
    # The two parsers read damaged PNG text chunks differently.
    texts = ("packed", "ImageMagick", "PNG with XMP")
    whole = [data for name, data in odd_files(6).items() if not any(t in name for t in texts)]
    for number in range(400):
        data = bytearray(whole[number % len(whole)])
        for _ in range(generator.integers(1, 5)):
            data[generator.integers(2, min(len(data), 500))] = generator.integers(0, 256)
        data = bytes(data[: generator.integers(2, len(data))] if number % 3 == 0 else data)
        if data.startswith((b"\xff\xd8", b"\x89PNG")):
            assert in_graph(data) == orientation(data), number
