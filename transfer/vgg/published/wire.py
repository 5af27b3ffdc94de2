"""Read protocol buffers field by field, without parsing them into objects.

A parsed message of two bytes takes a hundred bytes in memory, and a large array is copied. Here,
fields that are not needed are skipped, and data are views of the file.

Source of the encoding: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator

Value = int | memoryview
_MAX_FIELDS = 100_000  # per message; a malicious file may contain only fields of one or two bytes
_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5


def fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """Number and value of each field of a message: an integer, or the bytes of a string, a message,
    packed numbers or one number of fixed size.

    Raises:
        ValueError: if the bytes are not a valid message, or it has too many fields.
    """
    position = count = 0
    while position < len(message):
        count += 1
        if count > _MAX_FIELDS:
            raise ValueError(f"a protocol buffer has over {_MAX_FIELDS:,} fields")
        tag, position = _varint(message, position)
        number, kind = tag >> 3, tag & 7
        if not number:
            raise ValueError("a protocol buffer has invalid field number 0")
        if kind == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if kind == _LEN:
            size, position = _varint(message, position)
        elif kind in (_I64, _I32):
            size = 8 if kind == _I64 else 4
        else:
            raise ValueError(f"a protocol buffer has invalid wire type {kind}")
        if position + size > len(message):
            raise ValueError("a protocol buffer was cut short")
        yield number, message[position : position + size]
        position += size


def integers(values: list[Value], most: int = 16) -> tuple[int, ...]:
    """A repeated integer field, packed or not. Negative values are returned as the large unsigned
    values of their encoding.

    Raises:
        ValueError: if there are more than ``most``.
    """
    numbers: list[int] = []
    for value in values:
        position = 0
        if isinstance(value, int):
            numbers.append(value)
        else:
            while position < len(value) and len(numbers) <= most:
                number, position = _varint(value, position)
                numbers.append(number)
        if len(numbers) > most:
            raise ValueError(f"a protocol buffer has over {most} numbers where few are expected")
    return tuple(numbers)


def text(value: Value) -> str:
    """A string field."""
    if isinstance(value, int):
        raise ValueError("a protocol buffer has an integer instead of text")
    return bytes(value[:1000]).decode("utf-8", "replace")


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("a protocol buffer was cut short")
        byte = data[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise ValueError("a protocol buffer has a varint of over ten bytes")
