"""Decode image files of all supported formats to RGB pixels, with their EXIF orientation applied.

``decode`` is for ``tf.data`` pipelines, ``read_image`` for eager code; both return the same pixels.
JPEG, PNG, GIF and most BMP files are decoded by TensorFlow operations, all others by Pillow.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import struct
import threading
from collections.abc import Iterator
from typing import IO

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps, UnidentifiedImageError, features

from transfer.images.orientation import jpeg_segments, orientation, oriented

if importlib.util.find_spec("pillow_heif"):
    import pillow_heif

    pillow_heif.register_heif_opener()

KINDS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".mpo",),  # a JPEG followed by further images
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "TGA": (".tga",),
    "PCX": (".pcx",),
    "QOI": (".qoi",),
    "SGI": (".sgi",),
    "SUN": (".ras",),
    "DDS": (".dds",),
    "PSD": (".psd",),
    "ICO": (".ico",),
}
"""Supported formats, by Pillow's names, and their suffixes. Not supported are formats whose
decoding runs another program (EPS, WMF) or that are not only images (PDF, MPEG, HDF5)."""

MAX_PIXELS = 2**28
"""Maximum number of pixels of an image; a larger one is treated as a decompression bomb."""
MAX_BYTES = 2**30
"""Maximum size of an image file."""

_NEEDS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # features of the Pillow build
_HEIF = "needs pillow-heif: pip install 'vgg-transfer[heif]'"
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_JPEG_XL = (b"\xff\x0a", b"\0\0\0\x0cJXL ")  # decoded by some versions of TensorFlow
_BY_PILLOW = 0
_STRIP = 512  # rows
_ALIGNMENT = 64  # bytes
_opening = threading.Lock()


def suffixes() -> frozenset[str]:
    """Suffixes of the formats supported by this installation, in lower case."""
    return frozenset(s for kind, names in KINDS.items() if _is_known(kind) for s in names)


def why_not(suffix: str) -> str:
    """The reason why files with this suffix, which is not in ``suffixes()``, are not read."""
    for kind, names in KINDS.items():
        if suffix.lower() in names:
            return _HEIF if kind == "HEIF" else f"Pillow was built without {kind} here"
    return "not a supported image format"


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decode an image file of any supported format, eagerly or in a graph of this process.

    Args:
        encoded: string ``[]``, the bytes of the file.

    Returns:
        uint8 RGB ``[height, width, 3]``, with the EXIF orientation applied. If the file has several
        images, the first one. Alpha is dropped, gray is repeated, 16 bits are reduced to 8.

    Raises:
        tf.errors.InvalidArgumentError: in a graph, if the file is not an image, is damaged or too
            large.
        ValueError: the same in eager execution, with the reason.
    """
    if tf.executing_eagerly():
        return read_tensor(tf.convert_to_tensor(encoded).numpy())
    return _decode_in_graph(encoded)


@tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
def _decode_in_graph(encoded: tf.Tensor) -> tf.Tensor:
    """``decode``, traced once and not for each pipeline."""
    code = tf.numpy_function(_decoder, [encoded], tf.int32, stateful=False)
    code.set_shape([])
    return _as_image(
        tf.cond(
            tf.equal(code, _BY_PILLOW),
            lambda: tf.numpy_function(_with_pillow, [encoded], tf.uint8, stateful=False),
            lambda: _with_tensorflow(encoded, code),
        )
    )


def read_image(data: bytes) -> np.ndarray:
    """Decode the bytes of an image file like ``decode``: uint8 RGB ``[height, width, 3]``.

    Raises:
        ValueError: if it is not an image, or is damaged, truncated or too large; with the reason.
    """
    return np.asarray(memoryview(read_tensor(data)))


def read_tensor(data: bytes, max_pixels: int | None = None) -> tf.Tensor:
    """``read_image`` as a tensor, without the two copies of converting an array to a tensor.

    An image of more than ``max_pixels``, by default ``MAX_PIXELS``, is refused before its pixels
    are decoded.
    """
    if not data:
        raise ValueError("it is empty")
    code = _decoder(data, max_pixels)
    if code == _BY_PILLOW:
        return tf.experimental.dlpack.from_dlpack(_with_pillow(data, max_pixels).__dlpack__())
    try:
        # Eagerly, so that an error states the cause and not a position in a graph.
        return _with_tensorflow.python_function(tf.constant(data), tf.constant(code))
    except tf.errors.OpError as error:
        raise ValueError(f"it cannot be decoded ({reason(error)})") from error


