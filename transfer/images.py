"""Image files of any kind to pixels, the right way up.

``decode`` is TensorFlow's reading, one for training, evaluation, prediction and export. What
TensorFlow does not decode ``read_image`` leaves to Pillow: WebP, TIFF, CMYK, 16 bits, and whatever
else it knows.
"""

from __future__ import annotations

import io
import re

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps, UnidentifiedImageError

_LIKE_TENSORFLOW = {  # format to Pillow's modes
    "BMP": ("RGB",),
    "GIF": ("L", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "MPO": ("L", "RGB", "CMYK"),  # a JPEG with more pictures behind it
    "PNG": ("L", "LA", "P", "RGB", "RGBA", "I;16"),
}
MAX_PIXELS = 2**28
"""Of one image; what has more is taken for a decompression bomb."""

_HEAD_BYTES = 4096  # in which a JPEG's EXIF begins
_MAX_TAGS = 64
_ORIENTATION_TAG = 0x0112  # EXIF 2.32 (CIPA DC-008), table 4
_EXIF = b"Exif\0\0"  # begins the segment; table 45


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decode an image file with TensorFlow, eagerly or in a graph.

    Args:
        encoded: string ``[]``: JPEG, PNG, GIF (first frame) or BMP.

    Returns:
        uint8 RGB ``[height, width, 3]``, turned as the EXIF orientation of a JPEG says. Alpha is
        dropped, gray is repeated.

    Raises:
        tf.errors.InvalidArgumentError: if it is none of these, or is damaged.
    """
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    is_bmp = tf.equal(tf.strings.substr(encoded, 0, 2), b"BM")
    image = tf.cond(is_bmp, lambda: _with_palette(encoded, image), lambda: image)
    is_jpeg = tf.equal(tf.strings.substr(encoded, 0, 2), b"\xff\xd8")
    code = tf.cond(is_jpeg, lambda: orientation(encoded), lambda: tf.constant(1))
    return tf.cond(code > 1, lambda: oriented(image, code), lambda: image)


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


def orientation(encoded: tf.Tensor) -> tf.Tensor:
    """The EXIF orientation of a JPEG file: int32 ``[]``, 1 to 8; 1 is upright, and where nothing is
    said."""
    head = tf.strings.substr(encoded, 0, _HEAD_BYTES)
    parts = tf.strings.split(head, _EXIF, maxsplit=1)
    has_exif = tf.size(parts) > 1
    return tf.cond(has_exif, lambda: _orientation_tag(parts[1]), lambda: tf.constant(1))


def _orientation_tag(tiff: tf.Tensor) -> tf.Tensor:
    """Of EXIF's own part, which is laid out as a TIFF file."""
    data = tf.cast(tf.io.decode_raw(tiff, tf.uint8), tf.int32)
    data = tf.pad(data, [[0, _HEAD_BYTES - tf.size(data)]])
    is_little_endian = data[0] == ord("I")

    def number(position: tf.Tensor) -> tf.Tensor:
        """The 16 bits at a position, or at several."""
        position = tf.clip_by_value(position, 0, _HEAD_BYTES - 2)
        first, second = tf.gather(data, position), tf.gather(data, position + 1)
        return tf.where(is_little_endian, first + 256 * second, 256 * first + second)

    # The offset of the first directory has 32 bits; one beyond 16 would not lie in the head.
    directory = number(tf.where(is_little_endian, 4, 6))
    entries = directory + 2 + 12 * tf.range(_MAX_TAGS)
    tags = tf.where(tf.range(_MAX_TAGS) < number(directory), number(entries), 0)
    is_it = tags == _ORIENTATION_TAG
    code = number(entries[tf.argmax(is_it)] + 8)
    return tf.where(tf.reduce_any(is_it) & (code >= 1) & (code <= 8), code, 1)


def oriented(image: tf.Tensor, code: tf.Tensor) -> tf.Tensor:
    """``[height, width, channels]`` turned and flipped as an EXIF orientation, 1 to 8, demands."""

    def transposed() -> tf.Tensor:
        # By places: oneDNN says on standard error that it has no transposition of integers.
        height, width, channels = tf.unstack(tf.shape(image))
        places = width * tf.range(height)[None, :] + tf.range(width)[:, None]
        return tf.gather(tf.reshape(image, [-1, channels]), places)

    upright = tf.cond(code >= 5, transposed, lambda: image)

    def is_one_of(*codes: int) -> tf.Tensor:
        return tf.reduce_any(code == tf.constant(codes))

    upright = tf.cond(is_one_of(3, 4, 7, 8), lambda: upright[::-1], lambda: upright)
    return tf.cond(is_one_of(2, 3, 6, 7), lambda: upright[:, ::-1], lambda: upright)


def read_image(data: bytes) -> np.ndarray:
    """Decode an image file of any kind.

    Args:
        data: the bytes of the file.

    Returns:
        uint8 RGB ``[height, width, 3]``, turned as its EXIF orientation says, but for PNG and GIF.
        Alpha is dropped, gray is repeated, 16 bits become 8.

    Raises:
        ValueError: if it is no image, is damaged, cut short, or too large.
    """
    if not data:
        raise ValueError("it is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(
                    f"it has {width} x {height} pixels; expected at most {MAX_PIXELS:,}"
                )
            if image.mode in _LIKE_TENSORFLOW.get(image.format or "", ()):
                return decode(tf.constant(data)).numpy()
            return _with_pillow(image)
    except UnidentifiedImageError:
        raise ValueError(f"it is no image: it begins with {data[:8]!r}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError, tf.errors.OpError) as error:
        reason = " ".join(str(getattr(error, "message", error)).split())
        reason = re.sub(r"^\{\{.*?\}\} | \[Op:.*$", "", reason)  # where in TensorFlow it was
        raise ValueError(f"it cannot be decoded ({reason[:200]})") from error


def _with_pillow(image: Image.Image) -> np.ndarray:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):  # 16 or 32 bits of gray
        values = np.asarray(upright, np.float64)
        top = 65535 if upright.mode.startswith("I") else 1 if values.max() <= 1 else 255
        gray = np.clip(values * (255 / top), 0, 255).round().astype(np.uint8)
        return np.repeat(gray[..., None], 3, -1)
    if upright.mode in ("LA", "PA", "La", "RGBa"):
        upright = upright.convert("RGBA")
    return np.asarray(upright.convert("RGB"))
