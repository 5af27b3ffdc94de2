"""Read the arrays of any weight file by name. The format is identified by the contents.

Nothing in a file is executed, links to other files are not followed, and sizes are checked before
memory is allocated.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np

from transfer.models import checkpoint
from transfer.vgg.published import (
    caffe,
    foreign,
    keras_model,
    keras_weights,
    matlab,
    mxnet,
    onnx_model,
    pickles,
    torch_file,
    wire,
)
from transfer.vgg.published.unpickle import numpy_arrays

MAX_BYTES = 5 * 2**28
"""Limit for all arrays of a file, without those of optimizers. VGG19 with its three fully connected
layers has 0.6 GB in float32, and twice that in float64."""
_MAX_DIMENSIONS, _MAX_ENTRIES = 8, 20_000
_MAX_CHUNKS, _MAX_ATTRIBUTE_BYTES = 100_000, 2**26
_MAX_COMPRESSION = 1100  # deflate expands a byte to at most 1032
_SAFETENSORS_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}
_MAX_DIRECTORY_BYTES = 2**22  # of a zip archive
_LEGACY_TORCH = b"\x8a\x0a" + torch_file.MAGIC.to_bytes(10, "little")
_TABLE_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")  # ends a LevelDB table


@dataclass(frozen=True)
class Container:
    """``kind``: file format, for messages and for ``layouts``. ``arrays``: values by name.

    Further contents of some files: ``model``, the layers of a Keras model; ``order``, the layer
    names of a Keras weight file, which has no more than these; ``preprocess``, the preprocessing of
    the network; ``labels``, the class names.
    """

    kind: str
    arrays: dict[str, np.ndarray]
    model: keras_model.Model | None = None
    order: Sequence[str] = ()
    preprocess: dict[str, Any] | None = None
    labels: Sequence[str] = field(default=())


def read(path: Path) -> Container:
    """Read a file, or the checkpoint of a prefix.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if the format is unknown, or the file is damaged or contains more than data.
    """
    if path.is_dir():
        if any((path / name).is_file() for name in ("saved_model.pb", "saved_model.pbtxt")):
            raise ValueError(
                f"{str(path)!r} is a SavedModel, which is used without conversion: give the folder "
                "itself as the model"
            )
        raise ValueError(f"{str(path)!r} is a folder; expected a file of weights")
    if not path.is_file():
        if path.name and checkpoint.exists(path):
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
    except Exception as error:  # readers raise arbitrary exceptions for damaged files
        raise ValueError(
            f"{str(path)!r} cannot be read: it is damaged ({type(error).__name__}: {error})"
        ) from error


def _read(path: Path) -> Container:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(128)
        file.seek(0)
        if head.startswith(b"\x89HDF\r\n\x1a\n"):
            return _hdf5(file, preprocess=_keras_hub(path))
        if head.startswith(b"PK\x03\x04"):
            return _zip(file)
        if head.startswith(b"\x93NUMPY"):
            return Container("npy", _npy(file))
        if head.startswith(b"\x80") and _LEGACY_TORCH in head[:16]:
            return _torch(torch_file.read_legacy(file, MAX_BYTES))
        if head.startswith(mxnet.MAGIC):
            _check_total(size)
            return Container("MXNet", mxnet.arrays(_mapped(path)))
        if re.match(rb"\x80[\x02-\x05]", head):
            _check_total(size)
            found = pickles.read(file)
            return Container(
                found.kind, found.arrays, preprocess=found.preprocess, labels=found.labels
            )
        if head.startswith(b"MATLAB 5.0 MAT-file"):
            _check_total(size)
            return _matconvnet(_mapped(path))
        if 2 <= int.from_bytes(head[:8], "little") <= size and head[8:9] == b"{":
            return Container("safetensors", _safetensors(path))
    if kind := foreign.kind_of(head, size):
        raise ValueError(kind)
    if _is_checkpoint(path):
        return _checkpoint(path)
    if size > MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes; expected at most {MAX_BYTES:,}")
    data = _mapped(path)
    if (model := onnx_model.read(data)) is not None:
        layers = (*model.layers, *model.branches)
        arrays = {f"{one.name}/{role}": v for one in layers for role, v in one.arrays.items()}
        return Container("ONNX", arrays, model)
    if kind := foreign.kind_of_message(data):
        raise ValueError(kind)
    if arrays := _frozen_graph(data):
        return Container("frozen graph", arrays)
    if arrays := caffe.arrays(data):
        return Container("Caffe", arrays)
    raise ValueError(
        "it is none of: Keras (.h5, .keras), NumPy (.npz, .npy), PyTorch (.pth), safetensors, "
        "MatConvNet (.mat), Caffe (.caffemodel), ONNX, MXNet (.params), Paddle (.pdparams), "
        "Lasagne (.pkl), a TensorFlow checkpoint or frozen graph; "
        f"it begins with {head[:8]!r} and has {size:,} bytes"
    )


def _torch(contents: torch_file.TorchFile) -> Container:
    return Container("PyTorch", contents.arrays, labels=contents.labels)


def _mapped(path: Path) -> memoryview:
    """A file as memory-mapped bytes, which are read on access; arrays are views of them."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _hdf5(
    file: IO[bytes], config: bytes | None = None, preprocess: dict[str, Any] | None = None
) -> Container:
    """``config`` is the model's configuration if it is stored separately from the weights."""
    arrays: dict[str, np.ndarray] = {}
    total = 0
    with h5py.File(file, "r") as root:
        for name, dataset in _datasets(root):
            if not np.issubdtype(dataset.dtype, np.floating) or "optimizer" in name:
                continue
            total += dataset.nbytes
            _check_total(total)
            _check_stored(name, dataset)
            arrays[name] = dataset[()]
        is_legacy = config is None
        config = config or _attribute(root, "model_config")
        weights = root.get("model_weights", root) if is_legacy else root
        order = _names(weights, "layer_names") or _group_names(root)
    model = keras_model.read(config, arrays, is_legacy=is_legacy) if config else None
    return Container("HDF5", arrays, model, order, preprocess)


