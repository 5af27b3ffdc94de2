"""Names of many examples in one array of bytes instead of one Python object each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np


class Names(Sequence[str]):
    """An immutable sequence of names, which are decoded when they are taken out.

    Equal to any sequence with the same names. Bytes that are not UTF-8 are decoded as
    ``os.fsdecode`` does.

    Args:
        data: the names, concatenated.
        starts: byte offset of each name in ``data``, int64 ``[num_names]``.
        lengths: length of each name in bytes, int64 ``[num_names]``.

    Example:
        >>> names = Names.of([b"cats/1.jpg", b"dogs/2.jpg"])
        >>> names[1]
        'dogs/2.jpg'
        >>> names[np.array([1, 0])] == ["dogs/2.jpg", "cats/1.jpg"]
        True
    """

    def __init__(self, data: bytes, starts: np.ndarray, lengths: np.ndarray):
        self.data, self.starts, self.lengths = data, starts, lengths

    @classmethod
    def of(cls, names: Iterable[bytes | str]) -> Names:
        """The given names."""
        encoded = [os.fsencode(name) for name in names]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(b"".join(encoded), np.cumsum(lengths) - lengths, lengths)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice | np.ndarray) -> Names: ...

    def __getitem__(self, index: Any) -> str | Names:
        """One name; or, for a slice or an array of positions, the ``Names`` at them."""
        if isinstance(index, slice | np.ndarray):
            return Names(self.data, self.starts[index], self.lengths[index])
        start, length = int(self.starts[index]), int(self.lengths[index])
        return os.fsdecode(self.data[start : start + length])

    def encoded(self) -> Iterator[bytes]:
        """The names as bytes."""
        data = self.data
        for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True):
            yield data[start : start + length]

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.encoded())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as for lists

    def __repr__(self) -> str:
        shown = [*self[:3]]
        return f"<{len(self)} names: {shown}>" if len(self) <= 3 else f"<{len(self)}: {shown}...>"
