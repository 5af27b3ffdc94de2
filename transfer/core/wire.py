"""Limit the number of fields of a serialized protobuf before it is parsed.

An empty message takes two bytes in a file but over a hundred in memory, so that a small file of
empty messages could exhaust the memory.
"""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor, FieldDescriptor

MAX_FIELDS = 5_000_000
"""Maximum number of fields of a file; graphs of 60,000 nodes have 1.5 million."""
SMALL = 2**23
"""Fields are counted only in files larger than this many bytes."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_Fields = dict[int, Descriptor | None]


def check(content: bytes, kind: Descriptor) -> None:
    """Reject a file with more fields than any real graph has.

    A damaged file passes: the parser reports what is wrong with it.

    Raises:
        ValueError: if there are over ``MAX_FIELDS``.
    """
    if len(content) > SMALL and count_fields(content, kind) > MAX_FIELDS:
        raise ValueError(
            f"it has over {MAX_FIELDS:,} fields in {len(content):,} bytes, more than any graph; "
            "it is damaged or malicious"
        )


def count_fields(content: bytes, kind: Descriptor) -> int:
    """Count the fields of a message and its nested messages; stops soon after ``MAX_FIELDS``."""
    known: dict[str, _Fields] = {}
    pending = [(0, len(content), kind)]
    count = 0
    try:
        while pending and count <= MAX_FIELDS:
            position, end, kind = pending.pop()
            if kind.full_name not in known:
                known[kind.full_name] = _messages(kind)
            messages = known[kind.full_name]
            while position < end and count <= MAX_FIELDS:
                count += 1
                tag, position = _varint(content, position)
                wire_type = tag & 7
                if wire_type == _VARINT:
                    _, position = _varint(content, position)
                elif wire_type == _BYTES:
                    length, position = _varint(content, position)
                    message = messages.get(tag >> 3)
                    if message is not None and length:
                        pending.append((position, min(position + length, end), message))
                    position += length
                elif wire_type in (_FIXED32, _FIXED64):
                    position += 4 if wire_type == _FIXED32 else 8
                else:
                    return count
    except IndexError:  # truncated within a field
        pass
    return count


def _messages(kind: Descriptor) -> _Fields:
    """Field number to the type of its message."""
    return {
        field.number: field.message_type
        for field in kind.fields
        if field.type == FieldDescriptor.TYPE_MESSAGE
    }


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """Decode a varint: its value, and the position after it."""
    byte = content[position]
    if byte < 0x80:
        return byte, position + 1
    value, shift = byte & 0x7F, 7
    while True:
        position += 1
        byte = content[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80 or shift > 63:
            return value, position + 1
        shift += 7
