"""Image decoding in an exported graph, with TensorFlow operations only: the same pixels as
``images.decode``, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from transfer.images.decoding import decode_as_stored
from transfer.images.orientation import (
    EXIF,
    MAX_PACKED,
    ORIENTATION_TAG,
    PNG_EXIF,
    PNG_XMP,
    XMP,
    oriented,
)

_MAX_TAGS = 1024
_XMP_ORIENTATION = r'\C*?tiff:Orientation(?:="|>)([0-9])\C*'
_AS_IT_IS, _TEXT, _PACKED_TEXT, _INTERNATIONAL_TEXT = range(4)


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decode a JPEG, PNG, GIF or BMP, and a WebP if TensorFlow can decode it.

    Args:
        encoded: string ``[]``, the bytes of the file.

    Returns:
        uint8 RGB ``[height, width, 3]``; see ``images.decode``.

    Raises:
        tf.errors.InvalidArgumentError: at run time, if the format is unknown, a BMP is compressed
            or has another colour order, or the file is damaged.
    """
    with tf.control_dependencies([_check_bmp(encoded)]):
        image = decode_as_stored(tf.identity(encoded))
    code = orientation(encoded)
    return tf.cond(code > 1, lambda: oriented(image, code), lambda: image)


def _check_bmp(encoded: tf.Tensor) -> tf.Operation:
    """Refuse BMPs that TensorFlow would decode wrongly, because it assumes a plain one."""
    is_bmp = tf.equal(tf.strings.substr(encoded, 0, 2), b"BM")
    head = tf.strings.substr(encoded, 0, 34)

    def is_plain() -> tf.Tensor:
        header, depth = _number(head, 14, tf.int32), _number(head, 28, tf.uint16)
        is_known_depth = tf.reduce_any(tf.equal(depth, [8, 24, 32]))
        return (header >= 40) & is_known_depth & tf.equal(_number(head, 30, tf.int32), 0)

    has_header = tf.equal(tf.strings.length(head), 34)
    is_fine = tf.cond(is_bmp & has_header, is_plain, lambda: ~is_bmp)
    return tf.debugging.Assert(is_fine, ["this kind of BMP is not decoded here"])


def orientation(encoded: tf.Tensor) -> tf.Tensor:
    """The orientation of a JPEG, PNG or WebP file from its EXIF or XMP metadata; see
    ``transfer.images.orientation``.

    Args:
        encoded: string ``[]``, the bytes of the file.

    Returns:
        int32 ``[]``, 1 to 8; 1 is upright, and the default for other formats and files without an
        orientation.
    """
    is_jpeg = tf.equal(tf.strings.substr(encoded, 0, 2), b"\xff\xd8")
    exif, xmp = tf.cond(is_jpeg, lambda: _in_segments(encoded), lambda: _in_chunks(encoded))
    code = tf.cond(tf.size(exif) > 0, lambda: _of_exif(exif), lambda: tf.constant(-1))
    in_xmp = (code < 0) & (tf.strings.length(xmp) > 0)
    code = tf.cond(in_xmp, lambda: _of_xmp(xmp), lambda: code)
    return tf.where((code >= 1) & (code <= 8), code, 1)