def is_for_tensorflow(data: bytes) -> bool:
    """Whether a file is decoded by TensorFlow operations, as an exported graph does."""
    return bool(_decoder(data) != _BY_PILLOW)


def reason(error: BaseException) -> str:
    """The message of a TensorFlow or Pillow error, without the position in the graph."""
    text = " ".join(str(getattr(error, "message", error)).split())
    text = re.sub(r"^\{\{.*?\}\} | \[Op:.*$|\[\[\{\{node .*$", "", text)
    return text.strip()[:200]


def num_pixels(file: IO[bytes]) -> int:
    """Width times height according to the file header; 0 if unknown."""
    try:
        with _opened(file) as image:
            return image.width * image.height
    except Exception:  # Pillow raises arbitrary exceptions on damaged files
        return 0


@tf.function(
    input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int32)], autograph=False
)
def _with_tensorflow(encoded: tf.Tensor, code: tf.Tensor) -> tf.Tensor:
    image = decode_as_stored(encoded)
    return tf.cond(code > 1, lambda: oriented(image, code), lambda: image)


def decode_as_stored(encoded: tf.Tensor) -> tf.Tensor:
    """Decode with TensorFlow, ignoring the orientation: uint8 RGB ``[height, width, 3]``."""
    image = _as_image(tf.io.decode_image(encoded, channels=3, expand_animations=False))
    is_bmp = tf.equal(tf.strings.substr(encoded, 0, 2), b"BM")
    return tf.cond(is_bmp, lambda: _with_palette(encoded, image), lambda: image)


def _as_image(pixels: tf.Tensor) -> tf.Tensor:
    pixels.set_shape([None, None, 3])
    return pixels


