"""Read the tensors of PyTorch files by name, without executing anything and without PyTorch.

A checkpoint is more than weights: hyper-parameters, the state of optimizers and training loops,
objects of any class. Unknown objects become inert stand-ins that discard their arguments; only
dictionaries are searched, and only tensors that stand in a dictionary are read.

Sources: torch/serialization.py and torch/_utils.py of PyTorch 0.1 to 2.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import IO, Any, NamedTuple

import numpy as np

from transfer.vgg.published.unpickle import (
    Inert,
    LazyArray,
    OrderedDict,
    UnsafePickleError,
    as_shape,
    as_text,
    load,
)

MAGIC = 0x1950A86A20F9469CFC6C
"""First object in files of PyTorch before 1.6; source: torch/serialization.py, MAGIC_NUMBER."""
_MAX_PICKLE_BYTES, _MAX_DICTIONARIES, _MAX_NAMES = 2**28, 200_000, 20_000
_MAX_HEAD = 100  # tensors of a classifier
_BFLOAT16 = "bfloat16"
_TYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": _BFLOAT16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
_CLASS_LISTS = ("classes", "class_names")


class TorchFile(NamedTuple):
    """``arrays``: the tensors in dictionaries, without those of optimizers, by their path
    (``state_dict/features.0.weight``). ``labels``: class names from a ``class_to_idx`` or a list of
    ``classes``, or empty."""

    arrays: dict[str, np.ndarray]
    labels: list[str]


def read_legacy(file: IO[bytes], max_bytes: int) -> TorchFile:
    """Read a file of ``torch.save`` before PyTorch 1.6.

    Args:
        file: positioned at its beginning.
        max_bytes: limit for all tensors together.

    Raises:
        UnsafePickleError: if it is a whole module instead of weights.
        ValueError: if it is damaged or has no weights.
    """
    storages = _Storages(max_bytes)
    magic, _, system, saved = (
        load(file, _STAND_INS, storages.of, is_lenient=True) for _ in range(4)
    )
    if magic != MAGIC or not isinstance(system, dict) or not system.get("little_endian"):
        raise ValueError("it is not a PyTorch file of a little-endian machine")
    keys = load(file, {})
    if not isinstance(keys, list):
        raise ValueError("it is damaged: its storages are not a list")
    for key in keys:
        storage = storages.get(as_text(key))
        if file.read(8) != struct.pack("<q", storage.count):
            raise ValueError(f"its storage {storage.key!r} has a size other than its tensors")
        storage.read = storages.limited(
            partial(_read_at, file, file.tell(), storage.num_bytes), storage
        )
        file.seek(storage.num_bytes, io.SEEK_CUR)
    return _contents(saved)


def _read_at(file: IO[bytes], position: int, num_bytes: int) -> bytes:
    file.seek(position)
    return file.read(num_bytes)


def read_archive(archive: zipfile.ZipFile, max_bytes: int) -> TorchFile:
    """Read a file of ``torch.save`` of PyTorch 1.6 and newer.

    Args:
        archive: the file, a zip archive.
        max_bytes: limit for all tensors together.

    Raises:
        UnsafePickleError, ValueError: see ``read_legacy``.
    """
    names = set(archive.namelist())
    pickles = [name for name in names if name.endswith("data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it has {len(pickles)} files data.pkl; expected one")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in names:
        raise UnsafePickleError(
            "it is a TorchScript program (torch.jit.save), and no code of a file is run; save its "
            "weights where it was made: torch.save(torch.jit.load('FILE').state_dict(), "
            "'weights.pth')"
        )
    order = f"{root}byteorder"
    if (
        order in names
        and archive.getinfo(order).file_size < 64
        and archive.read(order) != b"little"
    ):
        raise ValueError("it was written on a big-endian machine")
    storages = _Storages(max_bytes)
    with archive.open(pickles[0]) as file:
        size = archive.getinfo(pickles[0]).file_size
        if size > _MAX_PICKLE_BYTES:
            raise ValueError(f"its data.pkl has {size:,} bytes; expected names and shapes")
        saved = load(file, _STAND_INS, storages.of, size, is_lenient=True)
    for storage in storages.all:
        name = f"{root}data/{storage.key}"
        if name not in names:
            raise ValueError(f"its storage {storage.key!r} is missing; it was cut short")
        if archive.getinfo(name).file_size != storage.num_bytes:
            raise ValueError(f"its storage {storage.key!r} has a size other than its tensors")
        storage.read = storages.limited(partial(archive.read, name), storage)
    return _contents(saved)


def _contents(root: Any) -> TorchFile:
    """The tensors in an object; see ``TorchFile``."""
    arrays: dict[str, np.ndarray] = {}
    labels: list[str] = []
    module = root if _is_module(root) else None
    for path, values in _dictionaries(root):
        tensors = {key: found for key, value in values.items() if (found := _tensor(value))}
        if not any(tensor.has_window for tensor in tensors.values()) and not _is_head(tensors):
            tensors = {}  # class weights, metrics; the state of a network has convolutions
        if len(arrays) + len(tensors) > _MAX_NAMES:
            raise ValueError(f"it holds over {_MAX_NAMES:,} tensors")
        arrays |= {"/".join((*path, str(key))): t.resolve() for key, t in tensors.items()}
        for key, value in values.items():
            if module is None and _is_module(value):
                module = value
            elif (
                tensors
                and isinstance(value, Inert)
                and value.name.startswith("torch._utils._rebuild")
            ):
                raise ValueError(
                    f"its {key} is a tensor of {value.name}, which is not read; expected one of "
                    "16, 32 or 64 bits on a CPU or GPU, not quantized or sparse"
                )
            labels = labels or _class_names(key, value)
    if not any(values.ndim == 4 for values in arrays.values()):
        raise UnsafePickleError(_no_weights(root, module))
    return TorchFile(arrays, labels)


def _dictionaries(root: Any) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    """All dictionaries in dictionaries by their path, each once; other objects are not entered."""
    seen: set[int] = set()
    pending: list[tuple[tuple[str, ...], Any]] = [((), root)]
    while pending:
        path, values = pending.pop()
        if not isinstance(values, dict) or id(values) in seen:
            continue
        seen.add(id(values))
        if len(seen) > _MAX_DICTIONARIES:
            raise ValueError(f"it holds over {_MAX_DICTIONARIES:,} dictionaries")
        yield path, values
        if len(path) < 16:  # deeper dictionaries hold no state of a model
            pending += [
                ((*path, str(key)), value)
                for key, value in reversed(values.items())
                if isinstance(value, dict)
                and not str(key).startswith("opt")  # optimizer, optim_state, opt_G
            ]


def _tensor(value: Any) -> _Tensor | None:
    """The tensor of a tensor or parameter, ``None`` for other values."""
    value = value.data if isinstance(value, _Parameter) else value
    return value if isinstance(value, _Tensor) else None


def _is_head(tensors: dict[Any, _Tensor]) -> bool:
    """Whether a dictionary may be the state of a classifier that was saved beside its features."""
    return len(tensors) <= _MAX_HEAD and any(
        str(key).endswith(".weight") and tensor.is_matrix for key, tensor in tensors.items()
    )


def _is_module(value: Any) -> bool:
    return isinstance(value, Inert) and isinstance(value.state, dict) and "_modules" in value.state


def _no_weights(root: Any, module: Inert | None) -> str:
    """Why a file without any tensors in dictionaries is refused."""
    if module is not None:
        loaded = "torch.load('FILE', weights_only=False)"
        if module is not root and isinstance(root, dict):
            key = next((str(key) for key, value in root.items() if value is module), "model")
            loaded += f"[{key!r}]"
        return (
            f"it is a whole model ({module.name}), not its weights: to load it would run Python "
            f"code. Save its weights where it was made: torch.save({loaded}.state_dict(), "
            "'weights.pth')"
        )
    if isinstance(root, Inert):
        return f"it asks for {root.name}, which is not data; nothing was executed"
    if isinstance(root, list | tuple):
        return (
            f"it holds a list of {len(root):,} objects without names; expected a state dict: "
            "torch.save(model.state_dict(), 'weights.pth')"
        )
    return "it has no tensors; expected a state dict: torch.save(model.state_dict(), 'weights.pth')"


def _class_names(key: Any, value: Any) -> list[str]:
    """The names of a ``class_to_idx`` or a list of names; empty for other entries."""
    if key == "class_to_idx" and isinstance(value, dict) and 0 < len(value) <= _MAX_NAMES:
        names = {index: name for name, index in value.items() if type(index) is int}
        if sorted(names) == list(range(len(value))) and all(isinstance(n, str) for n in value):
            return [names[index] for index in range(len(value))]
    if key == "idx_to_class" and isinstance(value, dict) and 0 < len(value) <= _MAX_NAMES:
        indices = [index for index in value if type(index) is int]
        if sorted(indices) == list(range(len(value))):
            names = {index: name for index, name in value.items() if isinstance(name, str)}
            return [names[index] for index in range(len(value))] if len(names) == len(value) else []
    if key in _CLASS_LISTS and isinstance(value, list | tuple) and len(value) <= _MAX_NAMES:
        return list(value) if all(isinstance(name, str) for name in value) else []
    return []


@dataclass
class _Storage:
    """``read`` returns its bytes; it is called once, when a tensor is needed."""

    key: str
    code: str
    count: int
    read: Callable[[], bytes] | None = None

    @property
    def num_bytes(self) -> int:
        return self.count * (2 if self.code == _BFLOAT16 else np.dtype(self.code).itemsize)

    @cached_property
    def values(self) -> np.ndarray:
        if self.read is None:
            raise ValueError("it has a tensor without its values; it was cut short")
        data = self.read()
        if len(data) != self.num_bytes:
            raise ValueError("it has an array whose data do not fill its shape; it was cut short")
        if self.code == _BFLOAT16:
            return from_bfloat16(data)
        return np.frombuffer(data, self.code)


def from_bfloat16(data: bytes | memoryview) -> np.ndarray:
    """Values of the type bfloat16, the upper half of float32, as float32 of one dimension."""
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


@dataclass(frozen=True)
class _StorageType:
    code: str

    def __call__(self, *_: Any) -> Any:
        raise UnsafePickleError("it creates a storage")


class _Tensor(LazyArray):
    """Stand-in for ``torch._utils._rebuild_tensor_v2``, and for ``torch.FloatTensor``, whose state
    is set in old files."""

    def __init__(self, storage: Any, offset: int, size: Any, stride: Any, *_: Any):
        self.__setstate__((storage, offset, size, stride))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.storage, self.offset, self.size, self.stride = state[:4]

    @property
    def is_matrix(self) -> bool:
        """Whether it has the dimensions of the kernel of a fully connected layer."""
        return isinstance(self.size, tuple | list) and len(self.size) == 2

    @property
    def has_window(self) -> bool:
        """Whether it has the dimensions of the kernel of a convolution."""
        return isinstance(self.size, tuple | list) and len(self.size) == 4

    def resolve(self) -> np.ndarray:
        size, stride = as_shape(self.size), as_shape(self.stride)
        if isinstance(self.storage, Inert):
            raise ValueError(f"it has a tensor of {self.storage.name}; expected floats or integers")
        if not isinstance(self.storage, _Storage) or type(self.offset) is not int:
            raise ValueError("it has a tensor without a storage")
        if len(size) != len(stride):
            raise ValueError(f"it has a tensor of shape {size} with strides {stride}")
        if not math.prod(size):
            return np.zeros(size, np.float32)
        steps = [(extent - 1) * step for extent, step in zip(size, stride, strict=True)]
        # No larger than its storage: an expanded tensor would take any amount of memory.
        if (
            self.offset < 0
            or self.offset + sum(steps) >= self.storage.count
            or math.prod(size) > self.storage.count
        ):
            raise ValueError("it has a tensor outside of its storage")
        values = self.storage.values[self.offset :]
        strides = [step * values.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(values, size, strides, writeable=False)


class _Parameter:
    """Stand-in for ``torch._utils._rebuild_parameter``."""

    def __init__(self, data: Any, *_: Any):
        self.data = data


def _of_subclass(maker: Any, _: Any = None, arguments: Any = (), *__: Any) -> Any:
    """Stand-in for ``torch._tensor._rebuild_from_type_v2``, a tensor with Python attributes."""
    if maker in (_Tensor, _Parameter) and isinstance(arguments, tuple):
        return maker(*arguments)
    return Inert("torch.Tensor")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_subclass,
} | {("torch", name): _StorageType(code) for name, code in _TYPES.items()}
_STAND_INS |= {("torch", name.replace("Storage", "Tensor")): _Tensor for name in _TYPES}


class _Storages:
    """The storages that the tensors of a file share, by key."""

    def __init__(self, max_bytes: int) -> None:
        self._by_key: dict[str, _Storage] = {}
        self._max_bytes = self._left = max_bytes

    def limited(self, read: Callable[[], bytes], storage: _Storage) -> Callable[[], bytes]:
        """``read`` with a check that the total of all reads stays within the limit."""

        def checked() -> bytes:
            self._left -= storage.num_bytes * (2 if storage.code == _BFLOAT16 else 1)
            if self._left < 0:
                raise ValueError(
                    f"its arrays would take over {self._max_bytes:,} bytes; a VGG takes less than "
                    "half of that"
                )
            return read()

        return checked

    def of(self, pid: Any) -> Any:
        """The storage of ``("storage", type, key, device, number of elements, ...)``; for
        ``("module", class, ...)``, the source code of a class in old files, its stand-in."""
        if not isinstance(pid, tuple) or len(pid) < 2:
            raise ValueError("it refers to something else than a storage")
        kind = as_text(pid[0])
        if kind == "module":
            return pid[1] if isinstance(pid[1], Inert) else Inert("torch.nn.Module")
        storage_type, key, _, count = pid[1:5]
        if kind != "storage":
            raise UnsafePickleError(f"it refers to {kind!r} outside of it")
        if isinstance(storage_type, Inert):
            return storage_type
        if not isinstance(storage_type, _StorageType):
            raise UnsafePickleError("it has a storage of an unknown type")
        (count,) = as_shape([count])
        new = _Storage(as_text(key), storage_type.code, count)
        return self._by_key.setdefault(new.key, new)

    def get(self, key: str) -> _Storage:
        if key not in self._by_key:
            raise ValueError(f"no tensor needs its storage {key!r}; it is damaged")
        return self._by_key[key]

    @property
    def all(self) -> list[_Storage]:
        return list(self._by_key.values())
