"""Read arrays from pickles without executing the callables that a pickle names.

A pickle is a program: it names callables and calls them. Here, a name is looked up in a short table
of stand-ins that only record their arguments; any other name is an error, or becomes an ``Inert``
object. So a ``.npy`` file with a dictionary of arrays, a PyTorch file (``torch_file``) and other
pickles can be read, without any side effects.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, ClassVar

import numpy as np

_MAX_OBJECTS, _MAX_DEPTH, _MAX_MEMO = 20_000, 6, 10**6
_MAX_OPERATIONS, _MAX_KEY_PARTS, _MAX_DIMENSIONS = 15 * 10**5, 8, 8


class UnsafePickleError(ValueError):
    """A pickle names something other than data."""


class LazyArray:
    """Base of the stand-ins of arrays and tensors: ``resolve`` makes the array."""

    def resolve(self) -> Any:
        raise NotImplementedError


class Resolver:
    """Makes the arrays of a pickle. Together they may be as large as the file: otherwise many
    arrays could be made of the same text.

    Args:
        max_bytes: size of the file.
    """

    def __init__(self, max_bytes: int):
        self._left = max_bytes

    def __call__(self, value: LazyArray) -> Any:
        """The array.

        Raises:
            ValueError: if it is damaged, or the arrays are larger than the file.
        """
        array = value.resolve()
        self._left -= array.nbytes if isinstance(array, np.ndarray) else 0
        if self._left < 0:
            raise ValueError("its arrays have more bytes than the file")
        return array


class Inert:
    """Stand-in for a class, a function or an object that is not data: whatever a pickle does with
    it is recorded nowhere, except its state, which ``torch_file`` needs to describe it.

    ``name`` is that of the class or function in the file.
    """

    def __init__(self, name: str):
        self.name = name
        self.state: Any = None

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return Inert(self.name)

    def append(self, _: Any) -> None:
        """Discard an element of a list of its own class."""

    def extend(self, _: Any) -> None:
        """Discard elements of a list of its own class."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def numpy_arrays(file: IO[bytes]) -> dict[str, np.ndarray]:
    """The arrays in a ``.npy`` file of dtype object, positioned after its header, by their path in
    the object (``conv1_1/0``). Files of Python 2 and 3 and of any NumPy version are read.

    Raises:
        UnsafePickleError: if it contains more than arrays, numbers and containers of them.
        ValueError: if it is damaged.
    """
    resolve = Resolver(size_of(file))
    return _arrays(load(file, NUMPY), resolve)


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
        is_lenient: bool,
    ):
        # Strings of Python 2 are bytes; latin1 preserves each byte.
        super().__init__(file, encoding="latin1")
        self._stand_ins = stand_ins
        self._persistent = persistent
        self._is_lenient = is_lenient
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._stand_ins:
            if self._is_lenient:
                return Inert(f"{module}.{name}")
            raise UnsafePickleError(
                f"it asks for {module}.{name}, which is not data; nothing was executed"
            )
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        return self._stand_ins[module, name]

    def _load_reduce(self) -> None:
        arguments, called = self.stack.pop(), self.stack[-1]
        self.stack[-1] = self._called(called, arguments)

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(self._called(klass, args))

    def _called(self, called: Any, arguments: Any) -> Any:
        """Call a stand-in. The elements of its arguments count as operations: a list that is in
        the pickle once could be copied any number of times."""
        self._file.count(sum(len(one) for one in arguments if isinstance(one, list | tuple)))
        return called(*arguments)

    def _load_newobj(self) -> None:
        self._make(self.stack.pop())

    def _load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments
        self._make(self.stack.pop())

    def _make(self, arguments: Any) -> None:
        """Replace the class on the stack by a new object of it."""
        kind = self.stack[-1]
        if isinstance(kind, Inert):
            self.stack[-1] = kind()
        elif isinstance(kind, type) and issubclass(kind, _DType | LazyArray | OrderedDict):
            new: Any = kind.__new__
            self.stack[-1] = new(kind, *arguments)
        else:
            raise UnsafePickleError(f"it makes an object of a {type(kind).__name__}")

    def get_extension(self, code: int) -> None:
        raise UnsafePickleError(f"it asks for extension {code}, which is not data")

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise UnsafePickleError("it refers to external objects")
        return self._persistent(pid)

    def _encode(self, text: Any, encoding: Any = "latin1") -> bytes:
        """``_codecs.encode``, which makes bytes in pickles of protocol 2. The total size is
        limited: otherwise a pickle could encode the same text a thousand times."""
        data = as_text(text).encode("latin1")
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
        if isinstance(target, Inert):
            return
        if not isinstance(target, dict):
            raise ValueError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _load_frozenset(self) -> None:
        self.append(frozenset(map(_key, self.pop_mark())))

    def _load_additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if isinstance(target, Inert):
            return
        if not isinstance(target, set):
            raise ValueError(f"it adds to a {type(target).__name__}")
        target.update(map(_key, items))

    def _load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, _DType | LazyArray | OrderedDict | Inert) or not hasattr(
            target, "__setstate__"
        ):
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
    (pickle.REDUCE, _Unpickler._load_reduce),
    (pickle.NEWOBJ, _Unpickler._load_newobj),
    (pickle.NEWOBJ_EX, _Unpickler._load_newobj_ex),
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

    def count(self, operations: int) -> None:
        """Account for operations."""
        self._operations -= operations
        if self._operations < 0:
            raise ValueError(f"it has over {_MAX_OPERATIONS:,} operations")

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        self.count(1)
        return data


