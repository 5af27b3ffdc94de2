"""Read arrays from pickles without executing the callables that a pickle names.

A pickle is a program: it names callables and calls them. Here, a name is looked up in a short table
of stand-ins that only record their arguments; any other name is an error. So a ``.npy`` file with a
dictionary of arrays and a PyTorch file can be read, without any side effects.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import IO, Any, ClassVar

import numpy as np

TORCH_MAGIC = 0x1950A86A20F9469CFC6C
"""First object in files of PyTorch before 1.6; source: torch/serialization.py, MAGIC_NUMBER."""
_MAX_PICKLE_BYTES = 2**28
_MAX_OBJECTS, _MAX_DEPTH, _MAX_MEMO = 20_000, 6, 10**6
_MAX_OPERATIONS, _MAX_KEY_PARTS, _MAX_DIMENSIONS = 15 * 10**5, 8, 8
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
    """A pickle names something other than data."""


def numpy_arrays(file: IO[bytes]) -> dict[str, np.ndarray]:
    """The arrays in a ``.npy`` file of dtype object, positioned after its header, by their path in
    the object (``conv1_1/0``). Files of Python 2 and 3 and of any NumPy version are read.

    Raises:
        UnsafePickleError: if it contains more than arrays, numbers and containers of them.
        ValueError: if it is damaged.
    """
    return _arrays(_load(file, _NUMPY))


def torch_arrays(file: IO[bytes], max_bytes: int) -> dict[str, np.ndarray]:
    """The tensors in a file of ``torch.save`` before PyTorch 1.6, by their path in the object
    (``state_dict/features.0.weight``).

    Args:
        file: positioned at its beginning.
        max_bytes: limit for all tensors together.

    Raises:
        UnsafePickleError, ValueError: see ``numpy_arrays``.
    """
    storages = _Storages(max_bytes)
    magic, _, system, saved = (_load(file, _TORCH, storages.of) for _ in range(4))
    if magic != TORCH_MAGIC or not isinstance(system, dict) or not system.get("little_endian"):
        raise ValueError("it is not a PyTorch file of a little-endian machine")
    keys = _load(file, {})
    if not isinstance(keys, list):
        raise ValueError("it is damaged: its storages are not a list")
    for key in keys:
        storage = storages.get(_text(key))
        if file.read(8) != struct.pack("<q", storage.count):
            raise ValueError(f"its storage {storage.key!r} has a size other than its tensors")
        storage.read = storages.limited(
            partial(_read_at, file, file.tell(), storage.num_bytes), storage
        )
        file.seek(storage.num_bytes, io.SEEK_CUR)
    return _arrays(saved)


def _read_at(file: IO[bytes], position: int, num_bytes: int) -> bytes:
    file.seek(position)
    return file.read(num_bytes)


def torch_archive(archive: zipfile.ZipFile, max_bytes: int) -> dict[str, np.ndarray]:
    """The tensors in a file of ``torch.save`` of PyTorch 1.6 and newer, by their path in the
    object.

    Args:
        archive: the file, a zip archive.
        max_bytes: limit for all tensors together.

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
    storages = _Storages(max_bytes)
    with archive.open(pickles[0]) as file:
        size = archive.getinfo(pickles[0]).file_size
        if size > _MAX_PICKLE_BYTES:
            raise ValueError(f"its data.pkl has {size:,} bytes; expected names and shapes")
        saved = _load(file, _TORCH, storages.of, size)
    for storage in storages.all:
        name = f"{root}data/{storage.key}"
        if name not in names:
            raise ValueError(f"its storage {storage.key!r} is missing; it was cut short")
        if archive.getinfo(name).file_size != storage.num_bytes:
            raise ValueError(f"its storage {storage.key!r} has a size other than its tensors")
        storage.read = storages.limited(partial(archive.read, name), storage)
    return _arrays(saved)


