"""Any file of weights → its arrays by name. Told by what the file holds, never by its name.

Nothing in a file is run, links to other files are not followed, and sizes are checked before memory
is asked for.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import h5py
import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework.graph_pb2 import GraphDef

from transfer import checkpoint
from transfer.published import caffe
from transfer.published.unpickle import TORCH_MAGIC, numpy_arrays, torch_archive, torch_arrays

MAX_BYTES = 2 * 2**30
"""Of all arrays of a file together; VGG19 with its three fully connected layers has 0.6 GB."""
_LEGACY_TORCH = b"\x8a\x0a" + TORCH_MAGIC.to_bytes(10, "little")


@dataclass(frozen=True)
class Container:
    """``kind``: what the file is, for people and for ``layouts``. ``arrays``: name to values."""

    kind: str
    arrays: dict[str, np.ndarray]


def read(path: Path) -> Container:
    """Read a file, or the checkpoint of a prefix.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of no known kind, is damaged, or holds what is not data.
    """
    if not path.is_file():
        if checkpoint.exists(path):
            return _checkpoint(path)
        if path.exists():
            raise ValueError(
                f"{str(path)!r} is not a regular file; expected a file of weights, or the prefix "
                "of a checkpoint"
            )
        raise FileNotFoundError(f"there is no file {str(path)!r}, and no checkpoint of that prefix")
    try:
        return _read(path)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    except Exception as error:  # the readers of damaged files raise what they like
        raise ValueError(
            f"{str(path)!r} cannot be read: it is damaged ({type(error).__name__}: {error})"
        ) from error


def _read(path: Path) -> Container:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(128)
        file.seek(0)
        if head.startswith(b"\x89HDF\r\n\x1a\n"):
            return Container("HDF5", _hdf5(file))
        if head.startswith(b"PK\x03\x04"):
            return _zip(file)
        if head.startswith(b"\x93NUMPY"):
            return Container("npy", _npy(file))
        if head.startswith(b"\x80") and _LEGACY_TORCH in head[:16]:
            return Container("PyTorch", torch_arrays(file))
        if head.startswith(b"MATLAB 5.0 MAT-file"):
            return Container("MatConvNet", _matconvnet(file))
        if 2 <= int.from_bytes(head[:8], "little") <= size and head[8:9] == b"{":
            return Container("safetensors", _safetensors(path))
    if _is_checkpoint(path):
        return _checkpoint(path)
    if size > MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes; expected at most {MAX_BYTES:,}")
    data = path.read_bytes()
    if arrays := _frozen_graph(data):
        return Container("frozen graph", arrays)
    if arrays := caffe.arrays(data):
        return Container("Caffe", arrays)
    raise ValueError(
        "it is none of: Keras (.h5, .keras), NumPy (.npz, .npy), PyTorch (.pth), safetensors, "
        "MatConvNet (.mat), Caffe (.caffemodel), a TensorFlow checkpoint or frozen graph; "
        f"it begins with {head[:8]!r} and has {size:,} bytes"
    )


def _hdf5(file: IO[bytes]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    total = 0
    with h5py.File(file, "r") as root:
        for name, dataset in _datasets(root, ""):
            if not np.issubdtype(dataset.dtype, np.floating) or "optimizer" in name:
                continue
            if dataset.external or dataset.is_virtual:
                raise ValueError(f"its array {name!r} lies in another file")
            total += dataset.nbytes
            _check_total(total)
            arrays[name] = dataset[()]
    return arrays


def _datasets(group: h5py.Group, path: str) -> Iterator[tuple[str, h5py.Dataset]]:
    """All arrays below a group, in the order of their names. Links to elsewhere are refused."""
    if path.count("/") > 12:
        raise ValueError("its groups are nested too deep")
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"its {path}{name!r} is a link to somewhere else")
        item = group[name]
        if isinstance(item, h5py.Group):
            yield from _datasets(item, f"{path}{name}/")
        elif isinstance(item, h5py.Dataset) and item.shape is not None:
            yield f"{path}{name}", item


def _zip(file: IO[bytes]) -> Container:
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        _check_total(sum(info.file_size for info in infos))
        names = [info.filename for info in infos]
        if "model.weights.h5" in names:
            with archive.open("model.weights.h5") as inner:
                return Container("HDF5", _hdf5(inner))
        if any(name.endswith("data.pkl") for name in names):
            return Container("PyTorch", torch_archive(archive))
        arrays = {}
        for name in names:
            if name.endswith(".npy"):
                with archive.open(name) as member:
                    size = archive.getinfo(name).file_size
                    arrays[name.removesuffix(".npy")] = _plain_npy(member, size)
        if not arrays:
            raise ValueError(f"it is a zip archive of {', '.join(names[:5])}, no weights")
        return Container("npz", arrays)


def _npy(file: IO[bytes]) -> dict[str, np.ndarray]:
    shape, _, dtype = _npy_header(file)
    if not dtype.hasobject:
        raise ValueError(f"it holds one array {shape}; expected a dictionary of layers")
    return numpy_arrays(file)


def _plain_npy(file: IO[bytes], size: int) -> np.ndarray:
    shape, is_fortran, dtype = _npy_header(file)
    if dtype.hasobject:
        raise ValueError("it has an array of Python objects")
    count = math.prod(shape)
    if count * dtype.itemsize > size:
        raise ValueError(f"it has an array {shape} in {size:,} bytes; it was cut short")
    data = file.read(count * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    reader = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if reader is None:
        raise ValueError(f"it has version {version} of NumPy's format; expected 1.0 or 2.0")
    return reader(file)


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    import safetensors

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > 2**24:
            raise ValueError(f"its header has {size:,} bytes")
    try:
        with safetensors.safe_open(path, "numpy") as opened:
            return {name: opened.get_tensor(name) for name in list(opened.keys())}
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is damaged: {error}") from error


def _matconvnet(file: IO[bytes]) -> dict[str, np.ndarray]:
    """``<layer>/0`` and ``<layer>/1``; in older files ``<layer>/filters``, ``<layer>/biases``."""
    from scipy.io import loadmat

    _check_total(_mat_size(file))
    file.seek(0)
    try:
        found = loadmat(file, struct_as_record=False, squeeze_me=True, variable_names=None)
    except Exception as error:  # of many types, for damaged files
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error
    layers = getattr(found.get("net", None), "layers", found.get("layers"))
    arrays: dict[str, np.ndarray] = {}
    for layer in np.atleast_1d(layers) if layers is not None else ():
        name = str(getattr(layer, "name", ""))
        if hasattr(layer, "filters"):
            arrays[f"{name}/filters"] = np.asarray(layer.filters)
            arrays[f"{name}/biases"] = np.atleast_1d(layer.biases)
            continue
        weights = getattr(layer, "weights", None)
        if weights is None or not len(np.atleast_1d(weights)):
            continue
        for number, values in enumerate(weights):
            arrays[f"{name}/{number}"] = np.atleast_1d(values)
    return arrays


def _mat_size(file: IO[bytes]) -> int:
    """Bytes of all elements, decompressed; those of a bomb are counted, not kept."""
    total = 0
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        little = data[126:128] == b"IM"
        position = 128
        while position + 8 <= len(data):
            kind, size = struct.unpack_from("<II" if little else ">II", data, position)
            begin, position = position + 8, position + 8 + size
            if kind != 15:  # miCOMPRESSED
                total += size
                continue
            decompressor = zlib.decompressobj()
            for start in range(begin, min(position, len(data)), 2**20):
                chunk = data[start : min(start + 2**20, position)]
                while chunk:
                    total += len(decompressor.decompress(chunk, 2**24))
                    _check_total(total)
                    chunk = decompressor.unconsumed_tail
    return total


def _frozen_graph(data: bytes) -> dict[str, np.ndarray]:
    """The constants of a frozen graph that are arrays; empty if the data are no graph."""
    graph = GraphDef()
    try:
        graph.ParseFromString(data)
    except DecodeError:
        return {}
    arrays = {}
    for node in graph.node:
        if node.op != "Const" or "value" not in node.attr:
            continue
        tensor = node.attr["value"].tensor
        if tensor.dtype != tf.float32.as_datatype_enum:
            continue
        shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
        values = np.frombuffer(tensor.tensor_content or b"", "<f4")
        if not len(values):
            values = np.asarray(tensor.float_val, np.float32)
        # What is written as one number for many is no weight.
        if shape and min(shape) > 0 and math.prod(shape) == len(values):
            arrays[node.name] = values.reshape(shape)
    return arrays


def _is_checkpoint(path: Path) -> bool:
    """Whether a file is part of a checkpoint: its index or data, or a V1 table."""
    if checkpoint.PART.search(path.name):
        return checkpoint.exists(path.with_name(checkpoint.PART.sub("", path.name)))
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8))
        return file.read(8) == (0xDB4775248B80FB57).to_bytes(8, "little")  # of a LevelDB table


def _checkpoint(path: Path) -> Container:
    opened = checkpoint.Checkpoint(path.with_name(checkpoint.PART.sub("", path.name)))
    names = [n for n, shape in opened.shapes.items() if shape and not _is_slot(n)]
    _check_total(4 * sum(math.prod(opened.shapes[name]) for name in names))
    values = opened.read({name: checkpoint.Entry(name) for name in names})
    return Container("checkpoint", {name: value.numpy() for name, value in values.items()})


def _is_slot(name: str) -> bool:
    """Whether it is an optimizer's."""
    return bool(re.search(r"/(Adam(_1)?|Momentum|RMSProp(_1)?|Adagrad|ExponentialMoving.*)$", name))


def _check_total(num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise ValueError(
            f"its arrays would take over {MAX_BYTES:,} bytes; a VGG takes less than half of that"
        )