def load(
    file: IO[bytes],
    stand_ins: Mapping[tuple[str, str], Any],
    persistent: Callable[[Any], Any] | None = None,
    size: int | None = None,
    *,
    is_lenient: bool = False,
) -> Any:
    """Load one object.

    Args:
        file: positioned at the beginning of the pickle.
        stand_ins: by module and name, what a pickle may call.
        persistent: called with the references of the pickle to objects outside of it.
        size: remaining bytes of the file; by default they are determined.
        is_lenient: other names become ``Inert`` objects; otherwise they are refused.

    Raises:
        UnsafePickleError: if the pickle asks for more than data.
        ValueError: if it is damaged.
    """
    try:
        if size is None:
            size = size_of(file)
        return _Unpickler(_Operations(file, size), stand_ins, persistent, is_lenient).load()
    except UnsafePickleError:
        raise
    except Exception as error:  # damaged pickles raise arbitrary exceptions
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error


def size_of(file: IO[bytes]) -> int:
    """Remaining bytes of a file."""
    start = file.tell()
    size = file.seek(0, io.SEEK_END) - start
    file.seek(start)
    return size


def _key(value: Any) -> Any:
    """Check that a key is fast to hash: hashing nested tuples, each of which contains the next one
    twice, takes exponential time."""
    if type(value) in (float, Inert):
        return value
    parts = value if type(value) is tuple and len(value) <= _MAX_KEY_PARTS else (value,)
    for part in parts:
        is_small = type(part) is int and abs(part) < 2**60
        if not (is_small or part is None or type(part) in (str, bytes, bool)):
            raise ValueError(f"it has a {type(value).__name__} as a key; expected text or numbers")
    return value


def as_shape(value: Any) -> tuple[int, ...]:
    """Check that a value is a valid shape."""
    if not isinstance(value, tuple | list) or len(value) > _MAX_DIMENSIONS:
        raise ValueError("it has an array with an invalid shape")
    if not all(type(extent) is int and 0 <= extent < 2**40 for extent in value):
        raise ValueError("it has an array with an invalid shape")
    return tuple(value)


def as_text(value: Any) -> str:
    """Check that a value is a string or bytes; ``str`` of other objects may take forever."""
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):
        raise ValueError(f"it has a {type(value).__name__} instead of a string")
    return value


class _DType:
    """Stand-in for ``numpy.dtype``."""

    def __init__(self, code: Any = "", *_: Any):
        self.code, self.order = as_text(code), "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = as_text(state[1])

    def resolve(self) -> np.dtype:
        code = self.code.lstrip("<>=|")
        if not re.fullmatch(r"[fiu][1248]|b1|O8?", code):
            raise ValueError(f"it has an array of dtype {self.code!r}")
        order = self.code[0] if self.code[:1] in "<>" and self.code else self.order
        return np.dtype(("<" if order in "=|" else order) + code)


class _Array(LazyArray):
    """Stand-in for ``numpy.ndarray``; ``resolve`` makes the array."""

    def __init__(self, *_: Any):
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def resolve(self) -> Any:
        _, shape, dtype, is_fortran, data = self.state
        resolved = dtype.resolve()
        if resolved.hasobject:
            if not isinstance(data, list):  # text would become an object per character
                raise ValueError(f"an array of objects holds {type(data).__name__}, not a list")
            # np.save stores an object as an array with one element.
            return data[0] if len(data) == 1 else data
        if isinstance(data, str):
            data = data.encode("latin1")
        shape = as_shape(shape)
        return _shaped(_values(data, resolved, math.prod(shape)), shape, bool(is_fortran))


class _Buffer(LazyArray):
    """Stand-in for ``numpy.core.numeric._frombuffer``: arrays in pickle protocol 5."""

    def __init__(self, data: Any, dtype: Any, shape: Any, order: Any = "C"):
        self.data, self.dtype, self.shape, self.order = data, dtype, shape, order

    def resolve(self) -> np.ndarray:
        shape = as_shape(self.shape)
        values = _values(self.data, self.dtype.resolve(), math.prod(shape))
        return _shaped(values, shape, self.order == "F")


class OrderedDict(dict[str, Any]):
    """Stand-in for ``collections.OrderedDict``, whose attributes are ignored."""

    def __init__(self, pairs: Any = (), *_: Any):
        """``pairs``: those of Python 2, which does not set its items one by one."""
        super().__init__()
        for pair in pairs if isinstance(pairs, list | tuple) else ():
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError("it has a dictionary of something else than pairs")
            self[_key(pair[0])] = pair[1]

    def __setstate__(self, state: Any) -> None:
        pass


def _reconstruct(*_: Any) -> _Array:
    return _Array()


NUMPY: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): None,  # a method of the unpickler
    ("collections", "OrderedDict"): OrderedDict,
}
for _module in ("numpy.core", "numpy._core"):
    NUMPY[f"{_module}.multiarray", "_reconstruct"] = _reconstruct
    NUMPY[f"{_module}.numeric", "_frombuffer"] = _Buffer


def _arrays(root: Any, resolve: Resolver) -> dict[str, np.ndarray]:
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
        if isinstance(value, LazyArray):
            if id(value) not in resolved:
                resolved[id(value)] = resolve(value)
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