def _in_segments(encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """EXIF data, int32 ``[length]``, and XMP data, string ``[]``, of a JPEG."""
    size = tf.strings.length(encoded)

    def step(position: tf.Tensor, exif: tf.Tensor, xmp: tf.Tensor) -> tuple[tf.Tensor, ...]:
        text = tf.strings.substr(encoded, position, 4 + len(XMP))
        marker, length = _big(text, 0, tf.uint16), _big(text, 2, tf.uint16)

        def segment(key: bytes) -> tuple[tf.Tensor, tf.Tensor]:
            is_it = tf.equal(tf.strings.substr(text, 4, len(key)), key)
            span = tf.stack([position + 4 + len(key), length - 2 - len(key), _AS_IT_IS])
            return is_it & tf.equal(marker, 0xFFE1), span

        is_exif, span = segment(EXIF)
        exif = tf.where(is_exif & (exif[1] == 0), span, exif)
        xmp = tf.where(*segment(XMP), xmp)
        # 0xFFFF is a fill byte; restart markers and the start of the image have no length; the
        # start of a scan ends the metadata.
        is_alone = (marker >= 0xFFD0) & (marker <= 0xFFD8)
        after = tf.where(marker == 0xFFFF, 1, tf.where(is_alone, 2, 2 + length))
        is_end = (marker <= 0xFF00) | (marker == 0xFFDA) | (marker == 0xFFD9)
        return tf.where(is_end, size, position + after), exif, xmp

    exif, xmp = _walk(step, tf.constant(2), size - 4)
    return _bytes(_cut(encoded, exif)), _cut(encoded, xmp)


def _in_chunks(encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """EXIF and XMP data of a PNG or WebP; empty for all other files."""
    size = tf.strings.length(encoded)
    is_png = tf.equal(tf.strings.substr(encoded, 0, 4), b"\x89PNG")
    is_webp = tf.equal(tf.strings.substr(encoded, 0, 4), b"RIFF")

    def step(position: tf.Tensor, exif: tf.Tensor, xmp: tf.Tensor) -> tuple[tf.Tensor, ...]:
        text = tf.strings.substr(encoded, position, 8 + len(PNG_EXIF) + 1)
        big, little = _big(text, 0, tf.int32), _number(text, 4, tf.int32)
        length = tf.where(is_png, big, little)
        rest = size - position - 8
        length = tf.where(length < 0, rest, tf.minimum(length, rest))
        kind = tf.strings.substr(text, tf.where(is_png, 4, 0), 4)
        is_of_kind = tf.equal(kind, [b"tEXt", b"zTXt", b"iTXt"])
        how = tf.reduce_sum(tf.where(is_of_kind, [_TEXT, _PACKED_TEXT, _INTERNATIONAL_TEXT], 0))
        span = tf.stack([position + 8, length, how])

        def is_text(keyword: bytes) -> tf.Tensor:
            start = tf.strings.substr(text, 8, len(keyword) + 1)
            return (how > 0) & tf.equal(start, keyword + b"\0")

        has_chunk = (exif[1] > 0) & (exif[2] == _AS_IT_IS)
        is_exif = tf.equal(kind, tf.where(is_png, b"eXIf", b"EXIF")) & (is_png | ~has_chunk)
        exif = tf.where(is_exif | (is_text(PNG_EXIF) & ~has_chunk), span, exif)
        is_xmp = tf.equal(kind, b"XMP ") & (xmp[1] == 0)
        xmp = tf.where(is_xmp | is_text(PNG_XMP), span, xmp)
        after = position + tf.where(is_png, 12 + length, 8 + length + length % 2)
        return tf.where(tf.equal(kind, b"IEND"), size, after), exif, xmp

    def of_file() -> tuple[tf.Tensor, tf.Tensor]:
        exif, xmp = _walk(step, tf.where(is_png, 8, 12), size - 8)
        text = tf.cond(
            exif[2] == _AS_IT_IS,
            lambda: _bytes(_cut(encoded, exif)),
            lambda: _of_profile(_text(encoded, exif)),
        )
        return text, tf.cond(
            xmp[2] == _AS_IT_IS, lambda: _cut(encoded, xmp), lambda: _text(encoded, xmp)
        )

    nothing = (tf.zeros([0], tf.int32), tf.constant(b""))
    return tf.cond(is_png | is_webp, of_file, lambda: nothing)


def _walk(
    step: Callable[..., tuple[tf.Tensor, ...]], start: tf.Tensor, last: tf.Tensor
) -> tuple[Any, ...]:
    """Walk over segments or chunks while their position is at most ``last``. Returns the locations
    of EXIF and XMP, int32 ``[3]`` each: position, number of bytes, and encoding."""
    nothing = tf.zeros([3], tf.int32)
    _, exif, xmp = tf.while_loop(
        lambda position, *_: position <= last, step, (start, nothing, nothing)
    )
    return exif, xmp


def _cut(encoded: tf.Tensor, span: tf.Tensor) -> tf.Tensor:
    """The bytes of a span (position, number of bytes, encoding)."""
    return tf.strings.substr(encoded, span[0], tf.maximum(span[1], 0))


def _number(
    text: tf.Tensor, position: int, dtype: tf.DType, little_endian: bool = True
) -> tf.Tensor:
    """The integer at a position, int32 ``[]``."""
    digits = tf.strings.substr(text, position, dtype.size)
    return tf.cast(tf.io.decode_raw(digits, dtype, little_endian=little_endian)[0], tf.int32)


def _big(text: tf.Tensor, position: int, dtype: tf.DType) -> tf.Tensor:
    return _number(text, position, dtype, little_endian=False)


def _bytes(text: tf.Tensor) -> tf.Tensor:
    """The bytes of a string, int32 ``[length]``."""
    return tf.cast(tf.io.decode_raw(text, tf.uint8), tf.int32)


def _text(encoded: tf.Tensor, span: tf.Tensor) -> tf.Tensor:
    """The text of a PNG text chunk; fields end with a null byte (PNG specification, 11.3.4)."""
    chunk, how = _cut(encoded, span), span[2]
    ends = tf.where(tf.equal(_bytes(chunk), 0))[:, 0]
    ends = tf.pad(tf.cast(ends, tf.int32), [[0, 5]], constant_values=span[1])
    # tEXt: keyword, 0, text. zTXt: keyword, 0, 0, compressed text. iTXt: keyword, 0, compression
    # flag, 0, language, 0, translated keyword, 0, text.
    is_flag = tf.equal(tf.strings.substr(chunk, tf.minimum(ends[0] + 1, span[1]), 1), b"\1")
    is_packed = (how == _PACKED_TEXT) | ((how == _INTERNATIONAL_TEXT) & is_flag)
    number = tf.where(how == _INTERNATIONAL_TEXT, tf.where(is_flag, 4, 5), how)
    text = tf.strings.substr(chunk, tf.minimum(ends[number - 1] + 1, span[1]), span[1])
    is_packed &= tf.strings.length(text) <= MAX_PACKED
    return tf.cond(is_packed, lambda: tf.io.decode_compressed(text, "ZLIB"), lambda: text)


def _of_profile(text: tf.Tensor) -> tf.Tensor:
    """Bytes that ImageMagick wrote as hexadecimal digits, starting at the fourth line."""
    digits = _bytes(tf.strings.reduce_join(tf.strings.split(text, b"\n")[3:]))
    digits = tf.boolean_mask(digits, digits > ord(" "))
    values = tf.where(digits > ord("9"), digits % 32 + 9, digits - ord("0"))
    pairs = tf.reshape(values[: tf.size(values) // 2 * 2], [-1, 2])
    return 16 * pairs[:, 0] + pairs[:, 1]


def _of_xmp(xmp: tf.Tensor) -> tf.Tensor:
    """Orientation in XMP data; -1 if there is none."""
    digit = tf.strings.regex_replace(xmp, _XMP_ORIENTATION, r"\1", replace_global=False)
    is_digit = tf.strings.regex_full_match(digit, "[0-9]")
    return tf.strings.to_number(tf.where(is_digit, digit, b"-1"), tf.int32)


def _of_exif(data: tf.Tensor) -> tf.Tensor:
    """Orientation in EXIF data, which has the layout of a TIFF file; -1 if there is none. Some
    programs repeat the EXIF marker of a JPEG segment before it."""
    mark = tf.constant([*EXIF])
    has_mark = tf.cond(
        tf.size(data) > 6, lambda: tf.reduce_all(data[:6] == mark), lambda: tf.constant(False)
    )
    data = tf.cond(has_mark, lambda: data[6:], lambda: data)
    size = tf.size(data)
    data = tf.pad(data, [[0, 16]])
    is_little_endian = data[0] == ord("I")

    def number(position: tf.Tensor, num_bytes: int) -> tf.Tensor:
        """The integer at a position, or those at several; -1 if the position is negative or beyond
        the end."""
        places = position[..., None] + tf.range(num_bytes)
        digits = tf.gather(data, tf.clip_by_value(places, 0, size + 15))
        digits = tf.where(is_little_endian, digits, digits[..., ::-1])
        value = tf.reduce_sum(digits * tf.constant([256**i for i in range(num_bytes)]), -1)
        return tf.where((position < 0) | (position + num_bytes > size), -1, value)

    directory = number(tf.constant(4), 4)
    directory = tf.where(directory < 0, size, directory)
    entries = directory + 2 + 12 * tf.range(_MAX_TAGS)
    count = number(directory, 2)
    is_it = (tf.range(_MAX_TAGS) < count) & (number(entries, 2) == ORIENTATION_TAG)
    entry = entries[tf.reduce_max(tf.where(is_it, tf.range(_MAX_TAGS), 0))]
    kind = number(entry + 2, 2)
    is_short = (kind == 3) | (kind == 8)
    code = tf.where(is_short, number(entry + 8, 2), number(entry + 8, 4))
    is_whole = tf.reduce_any(kind == tf.constant([3, 4, 8, 9, 13]))  # TIFF 6.0, section 2: Types
    how_many = number(entry + 4, 4)
    is_here = (how_many == 1) | (is_short & (how_many == 2))
    code = tf.where(is_whole & is_here, code, 0)
    is_tiff = tf.reduce_any(data[0] == tf.constant([*b"IM"])) & (data[0] == data[1])
    return tf.where(is_tiff & tf.reduce_any(is_it), code, -1)