def _with_palette(encoded: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
    """Apply the palette of an 8-bit BMP, which TensorFlow decodes as gray; others are unchanged.

    Source of the layout: BITMAPINFOHEADER in Microsoft's documentation of Windows GDI.
    """

    def number(position: int, kind: tf.DType) -> tf.Tensor:
        data = tf.strings.substr(encoded, position, kind.size)
        return tf.cast(tf.io.decode_raw(data, kind)[0], tf.int32)

    def coloured() -> tf.Tensor:
        count = number(46, tf.int32)
        count = tf.where(count == 0, 256, count)
        data = tf.strings.substr(encoded, 14 + number(14, tf.int32), 4 * count)
        palette = tf.reshape(tf.io.decode_raw(data, tf.uint8), [-1, 4])[:, 2::-1]  # from BGR
        return tf.gather(palette, tf.cast(image[..., 0], tf.int32))

    return tf.cond(number(28, tf.uint16) == 8, coloured, lambda: image)


def _decoder(data: bytes, max_pixels: int | None = None) -> np.int32:
    """The orientation, 1 to 8, if TensorFlow decodes the file, else ``_BY_PILLOW``.

    Raises:
        ValueError: if the image is too large.
    """
    code, size = 1, None
    if data.startswith(b"\xff\xd8\xff"):
        code, size = orientation(data), _size_of_jpeg(data)
        if size is None:
            code = _BY_PILLOW  # libjpeg skips what is between segments, and would take any size
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        code, size = orientation(data), _unpacked(">II", data, 16)
    elif data.startswith(b"GIF8"):
        size = _unpacked("<HH", data, 6)
        if _pixels_of_gif(data) > (MAX_PIXELS if max_pixels is None else max_pixels):
            code = _BY_PILLOW  # TensorFlow decodes all frames, Pillow the first
    elif data.startswith(b"BM") and _is_plain_bmp(data):
        size = _unpacked("<ii", data, 18)
    elif not data.startswith(_JPEG_XL):
        code = _BY_PILLOW
    if size is not None:
        width, height = size
        _check_size(width, height, max_pixels)
    elif code != _BY_PILLOW and max_pixels is not None:
        raise ValueError("its size cannot be read")
    return np.int32(code)


def _size_of_jpeg(data: bytes) -> tuple[int, ...] | None:
    """Height and width from the start-of-frame segment."""
    for marker, start, _ in jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame (SOF)
            return _unpacked(">HH", data, start + 1)
    return None


def _pixels_of_gif(data: bytes) -> int:
    """Pixels of all frames of a GIF, up to where it is damaged. Frames have sizes of their own,
    which may be larger than that of the image.

    Source of the layout: GIF89a specification, sections 18 to 26.
    """

    def table(flags: int) -> int:  # bytes of a colour table
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    total, position = 0, 13 + table(data[10] if len(data) > 10 else 0)
    while position < len(data) and data[position] in b"\x21\x2c":
        if data[position] == 0x2C:  # a frame
            found = _unpacked("<HHB", data, position + 5)
            if found is None:
                break
            total += found[0] * found[1]
            position += 11 + table(found[2])
        else:  # an extension
            position += 2
        while position < len(data) and data[position]:  # its blocks
            position += 1 + data[position]
        position += 1
    return total


def _is_plain_bmp(data: bytes) -> bool:
    """Whether TensorFlow decodes a BMP correctly: uncompressed, with the usual channel order."""
    header = _unpacked("<I", data, 14)
    depth, compression = _unpacked("<H", data, 28), _unpacked("<I", data, 30)
    return (
        header is not None
        and header[0] >= 40
        and compression == (0,)
        and depth in ((8,), (24,), (32,))
    )


def _unpacked(form: str, data: bytes, position: int) -> tuple[int, ...] | None:
    try:
        return struct.unpack_from(form, data, position)
    except struct.error:  # the file is truncated
        return None


def _check_size(width: int, height: int, max_pixels: int | None) -> None:
    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    if abs(width * height) > max_pixels:
        raise ValueError(
            f"it has {abs(width)} x {abs(height)} pixels; expected at most {max_pixels:,} in all"
        )


def _with_pillow(data: bytes, max_pixels: int | None = None) -> np.ndarray:
    """Decode with Pillow: uint8 RGB ``[height, width, 3]``.

    Raises:
        ValueError: see ``read_image``.
    """
    try:
        with _opened(io.BytesIO(data)) as image:
            _check_size(image.width, image.height, max_pixels)
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except ValueError:
        raise
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
            raise ValueError(f"it is HEIC, which {_HEIF}") from None
        raise ValueError(f"it is not an image: it begins with {data[:8]!r}") from None
    except Exception as error:  # Pillow raises arbitrary exceptions on damaged files
        raise ValueError(f"it cannot be decoded ({reason(error)})") from error


def from_pillow(image: Image.Image) -> np.ndarray:
    """An image of Pillow like one that ``read_image`` decodes: upright, uint8 RGB ``[height, width,
    3]``."""
    return _rgb(ImageOps.exif_transpose(image))


@contextlib.contextmanager
def _opened(file: IO[bytes]) -> Iterator[Image.Image]:
    """Open an image of any size with Pillow, which reads only the header here, not the pixels."""
    # Pillow's own limit is a module variable, and warns at a third of ours.
    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file, formats=[kind for kind in KINDS if _is_known(kind)])
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        yield image


def _is_known(kind: str) -> bool:
    """Whether this installation of Pillow decodes a format."""
    Image.init()
    return kind in Image.OPEN and (kind not in _NEEDS or bool(features.check(_NEEDS[kind])))


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits of gray
        values = np.asarray(image, np.float64)
        largest = np.nanmax(values, initial=0)
        top = 65535 if image.mode.startswith("I") else 1 if largest <= 1 else 255
        if largest > top:
            raise ValueError(
                f"its pixels are up to {largest:.6g}; expected 0 to {top:,}, or 0 to 1 in floats"
            )
        gray = np.clip(np.nan_to_num(values) * (255 / top), 0, 255).round().astype(np.uint8)
        pixels = _aligned(*gray.shape)
        pixels[:] = gray[..., None]
        return pixels
    pixels = _aligned(image.height, image.width)
    # In strips, so that a large image is not in memory three times.
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        if strip.mode in ("LA", "PA", "La", "RGBa"):
            strip = strip.convert("RGBA")
        pixels[top : top + _STRIP] = np.asarray(strip.convert("RGB"))
    return pixels


def _aligned(height: int, width: int) -> np.ndarray:
    """Uninitialized uint8 ``[height, width, 3]``, aligned as TensorFlow operations require."""
    size = height * width * 3
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].reshape(height, width, 3)
