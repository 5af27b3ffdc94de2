"""Image files of any kind to pixels, the right way up.

``decode`` is for pipelines of ``tf.data``, ``read_image`` for programs; they give the same pixels.
JPEG, PNG, GIF and most BMP files are decoded by TensorFlow's operations, all others by Pillow.
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
    "MPO": (".mpo",),  # a JPEG with more pictures behind it
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
"""Pillow's names of the kinds of files that are read, and their suffixes. Those are left out whose
decoding runs another program (EPS, WMF) or that hold more than pictures (PDF, MPEG, HDF5)."""

MAX_PIXELS = 2**28
"""Of one image; what has more is taken for a decompression bomb."""
MAX_BYTES = 2**30
"""Of one file."""

_NEEDS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # of Pillow's own features
_HEIF = "needs pillow-heif: pip install 'vgg-transfer[heif]'"
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_JPEG_XL = (b"\xff\x0a", b"\0\0\0\x0cJXL ")  # which some versions of TensorFlow decode
_BY_PILLOW = 0
_STRIP = 512  # rows
_ALIGNMENT = 64  # bytes
_opening = threading.Lock()


def suffixes() -> frozenset[str]:
    """The suffixes of the files that can be read here, in lower case."""
    return frozenset(s for kind, names in KINDS.items() if _is_known(kind) for s in names)


def why_not(suffix: str) -> str:
    """Why a file with a suffix that is not among ``suffixes()`` is not read."""
    for kind, names in KINDS.items():
        if suffix.lower() in names:
            return _HEIF if kind == "HEIF" else f"Pillow was built without {kind} here"
    return "not a kind of image that is read"


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decode an image file of any kind, eagerly or in a graph of this process.

    Args:
        encoded: string ``[]``, the bytes of the file.

    Returns:
        uint8 RGB ``[height, width, 3]``, turned as its metadata say. Of several images in a file
        it is the first. Alpha is dropped, gray is repeated, 16 bits become 8.

    Raises:
        tf.errors.InvalidArgumentError: in a graph, if it is not an image, is damaged or too large;
            eagerly a ValueError that says why.
    """
    if tf.executing_eagerly():
        return read_tensor(tf.convert_to_tensor(encoded).numpy())
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
    """The same of the bytes of a file: uint8 RGB ``[height, width, 3]``.

    Raises:
        ValueError: says why, if it is not an image, is damaged, cut short, or too large.
    """
    return np.asarray(memoryview(read_tensor(data)))


def read_tensor(data: bytes) -> tf.Tensor:
    """The same as a tensor. TensorFlow makes two copies of an array that it is given."""
    if not data:
        raise ValueError("it is empty")
    code = _decoder(data)
    if code == _BY_PILLOW:
        return tf.experimental.dlpack.from_dlpack(_with_pillow(data).__dlpack__())
    try:
        # Eagerly, so that an error says what is wrong and not where in a graph.
        return _with_tensorflow.python_function(tf.constant(data), tf.constant(code))
    except tf.errors.OpError as error:
        raise ValueError(f"it cannot be decoded ({reason(error)})") from error


def is_for_tensorflow(data: bytes) -> bool:
    """Whether TensorFlow's operations decode a file, as an exported graph does."""
    return bool(_decoder(data) != _BY_PILLOW)


def reason(error: BaseException) -> str:
    """What an error of TensorFlow or Pillow says, without where in TensorFlow it was."""
    text = " ".join(str(getattr(error, "message", error)).split())
    text = re.sub(r"^\{\{.*?\}\} | \[Op:.*$|\[\[\{\{node .*$", "", text)
    return text.strip()[:200]


def num_pixels(file: IO[bytes]) -> int:
    """Width times height by the head of a file; 0 where it cannot be told."""
    try:
        with _opened(file) as image:
            return image.width * image.height
    except Exception:  # a damaged file makes its reader raise anything
        return 0


@tf.function(
    input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int32)], autograph=False
)
def _with_tensorflow(encoded: tf.Tensor, code: tf.Tensor) -> tf.Tensor:
    image = decode_as_stored(encoded)
    return tf.cond(code > 1, lambda: oriented(image, code), lambda: image)