def _datasets(root: h5py.Group) -> Iterator[tuple[str, h5py.Dataset]]:
    """All arrays of a file, in the order of their names. External and soft links, and several links
    to one group, are refused."""
    seen: set[int] = set()
    pending: list[tuple[str, h5py.Group]] = [("", root)]
    for _ in range(_MAX_ENTRIES):
        if not pending:
            return
        path, group = pending.pop()
        if path.count("/") > 12:
            raise ValueError("its groups are nested too deep")
        address = h5py.h5o.get_info(group.id).addr
        if address in seen:
            raise ValueError(f"its group {path!r} is there under another name already")
        seen.add(address)
        if len(group) > _MAX_ENTRIES:
            raise ValueError(f"its group {path!r} has {len(group):,} entries")
        groups = []
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"its {path}{name!r} is a link to somewhere else")
            item = group[name]
            if isinstance(item, h5py.Group):
                groups.append((f"{path}{name}/", item))
            elif isinstance(item, h5py.Dataset) and item.shape is not None:
                yield f"{path}{name}", item
        pending += reversed(groups)
    raise ValueError(f"it has over {_MAX_ENTRIES:,} groups")


def _check_stored(name: str, dataset: h5py.Dataset) -> None:
    """Check that the values of an array are stored in this file, in a form that is fast to read."""
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"its array {name!r} lies in another file")
    if dataset.ndim > _MAX_DIMENSIONS:
        raise ValueError(f"its array {name!r} has {dataset.ndim} dimensions")
    stored = dataset.id.get_storage_size()
    if dataset.nbytes > _MAX_COMPRESSION * stored:
        raise ValueError(
            f"its array {name!r} {dataset.shape} has {stored:,} bytes in the file; it was never "
            "written, or it was cut short"
        )
    if dataset.chunks:
        each = zip(dataset.shape, dataset.chunks, strict=True)
        chunks = math.prod(-(-extent // chunk) for extent, chunk in each)
        if chunks > _MAX_CHUNKS:
            raise ValueError(f"its array {name!r} is in {chunks:,} pieces")
        _check_total(math.prod(dataset.chunks) * dataset.dtype.itemsize)


def _attribute(group: h5py.Group, name: str) -> bytes | None:
    """A text attribute of a group; ``None`` if it does not exist."""
    if name not in group.attrs:
        return None
    if group.attrs.get_id(name).get_storage_size() > _MAX_ATTRIBUTE_BYTES:
        raise ValueError(f"its {name} has over {_MAX_ATTRIBUTE_BYTES:,} bytes")
    value = group.attrs[name]
    if isinstance(value, str):
        return value.encode()
    return bytes(value) if isinstance(value, bytes) else None


def _names(group: h5py.Group, name: str) -> list[str]:
    """A list of names in attributes of a group; Keras splits long lists into ``name0``, ``name1``,
    ..."""
    names: list[str] = []
    parts = [name] if name in group.attrs else [f"{name}{n}" for n in range(100)]
    for part in parts:
        if part not in group.attrs:
            break
        if group.attrs.get_id(part).get_storage_size() > _MAX_ATTRIBUTE_BYTES:
            raise ValueError(f"its {part} has over {_MAX_ATTRIBUTE_BYTES:,} bytes")
        values = np.ravel(group.attrs[part])[:_MAX_ENTRIES]
        names += [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values]
    return names


def _group_names(root: h5py.Group) -> list[str]:
    """The names of the layers of a file of Keras 3, which has a group for each: those outside of
    nested models, in no order that means anything."""
    layers = root.get("layers")
    return list(layers)[:_MAX_ENTRIES] if isinstance(layers, h5py.Group) else []


def _keras_hub(weights: Path) -> dict[str, Any] | None:
    """The preprocessing in the files beside the weights of a KerasHub preset; ``None`` for other
    files.

    KerasHub's VGGs are converted from timm, so the default is ``torch``. Source: keras_hub,
    src/utils/preset_utils.py (names of files) and src/models/vgg/vgg_image_converter.py.
    """
    config = _json(weights.with_name("config.json"))
    if not str(config.get("registered_name", "")).startswith("keras_hub>VGG"):
        return None
    for name in ("image_converter.json", "preprocessor.json"):
        converter = _json(weights.with_name(name)).get("config")
        if isinstance(converter, dict) and isinstance(converter.get("image_converter"), dict):
            converter = converter["image_converter"].get("config")
        if isinstance(converter, dict) and converter.get("scale") is not None:
            try:
                scale, offset = np.broadcast_arrays(
                    np.ravel(np.asarray(converter["scale"], np.float64)),
                    np.ravel(np.asarray(converter.get("offset") or 0.0, np.float64)),
                )
            except (TypeError, ValueError):
                continue
            if scale.size in (1, 3) and np.isfinite([scale, offset]).all() and (scale > 0).all():
                return {"mean": (-offset / scale).tolist(), "std": (1 / scale).tolist()}
    return {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}


def _json(path: Path) -> dict[str, Any]:
    """A small JSON file beside the weights; empty if it does not exist or is not a JSON object."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_ATTRIBUTE_BYTES:
            return {}
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _zip(file: IO[bytes]) -> Container:
    _check_directory(file)
    with zipfile.ZipFile(file) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        if "model.weights.h5" in sizes:
            return _keras(archive, sizes)
        if any(name.endswith("data.pkl") for name in sizes):
            return _torch(torch_file.read_archive(archive, MAX_BYTES))
        _check_total(sum(sizes.values()))
        arrays = {}
        for name, size in sizes.items():
            if name.endswith(".npy"):
                with archive.open(name) as member:
                    arrays[name.removesuffix(".npy")] = _plain_npy(member, size)
        if not arrays:
            raise ValueError(f"it is a zip archive of {', '.join(list(sizes)[:5])}, no weights")
        return Container("npz", arrays)


def _keras(archive: zipfile.ZipFile, sizes: dict[str, int]) -> Container:
    """A ``.keras`` file. Compressed weights are decompressed to memory first: HDF5 needs random
    access, and each backward seek in a compressed member decompresses it from the beginning."""
    config = None
    if "config.json" in sizes:
        if sizes["config.json"] > _MAX_ATTRIBUTE_BYTES:
            raise ValueError(f"its config.json has {sizes['config.json']:,} bytes")
        config = archive.read("config.json")
    # Up to three times as much, with the state of an optimizer.
    if sizes["model.weights.h5"] > 3 * MAX_BYTES:
        _check_total(sizes["model.weights.h5"])
    if archive.getinfo("model.weights.h5").compress_type == zipfile.ZIP_STORED:
        with archive.open("model.weights.h5") as inner:
            return _hdf5(inner, config)
    _check_total(sizes["model.weights.h5"])
    return _hdf5(io.BytesIO(archive.read("model.weights.h5")), config)


def _check_directory(file: IO[bytes]) -> None:
    """Check the size of an archive's directory before it is parsed: each entry of 46 bytes becomes
    an object."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 2**16 - 22))
    end = file.read()
    file.seek(0)
    record = end.rfind(b"PK\x05\x06")
    if record >= 0 and len(end) >= record + 22:
        (num_bytes,) = struct.unpack_from("<I", end, record + 12)
        if num_bytes > _MAX_DIRECTORY_BYTES:
            raise ValueError("it is a zip archive of far more files than weights are in")


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
    try:
        header = reader(file)
    except RecursionError as error:
        raise ValueError("its header is damaged") from error
    if len(header[0]) > _MAX_DIMENSIONS:
        raise ValueError(f"it has an array of {len(header[0]):,} dimensions")
    return header


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    """Arrays as views of the file, so that declared but missing data are not read."""
    import safetensors

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > 2**24:
            raise ValueError(f"its header has {size:,} bytes")
        _check_total(path.stat().st_size - size)
        header = file.read(size)
    try:
        with safetensors.safe_open(path, "numpy"):  # checks the header, and that sizes add up
            entries = json.loads(header)
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"it is damaged: {error}") from error
    data = _mapped(path)[8 + size :]
    arrays = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if entry["dtype"] == "BF16":
            arrays[name] = torch_file.from_bfloat16(data[begin:end]).reshape(entry["shape"])
            continue
        if entry["dtype"] not in _SAFETENSORS_TYPES:
            continue
        values = np.frombuffer(data[begin:end], _SAFETENSORS_TYPES[entry["dtype"]])
        arrays[name] = values.reshape(entry["shape"])
    return arrays


def _matconvnet(data: memoryview) -> Container:
    """``<layer>/0`` and ``<layer>/1``; in older files ``<layer>/filters``, ``<layer>/biases``."""
    variables = matlab.variables(data, MAX_BYTES)
    roots = [root for root in (variables.get("net"), variables) if isinstance(root, dict)]
    layers: Any = next((root["layers"] for root in roots if "layers" in root), [])
    arrays: dict[str, np.ndarray] = {}
    for layer in layers if isinstance(layers, list) else [layers]:
        if not isinstance(layer, dict):
            continue
        name = str(layer.get("name"))
        _check_kind(name, layer)
        parts = {key: layer[key] for key in ("filters", "biases") if key in layer}
        if isinstance(weights := layer.get("weights"), list):
            parts |= {str(number): values for number, values in enumerate(weights)}
        for part, values in parts.items():
            if isinstance(values, np.ndarray):
                arrays[f"{name}/{part}"] = _squeezed(values)
    metas = [meta for root in roots for meta in (root.get("meta"), root) if isinstance(meta, dict)]
    preprocess = next((p for meta in metas if (p := _mean_image(meta))), None)
    classes = [meta["classes"] for meta in metas if isinstance(meta.get("classes"), dict)]
    labels = classes[0].get("description") if classes else None
    names = [name for name in labels if isinstance(name, str)] if isinstance(labels, list) else []
    return Container("MatConvNet", arrays, preprocess=preprocess, labels=names)


def _check_kind(name: str, layer: dict[str, Any]) -> None:
    """Refuse layer types that no VGG has: layers without arrays also change the result."""
    kind, method = layer.get("type", "conv"), layer.get("method", "max")
    known = ("conv", "relu", "pool", "dropout", "softmax", "softmaxloss", "custom")
    if kind not in known or (kind == "pool" and method != "max"):
        raise ValueError(f"its layer {name} is of type {kind} ({method}), which no VGG has")


def _squeezed(values: np.ndarray) -> np.ndarray:
    """MATLAB's arrays have at least two dimensions: biases are ``[1, outputs]``. Kernels keep
    height and width, also for 1x1."""
    return values if values.ndim > 2 else np.atleast_1d(values.squeeze())


def _mean_image(meta: dict[str, Any]) -> dict[str, Any] | None:
    """The mean that is subtracted from RGB images, per channel; a mean image is averaged."""
    normalization = meta.get("normalization")
    mean = normalization.get("averageImage") if isinstance(normalization, dict) else None
    if not isinstance(mean, np.ndarray) or mean.size % 3 or not mean.size:
        return None
    channels = mean.reshape(-1, 3, order="F") if mean.shape[-1] == 3 else mean.reshape(-1, 3)
    return {"mean": [round(float(value), 6) for value in channels.mean(0, dtype=np.float64)]}


def _frozen_graph(data: memoryview) -> dict[str, np.ndarray]:
    """The float32 array constants of a frozen graph; empty if the data are not a graph.

    Field numbers from tensorflow/core/framework: graph, node_def, attr_value, tensor,
    tensor_shape and types.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        for number, node in wire.fields(data):
            if number == 1 and not isinstance(node, int):
                name, values = _constant(node)
                if values is not None:
                    arrays[name] = values
                if len(arrays) > _MAX_ENTRIES:
                    return {}
    except ValueError:
        return {}
    return arrays


def _constant(node: memoryview) -> tuple[str, np.ndarray | None]:
    """Name and value of a float32 array constant; the value is ``None`` for other nodes."""
    parts = dict(wire.fields(node))
    if bytes(_message(parts.get(2))) != b"Const":
        return "", None
    attributes = (dict(wire.fields(_message(v))) for n, v in wire.fields(node) if n == 5)
    value = next(
        (_message(a.get(2)) for a in attributes if bytes(_message(a.get(1))) == b"value"), None
    )
    if value is None:
        return "", None
    tensor = dict(wire.fields(_message(dict(wire.fields(value)).get(8))))
    if tensor.get(1) != 1:  # DT_FLOAT
        return "", None
    dims = [dict(wire.fields(_message(d))).get(1, 0) for n, d in
            wire.fields(_message(tensor.get(2))) if n == 2]  # fmt: skip
    shape = wire.integers(dims)
    content = _message(tensor.get(4)) or _message(tensor.get(5))
    # A tensor stored as one repeated value is not a weight.
    if not shape or min(shape) < 1 or math.prod(shape) * 4 != len(content):
        return "", None
    return wire.text(parts.get(1, memoryview(b""))), np.frombuffer(content, "<f4").reshape(shape)


def _message(value: wire.Value | None) -> memoryview:
    return value if isinstance(value, memoryview) else memoryview(b"")


def _is_checkpoint(path: Path) -> bool:
    """Whether a file is part of a checkpoint: an index or data file, or a V1 table."""
    if checkpoint.PART.search(path.name):
        return checkpoint.exists(path.with_name(checkpoint.PART.sub("", path.name)))
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8))
        return file.read(8) == _TABLE_MAGIC


def _checkpoint(path: Path) -> Container:
    opened = checkpoint.Checkpoint(path.with_name(checkpoint.PART.sub("", path.name)))
    names = [n for n, shape in opened.shapes.items() if shape and not _is_slot(n)]
    _check_total(4 * sum(math.prod(opened.shapes[name]) for name in names))
    values = opened.read({name: checkpoint.Entry(name) for name in names})
    arrays = {name: value.numpy() for name, value in values.items()}
    if named := keras_weights.of_object_graph(arrays):
        return Container("TF2 checkpoint", named, order=_layer_names(named))
    return Container("checkpoint", arrays)


def _layer_names(arrays: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.split("/")[-2] for name in arrays))


def _is_slot(name: str) -> bool:
    """Whether a variable is a slot variable of an optimizer."""
    return bool(re.search(r"/(Adam(_1)?|Momentum|RMSProp(_1)?|Adagrad|ExponentialMoving.*)$", name))


def _check_total(num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise ValueError(
            f"its arrays would take over {MAX_BYTES:,} bytes; a VGG takes less than half of that"
        )
