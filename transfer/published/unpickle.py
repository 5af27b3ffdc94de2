"""Arrays out of pickles, without running what a pickle asks for.

A pickle is a program: it names callables and has them called. Here a name is looked up in a short
table of stand-ins that only note what they are given; any other name ends the reading. So a
``.npy`` with a dictionary of arrays and a PyTorch file can be read, and nothing else can happen.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

TORCH_MAGIC = 0x1950A86A20F9469CFC6C
"""First object of PyTorch's format before 1.6; source: torch/serialization.py, MAGIC_NUMBER."""
_MAX_OBJECTS, _MAX_DEPTH, _MAX_MEMO = 20_000, 6, 10**6
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_TORCH_TYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


class UnsafePickleError(ValueError):
    """A pickle names something that is not data."""


def numpy_arrays(file: IO[bytes]) -> dict[str, np.ndarray]:
    """The arrays in the object of a ``.npy`` of dtype object, whose header is behind: path in the
    object (``conv1_1/0``) to array. Written by Python 2 or 3, by any NumPy.

    Raises:
        UnsafePickleError: if it is more than arrays, numbers and containers of them.
        ValueError: if it is damaged.
    """
    return _arrays(_load(file, _NUMPY))


def torch_arrays(file: IO[bytes]) -> dict[str, np.ndarray]:
    """The tensors that ``torch.save`` wrote before PyTorch 1.6; path in the object
    (``state_dict/features.0.weight``) to array.

    Raises:
        UnsafePickleError, ValueError: see ``numpy_arrays``.
    """
    storages = _Storages()
    magic, _, system, found = (_load(file, _TORCH, storages.of) for _ in range(4))
    if magic != TORCH_MAGIC or not isinstance(system, dict) or not system.get("little_endian"):
        raise ValueError("it is no PyTorch file of a little-endian machine")
    for key in _load(file, {}):
        storage = storages.get(key)
        if file.read(8) != struct.pack("<q", storage.count):
            raise ValueError(f"its storage {key!r} has another size than its tensors need")
        data = file.read(storage.count * storage.dtype.itemsize)
        storage.values = _values(data, storage.dtype, storage.count)
    return _arrays(found)