def decode_as_stored(encoded: tf.Tensor) -> tf.Tensor:
    """What TensorFlow makes of a file, as it lies in it: uint8 RGB ``[height, width, 3]``."""
    image = _as_image(tf.io.decode_image(encoded, channels=3, expand_animations=False))
    is_bmp = tf.equal(tf.strings.substr(encoded, 0, 2), b"BM")
    return tf.cond(is_bmp, lambda: _with_palette(encoded, image), lambda: image)


def _as_image(pixels: tf.Tensor) -> tf.Tensor:
    pixels.set_shape([None, None, 3])
    return pixels


def _with_palette(encoded: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
    """A BMP of 8 bits, which TensorFlow takes for gray, in its colours; any other as it is.

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


def _decoder(data: bytes) -> np.int32:
    """The orientation, 1 to 8, of a file that TensorFlow decodes, or ``_BY_PILLOW``.

    Raises:
        ValueError: if it is too large.
    """
    code, size = 1, None
    if data.startswith(b"\xff\xd8\xff"):
        code, size = orientation(data), _size_of_jpeg(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        code, size = orientation(data), _unpacked(">II", data, 16)
    elif data.startswith(b"GIF8"):
        size = _unpacked("<HH", data, 6)
    elif data.startswith(b"BM") and _is_plain_bmp(data):
        size = _unpacked("<ii", data, 18)
    elif not data.startswith(_JPEG_XL):
        code = _BY_PILLOW
    if size is not None:
        _check_size(*size)
    return np.int32(code)


def _size_of_jpeg(data: bytes) -> tuple[int, ...] | None:
    """Height and width."""
    for marker, start, _ in jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            return _unpacked(">HH", data, start + 1)
    return None


def _is_plain_bmp(data: bytes) -> bool:
    """One that TensorFlow reads rightly: not packed, with colours in the usual order."""
    header = _unpacked("<I", data, 14)
    depth, packing = _unpacked("<H", data, 28), _unpacked("<I", data, 30)
    return (
        header is not None and header[0] >= 40 and packing == (0,) and depth in ((8,), (24,), (32,))
    )


def _unpacked(form: str, data: bytes, position: int) -> tuple[int, ...] | None:
    try:
        return struct.unpack_from(form, data, position)
    except struct.error:  # the file ends before
        return None


def _check_size(width: int, height: int) -> None:
    if abs(width * height) > MAX_PIXELS:
        raise ValueError(
            f"it has {abs(width)} x {abs(height)} pixels; expected at most {MAX_PIXELS:,} in all"
        )


def _with_pillow(data: bytes) -> np.ndarray:
    """uint8 RGB ``[height, width, 3]``.

    Raises:
        ValueError: see ``read_image``.
    """
    try:
        with _opened(io.BytesIO(data)) as image:
            _check_size(*image.size)
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except ValueError:
        raise
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
            raise ValueError(f"it is HEIC, which {_HEIF}") from None
        raise ValueError(f"it is no image: it begins with {data[:8]!r}") from None
    except Exception as error:  # a damaged file makes its reader raise anything
        raise ValueError(f"it cannot be decoded ({reason(error)})") from error


@contextlib.contextmanager
def _opened(file: IO[bytes]) -> Iterator[Image.Image]:
    """The head of a file, read by Pillow, whatever its size; pixels are read later."""
    # Pillow's own limit is a variable of the module, and warns at a third of ours.
    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file, formats=[kind for kind in KINDS if _is_known(kind)])
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        yield image


def _is_known(kind: str) -> bool:
    """Whether Pillow decodes files of a kind here."""
    Image.init()
    return kind in Image.OPEN and (kind not in _NEEDS or bool(features.check(_NEEDS[kind])))


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits of gray
        values = np.asarray(image, np.float64)
        top = 65535 if image.mode.startswith("I") else 1 if values.max() <= 1 else 255
        gray = np.clip(values * (255 / top), 0, 255).round().astype(np.uint8)
        pixels = _aligned(*gray.shape)
        pixels[:] = gray[..., None]
        return pixels
    pixels = _aligned(image.height, image.width)
    # By strips, so that a large image is not in memory three times.
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        if strip.mode in ("LA", "PA", "La", "RGBa"):
            strip = strip.convert("RGBA")
        pixels[top : top + _STRIP] = np.asarray(strip.convert("RGB"))
    return pixels


def _aligned(height: int, width: int) -> np.ndarray:
    """uint8 ``[height, width, 3]``, not filled, at an address that TensorFlow's operations want."""
    size = height * width * 3
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].reshape(height, width, 3)
