"""EXIF orientation of images: read from EXIF, else XMP, like Pillow's ``exif_transpose``.

``exports.decoding`` implements the same with TensorFlow operations.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

import tensorflow as tf

ORIENTATION_TAG = 0x0112  # EXIF 2.32 (CIPA DC-008), table 4
EXIF = b"Exif\0\0"  # start of a JPEG segment; table 45
XMP = b"http://ns.adobe.com/xap/1.0/\0"  # likewise; XMP specification, part 3, section 1.1.3
PNG_EXIF = b"Raw profile type exif"  # keyword of a PNG text chunk, written by ImageMagick
PNG_XMP = b"XML:com.adobe.xmp"  # likewise; XMP specification, part 3, section 1.1.5
MAX_PACKED = 2**16
"""Maximum size in bytes of a compressed text chunk; EXIF is never larger."""

_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def orientation(data: bytes) -> int:
    """The orientation of a JPEG or PNG from its metadata.

    Args:
        data: the bytes of the file.

    Returns:
        1 to 8; 1 is upright, and the default for files without orientation or of other formats.
    """
    exif = xmp = b""
    if data.startswith(b"\xff\xd8"):
        for marker, start, end in jpeg_segments(data):
            if marker == 0xE1 and data.startswith(EXIF, start) and not exif:
                exif = data[start + len(EXIF) : end]
            elif marker == 0xE1 and data.startswith(XMP, start):
                xmp = data[start + len(XMP) : end]
    elif data.startswith(b"\x89PNG"):
        exif, xmp = _of_png(data)
    code = _of_exif(exif)
    if code is None and (match := _IN_XMP.search(xmp)):
        code = int(match[1])
    return code if code is not None and 1 <= code <= 8 else 1


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The segments before the first scan: second byte of the marker, start and end of the
    segment's content."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif 0xD0 <= marker <= 0xD8:  # restarts, start of the image: no content follows
            position += 2
        elif marker in (0x00, 0xD9, 0xDA):  # end of the image, start of a scan
            return
        else:
            end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            yield marker, position + 4, end
            position = end


def oriented(image: tf.Tensor, code: tf.Tensor) -> tf.Tensor:
    """Rotate and flip ``[height, width, channels]`` upright, given its orientation, 1 to 8."""
    image = tf.convert_to_tensor(image)
    height, width, channels = tf.unstack(tf.shape(image))

    def is_one_of(*codes: int) -> tf.Tensor:
        return tf.reduce_any(code == tf.constant(codes))

    def range_of(size: tf.Tensor, is_reversed: tf.Tensor) -> tf.Tensor:
        return tf.where(is_reversed, size - 1 - tf.range(size), tf.range(size))

    def transposed() -> tf.Tensor:
        # With tf.gather, not tf.transpose: oneDNN prints to standard error that it cannot transpose
        # integers. The flips are included, so that a large image is copied only once.
        rows = range_of(height, is_one_of(6, 7))
        columns = range_of(width, is_one_of(7, 8))
        indices = width * rows[None, :] + columns[:, None]
        return tf.gather(tf.reshape(image, [-1, channels]), indices)

    def flipped() -> tf.Tensor:
        upright = tf.cond(is_one_of(3, 4), lambda: image[::-1], lambda: image)
        return tf.cond(is_one_of(2, 3), lambda: upright[:, ::-1], lambda: upright)

    upright = tf.cond(code >= 5, transposed, flipped)
    upright.set_shape([None, None, image.shape[-1]])
    return upright


def _of_png(data: bytes) -> tuple[bytes, bytes]:
    """EXIF and XMP metadata of a PNG."""
    chunk, profile, xmp = b"", b"", b""
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        start, position = position + 8, position + 12 + length
        if kind == b"eXIf":
            chunk = data[start : start + length]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            if data.startswith(PNG_EXIF + b"\0", start):
                profile = _text(kind, data[start : start + length])
            elif data.startswith(PNG_XMP + b"\0", start):
                xmp = _text(kind, data[start : start + length])
        elif kind == b"IEND":
            break
    return chunk or _of_profile(profile), xmp


def _text(kind: bytes, chunk: bytes) -> bytes:
    """The text of a text chunk: PNG specification, section 11.3.4."""
    rest = chunk.partition(b"\0")[2]
    is_compressed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1")
    if kind == b"iTXt":  # two bytes, then language and translated keyword, which end with zeros
        rest = b"\0" + rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    text = rest if kind == b"tEXt" else rest[1:]
    if not is_compressed or len(text) > MAX_PACKED:
        return text
    try:
        return zlib.decompress(text)
    except zlib.error:
        return b""


def _of_profile(text: bytes) -> bytes:
    """Decode EXIF that ImageMagick writes as hexadecimal digits, from the fourth line on."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def _of_exif(exif: bytes) -> int | None:
    """The orientation in EXIF, which has the layout of a TIFF file; ``None`` if not given."""
    while exif.startswith(EXIF):  # some programs repeat the header of the JPEG segment
        exif = exif[len(EXIF) :]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    code = None
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(f"{order}HHI", exif, entry)
            if tag == ORIENTATION_TAG:
                # TIFF 6.0, section 2: the integer types.
                form = {3: "H", 4: "I", 8: "h", 9: "i", 13: "I"}.get(kind)
                # Of two short values Pillow takes the first; more are not stored in the entry.
                if number != 1 and (number != 2 or kind not in (3, 8)):
                    form = None
                code = struct.unpack_from(order + form, exif, entry + 8)[0] if form else 0
    except struct.error:  # truncated
        pass
    return code