def torch_archive(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    """The same of PyTorch 1.6 and newer. The archive's sizes were looked at.

    Raises:
        UnsafePickleError, ValueError: see ``numpy_arrays``.
    """
    names = set(archive.namelist())
    pickles = [name for name in names if name.endswith("data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it has {len(pickles)} files data.pkl; expected one")
    root = pickles[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in names and archive.read(order) != b"little":
        raise ValueError("it was written on a big-endian machine")
    storages = _Storages()
    with archive.open(pickles[0]) as file:
        found = _load(file, _TORCH, storages.of)
    for storage in storages.all:
        name = f"{root}data/{storage.key}"
        if name not in names:
            raise ValueError(f"its storage {storage.key!r} is missing; it was cut short")
        if archive.getinfo(name).file_size != storage.count * storage.dtype.itemsize:
            raise ValueError(f"its storage {storage.key!r} has another size than its tensors need")
        storage.values = _values(archive.read(name), storage.dtype, storage.count)
    return _arrays(found)


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        file: IO[bytes],
        stand_ins: Mapping[tuple[str, str], Any],
        persistent: Callable[[Any], Any] | None,
    ):
        # Strings of Python 2 are bytes; latin1 keeps each.
        super().__init__(file, encoding="latin1")
        self._stand_ins = stand_ins
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._stand_ins:
            raise UnsafePickleError(
                f"it asks for {module}.{name}, which is no data; nothing of it was run"
            )
        return self._stand_ins[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise UnsafePickleError("it refers to objects outside of it")
        return self._persistent(pid)


def _load(
    file: IO[bytes],
    stand_ins: Mapping[tuple[str, str], Any],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    try:
        start = file.tell()
        _check_memo(file)
        file.seek(start)
        return _Unpickler(file, stand_ins, persistent).load()
    except UnsafePickleError:
        raise
    except Exception as error:  # whatever a damaged pickle runs into
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error


def _check_memo(file: IO[bytes]) -> None:
    """Refuse a place in the memo that is too high: Python makes room for all below it."""
    for operation, argument, _ in pickletools.genops(file):
        if operation.name in _PUTS and int(argument or 0) > _MAX_MEMO:
            raise ValueError(f"its memo has a place {argument}")


def _text(value: Any) -> str:
    """A string as it is; of anything else ``str`` may take for ever."""
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):
        raise ValueError(f"it has a {type(value).__name__} in the place of a string")
    return value


class _DType:
    """Stands for ``numpy.dtype``."""

    def __init__(self, code: Any = "", *_: Any):
        self.code, self.order = _text(code), "|"

    def __setstate__(self, state: tuple) -> None:
        self.order = _text(state[1])

    def resolve(self) -> np.dtype:
        code = self.code.lstrip("<>=|")
        if not re.fullmatch(r"[fiu][1248]|b1|O8?", code):
            raise ValueError(f"it has an array of dtype {self.code!r}")
        order = self.code[0] if self.code[:1] in "<>" and self.code else self.order
        return np.dtype(("<" if order in "=|" else order) + code)


class _Array:
    """Stands for ``numpy.ndarray``; becomes one by ``resolve``."""

    def __init__(self, *_: Any):
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def resolve(self) -> Any:
        _, shape, dtype, is_fortran, data = self.state
        resolved = dtype.resolve()
        if resolved.hasobject:
            # np.save keeps any object as an array of one element.
            return data[0] if len(data) == 1 else list(data)
        if isinstance(data, str):
            data = data.encode("latin1")
        return _shaped(_values(data, resolved, math.prod(shape)), shape, bool(is_fortran))


class _Buffer:
    """Stands for ``numpy.core.numeric._frombuffer``: arrays of pickle protocol 5."""

    def __init__(self, data: Any, dtype: Any, shape: Any, order: Any = "C"):
        self.data, self.dtype, self.shape, self.order = data, dtype, shape, order

    def resolve(self) -> np.ndarray:
        values = _values(bytes(self.data), self.dtype.resolve(), math.prod(self.shape))
        return _shaped(values, self.shape, self.order == "F")


class _Bytes:
    """Stands for ``_codecs.encode``: bytes in pickles of protocol 2."""

    def __new__(cls, text: str, encoding: str = "latin1") -> bytes:  # type: ignore[misc]
        return _text(text).encode("latin1")


class _Dict(dict):
    """Stands for ``collections.OrderedDict``, whose attributes do not matter."""

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass
class _Storage:
    key: str
    dtype: np.dtype
    count: int
    values: np.ndarray | None = None


@dataclass(frozen=True)
class _StorageType:
    code: str

    def __call__(self, *_: Any) -> Any:
        raise UnsafePickleError("it makes a storage of its own")


class _Tensor:
    """Stands for ``torch._utils._rebuild_tensor_v2``, and for ``torch.FloatTensor``, whose state
    old files set."""

    def __init__(self, storage: Any, offset: int, size: Any, stride: Any, *_: Any):
        self.__setstate__((storage, offset, size, stride))

    def __setstate__(self, state: tuple) -> None:
        self.storage, self.offset, self.size, self.stride = state[:4]

    def resolve(self) -> np.ndarray:
        size = tuple(int(n) for n in self.size)
        count = math.prod(size)
        expected = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
        strides = zip(size, self.stride, expected, strict=True)
        if any(extent != 1 and stride != wanted for extent, stride, wanted in strides):
            raise ValueError("it has a tensor that is not contiguous; save it after contiguous()")
        values = self.storage.values
        if values is None:
            raise ValueError("it has a tensor without its values; it was cut short")
        if min((0, self.offset, *size)) < 0 or self.offset + count > len(values):
            raise ValueError("it has a tensor outside of its storage")
        return values[self.offset : self.offset + count].reshape(size)


class _Parameter:
    """Stands for ``torch._utils._rebuild_parameter``."""

    def __init__(self, data: Any, *_: Any):
        self.data = data

    def resolve(self) -> Any:
        return self.data


def _reconstruct(*_: Any) -> _Array:
    return _Array()


_NUMPY: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _Bytes,
    ("collections", "OrderedDict"): _Dict,
}
for _module in ("numpy.core", "numpy._core"):
    _NUMPY[f"{_module}.multiarray", "_reconstruct"] = _reconstruct
    _NUMPY[f"{_module}.numeric", "_frombuffer"] = _Buffer
_TORCH: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
} | {("torch", name): _StorageType(code) for name, code in _TORCH_TYPES.items()}
_TORCH |= {("torch", name.replace("Storage", "Tensor")): _Tensor for name in _TORCH_TYPES}


class _Storages:
    """Those that the tensors of a file share, by their key."""

    def __init__(self) -> None:
        self._by_key: dict[str, _Storage] = {}

    def of(self, pid: Any) -> _Storage:
        """For ``("storage", type, key, device, number of elements, ...)``."""
        kind, storage_type, key, _, count = pid[:5]
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise UnsafePickleError(f"it refers to {kind!r} outside of it")
        new = _Storage(str(key), np.dtype(storage_type.code), int(count))
        return self._by_key.setdefault(new.key, new)

    def get(self, key: Any) -> _Storage:
        if str(key) not in self._by_key:
            raise ValueError(f"no tensor needs its storage {key!r}; it is damaged")
        return self._by_key[str(key)]

    @property
    def all(self) -> list[_Storage]:
        return list(self._by_key.values())


def _arrays(found: Any) -> dict[str, np.ndarray]:
    """All arrays in an object, by their path.

    The depth and the number of objects are limited: a pickle of a few bytes can refer to itself.
    """
    arrays: dict[str, np.ndarray] = {}
    pending: list[tuple[tuple[str, ...], Any]] = [((), found)]
    for _ in range(_MAX_OBJECTS):
        if not pending:
            return arrays
        path, value = pending.pop()
        if isinstance(value, _Array | _Buffer | _Tensor | _Parameter):
            pending.append((path, value.resolve()))
        elif isinstance(value, np.ndarray):
            arrays["/".join(path)] = value
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            if len(path) == _MAX_DEPTH:
                break
            pending += [((*path, str(key)), item) for key, item in reversed(list(items))]
    raise ValueError(f"it holds over {_MAX_OBJECTS:,} objects, or is nested over {_MAX_DEPTH} deep")


def _values(data: bytes, dtype: np.dtype, count: int) -> np.ndarray:
    if not isinstance(data, bytes) or count < 0 or len(data) != count * dtype.itemsize:
        raise ValueError("it has an array whose data do not fill its shape; it was cut short")
    return np.frombuffer(data, dtype)


def _shaped(values: np.ndarray, shape: Any, is_fortran: bool) -> np.ndarray:
    return values.reshape(tuple(int(n) for n in shape), order="F" if is_fortran else "C")