class _Unpickler(pickle._Unpickler):
    """The pure Python unpickler of the standard library: unlike the C one, it can be interrupted,
    its operations can be counted, and those that could run forever or modify a class can be
    replaced."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    stack: list[Any]
    memo: dict[int, Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self,
        file: _Operations,
        stand_ins: Mapping[tuple[str, str], Any],
        persistent: Callable[[Any], Any] | None,
    ):
        # Strings of Python 2 are bytes; latin1 preserves each byte.
        super().__init__(file, encoding="latin1")
        self._stand_ins = stand_ins
        self._persistent = persistent
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._stand_ins:
            raise UnsafePickleError(
                f"it asks for {module}.{name}, which is not data; nothing was executed"
            )
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        return self._stand_ins[module, name]

    def get_extension(self, code: int) -> None:
        raise UnsafePickleError(f"it asks for extension {code}, which is not data")

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise UnsafePickleError("it refers to external objects")
        return self._persistent(pid)

    def _encode(self, text: Any, encoding: Any = "latin1") -> bytes:
        """``_codecs.encode``, which makes bytes in pickles of protocol 2. The total size is
        limited: otherwise a pickle could encode the same text a thousand times."""
        data = _text(text).encode("latin1")
        self._file.allow(len(data))
        return data

    def _load_frame(self) -> None:
        self.read(8)  # frames are only a hint for read-ahead

    def _load_bytearray(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    def _load_put(self) -> None:
        self._put(int(self.readline()[:-1]))

    def _load_long_binput(self) -> None:
        self._put(struct.unpack("<I", self.read(4))[0])

    def _put(self, place: int) -> None:
        if not 0 <= place <= _MAX_MEMO:
            raise ValueError(f"its memo index {place} is invalid; expected 0 to {_MAX_MEMO}")
        self.memo[place] = self.stack[-1]

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items(self.stack[-1], [key, value])

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        self._set_items(self.stack[-1], items)

    def _load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(self.stack[-1], items)

    @staticmethod
    def _set_items(target: Any, items: Sequence[Any]) -> None:
        if not isinstance(target, dict):
            raise ValueError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _load_frozenset(self) -> None:
        self.append(frozenset(map(_key, self.pop_mark())))

    def _load_additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if not isinstance(target, set):
            raise ValueError(f"it adds to a {type(target).__name__}")
        target.update(map(_key, items))

    def _load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, _DType | _Array | _Tensor | _Dict):
            raise UnsafePickleError(
                f"it sets the state of a {type(target).__name__}, which has none; nothing was set"
            )
        target.__setstate__(state)


for _operation, _replacement in (
    (pickle.FRAME, _Unpickler._load_frame),
    (pickle.BYTEARRAY8, _Unpickler._load_bytearray),
    (pickle.PUT, _Unpickler._load_put),
    (pickle.LONG_BINPUT, _Unpickler._load_long_binput),
    (pickle.SETITEM, _Unpickler._load_setitem),
    (pickle.SETITEMS, _Unpickler._load_setitems),
    (pickle.DICT, _Unpickler._load_dict),
    (pickle.FROZENSET, _Unpickler._load_frozenset),
    (pickle.ADDITEMS, _Unpickler._load_additems),
    (pickle.BUILD, _Unpickler._load_build),
):
    _Unpickler.dispatch[_operation[0]] = _replacement


class _Operations:
    """A file for the unpickler, with limits on the number of reads and on the bytes read."""

    def __init__(self, file: IO[bytes], size: int):
        self._file, self._left, self._extra = file, size, size
        self._operations = _MAX_OPERATIONS

    def read(self, size: int) -> bytes:
        return self._counted(self._file.read(min(size, self._left)))

    def readline(self) -> bytes:
        return self._counted(self._file.readline(self._left))

    def allow(self, size: int) -> None:
        """Account for additional memory; in total it may be as large as the file."""
        self._extra -= size
        if self._extra < 0:
            raise ValueError("it encodes more bytes than the file has")

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        self._operations -= 1
        if self._operations < 0:
            raise ValueError(f"it has over {_MAX_OPERATIONS:,} operations")
        return data


def _load(
    file: IO[bytes],
    stand_ins: Mapping[tuple[str, str], Any],
    persistent: Callable[[Any], Any] | None = None,
    size: int | None = None,
) -> Any:
    """Load one object. ``size``: remaining bytes of the file; by default they are determined."""
    try:
        if size is None:
            start = file.tell()
            size = file.seek(0, io.SEEK_END) - start
            file.seek(start)
        return _Unpickler(_Operations(file, size), stand_ins, persistent).load()
    except UnsafePickleError:
        raise
    except Exception as error:  # damaged pickles raise arbitrary exceptions
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error


def _key(value: Any) -> Any:
    """Check that a key is fast to hash: hashing nested tuples, each of which contains the next one
    twice, takes exponential time."""
    parts = value if type(value) is tuple and len(value) <= _MAX_KEY_PARTS else (value,)
    for part in parts:
        is_small = type(part) is int and abs(part) < 2**60
        if not (is_small or part is None or type(part) in (str, bytes, bool)):
            raise ValueError(f"it has a {type(value).__name__} as a key; expected text or numbers")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    """Check that a value is a valid shape."""
    if not isinstance(value, tuple | list) or len(value) > _MAX_DIMENSIONS:
        raise ValueError("it has an array with an invalid shape")
    if not all(type(extent) is int and 0 <= extent < 2**40 for extent in value):
        raise ValueError("it has an array with an invalid shape")
    return tuple(value)


def _text(value: Any) -> str:
    """Check that a value is a string or bytes; ``str`` of other objects may take forever."""
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):
        raise ValueError(f"it has a {type(value).__name__} instead of a string")
    return value


class _DType:
    """Stand-in for ``numpy.dtype``."""

    def __init__(self, code: Any = "", *_: Any):
        self.code, self.order = _text(code), "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = _text(state[1])

    def resolve(self) -> np.dtype:
        code = self.code.lstrip("<>=|")
        if not re.fullmatch(r"[fiu][1248]|b1|O8?", code):
            raise ValueError(f"it has an array of dtype {self.code!r}")
        order = self.code[0] if self.code[:1] in "<>" and self.code else self.order
        return np.dtype(("<" if order in "=|" else order) + code)


class _Array:
    """Stand-in for ``numpy.ndarray``; ``resolve`` makes the array."""

    def __init__(self, *_: Any):
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def resolve(self) -> Any:
        _, shape, dtype, is_fortran, data = self.state
        resolved = dtype.resolve()
        if resolved.hasobject:
            # np.save stores an object as an array with one element.
            return data[0] if len(data) == 1 else list(data)
        if isinstance(data, str):
            data = data.encode("latin1")
        shape = _shape(shape)
        return _shaped(_values(data, resolved, math.prod(shape)), shape, bool(is_fortran))


class _Buffer:
    """Stand-in for ``numpy.core.numeric._frombuffer``: arrays in pickle protocol 5."""

    def __init__(self, data: Any, dtype: Any, shape: Any, order: Any = "C"):
        self.data, self.dtype, self.shape, self.order = data, dtype, shape, order

    def resolve(self) -> np.ndarray:
        shape = _shape(self.shape)
        values = _values(self.data, self.dtype.resolve(), math.prod(shape))
        return _shaped(values, shape, self.order == "F")


class _Dict(dict[str, Any]):
    """Stand-in for ``collections.OrderedDict``, whose attributes are ignored."""

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass
class _Storage:
    """``read`` returns its bytes; it is called once, when a tensor is needed."""

    key: str
    dtype: np.dtype
    count: int
    read: Callable[[], bytes] | None = None

    @property
    def num_bytes(self) -> int:
        return self.count * self.dtype.itemsize

    @cached_property
    def values(self) -> np.ndarray:
        if self.read is None:
            raise ValueError("it has a tensor without its values; it was cut short")
        return _values(self.read(), self.dtype, self.count)


@dataclass(frozen=True)
class _StorageType:
    code: str

    def __call__(self, *_: Any) -> Any:
        raise UnsafePickleError("it creates a storage")


class _Tensor:
    """Stand-in for ``torch._utils._rebuild_tensor_v2``, and for ``torch.FloatTensor``, whose state
    is set in old files."""

    def __init__(self, storage: Any, offset: int, size: Any, stride: Any, *_: Any):
        self.__setstate__((storage, offset, size, stride))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.storage, self.offset, self.size, self.stride = state[:4]

    def resolve(self) -> np.ndarray:
        size, stride = _shape(self.size), _shape(self.stride)
        count = math.prod(size)
        expected = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
        strides = zip(size, stride, expected, strict=True)
        if any(extent != 1 and stride != wanted for extent, stride, wanted in strides):
            raise ValueError("it has a tensor that is not contiguous; save it after contiguous()")
        if not isinstance(self.storage, _Storage) or type(self.offset) is not int:
            raise ValueError("it has a tensor without a storage")
        if self.offset < 0 or self.offset + count > self.storage.count:
            raise ValueError("it has a tensor outside of its storage")
        values = self.storage.values
        return values[self.offset : self.offset + count].reshape(size)


class _Parameter:
    """Stand-in for ``torch._utils._rebuild_parameter``."""

    def __init__(self, data: Any, *_: Any):
        self.data = data

    def resolve(self) -> Any:
        return self.data


def _reconstruct(*_: Any) -> _Array:
    return _Array()


_NUMPY: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): None,  # a method of the unpickler
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
    """The storages that the tensors of a file share, by key."""

    def __init__(self, max_bytes: int) -> None:
        self._by_key: dict[str, _Storage] = {}
        self._max_bytes = self._left = max_bytes

    def limited(self, read: Callable[[], bytes], storage: _Storage) -> Callable[[], bytes]:
        """``read`` with a check that the total of all reads stays within the limit."""

        def checked() -> bytes:
            self._left -= storage.num_bytes
            if self._left < 0:
                raise ValueError(
                    f"its arrays would take over {self._max_bytes:,} bytes; a VGG takes less than "
                    "half of that"
                )
            return read()

        return checked

    def of(self, pid: Any) -> _Storage:
        """The storage of ``("storage", type, key, device, number of elements, ...)``."""
        kind, storage_type, key, _, count = pid[:5]
        if _text(kind) != "storage" or not isinstance(storage_type, _StorageType):
            raise UnsafePickleError(f"it refers to {_text(kind)!r} outside of it")
        (count,) = _shape([count])
        new = _Storage(_text(key), np.dtype(storage_type.code), count)
        return self._by_key.setdefault(new.key, new)

    def get(self, key: str) -> _Storage:
        if key not in self._by_key:
            raise ValueError(f"no tensor needs its storage {key!r}; it is damaged")
        return self._by_key[key]

    @property
    def all(self) -> list[_Storage]:
        return list(self._by_key.values())


def _arrays(root: Any) -> dict[str, np.ndarray]:
    """All arrays in an object by their path, without those of optimizers.

    The depth and the number of objects are limited: a pickle of a few bytes can contain itself.
    """
    arrays: dict[str, np.ndarray] = {}
    resolved: dict[int, Any] = {}
    pending: list[tuple[tuple[str, ...], Any]] = [((), root)]
    for _ in range(_MAX_OBJECTS):
        if not pending:
            return arrays
        path, value = pending.pop()
        if isinstance(value, _Array | _Buffer | _Tensor | _Parameter):
            if id(value) not in resolved:
                resolved[id(value)] = value.resolve()
            pending.append((path, resolved[id(value)]))
        elif isinstance(value, np.ndarray):
            arrays["/".join(path)] = value
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            if len(path) == _MAX_DEPTH:
                break
            pending += [
                ((*path, str(key)), item)
                for key, item in reversed(list(items))
                if not str(key).startswith("optimizer")
            ]
    raise ValueError(f"it holds over {_MAX_OBJECTS:,} objects, or is nested over {_MAX_DEPTH} deep")


def _values(data: bytes, dtype: np.dtype, count: int) -> np.ndarray:
    if not isinstance(data, bytes | bytearray) or count < 0 or len(data) != count * dtype.itemsize:
        raise ValueError("it has an array whose data do not fill its shape; it was cut short")
    return np.frombuffer(data, dtype)


def _shaped(values: np.ndarray, shape: tuple[int, ...], is_fortran: bool) -> np.ndarray:
    return values.reshape(shape, order="F" if is_fortran else "C")
