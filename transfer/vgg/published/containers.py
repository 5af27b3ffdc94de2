"""Read the arrays of any weight file by name. The format is identified by the contents.

Nothing in a file is executed, links to other files are not followed, and sizes are checked before
memory is allocated.
"""

from __future__ import annotations

import io
import math
import mmap
import re
import struct
import zipfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from transfer.models import checkpoint, object_keys
from transfer.vgg.published import (
    caffe,
    foreign,
    frozen,
    hdf5,
    keras_model,
    keras_weights,
    kernel_flips,
    limits,
    matconvnet,
    mxnet,
    npy,
    onnx_file,
    onnx_model,
    pickles,
    presets,
    safetensors_file,
    saved_model,
    torch_file,
)
from transfer.vgg.published.limits import check_total

# For messages only: what a file is follows from its contents.
_SUFFIXES = (".h5", ".keras", ".pth", ".pt", ".bin", ".safetensors", ".onnx", ".npz", ".ckpt")
_MAX_DIRECTORY_BYTES = 2**22  # of a zip archive
_LEGACY_TORCH = b"\x8a\x0a" + torch_file.MAGIC.to_bytes(10, "little")
_TABLE_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")  # ends a LevelDB table


@dataclass(frozen=True)
class Container:
    """``kind``: file format, for messages and for ``layouts``. ``arrays``: values by name.

    Further contents of some files: ``model``, the layers of a Keras model; ``order``, the layer
    names of a Keras weight file, which has no more than these; ``preprocess``, the preprocessing of
    the network; ``labels``, the class names; ``no_head``, why the layers after the convolutions are
    not a VGG's; ``unused``, names of arrays that its features do not depend on; ``beside``, the
    other files that some of the arrays are in.

    ``backend`` is that of Keras or Lasagne where it matters for the kernels, and empty if the file
    does not say; see ``kernel_flips``. Kernels of Theano are not flipped any more.
    """

    kind: str
    arrays: dict[str, np.ndarray]
    model: keras_model.Model | None = None
    order: Sequence[str] = ()
    preprocess: dict[str, Any] | None = None
    labels: Sequence[str] = field(default=())
    no_head: str = ""
    backend: str | None = None
    beside: Sequence[Path] = ()
    unused: Collection[str] = ()


def read(path: Path) -> Container:
    """Read a file, or the checkpoint of a prefix.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if the format is unknown, or the file is damaged or contains more than data.
    """
    if path.is_dir():
        if any((path / name).is_file() for name in ("saved_model.pb", "saved_model.pbtxt")):
            return _saved_model(path)
        for name in (presets.KERAS_HUB_TASK, presets.KERAS_HUB_BASE):
            if (path / name).is_file() and presets.of_keras_hub(path / name).preprocess:
                container = read(path / name)
                return replace(container, beside=[path / name, *container.beside])
        inside = sorted(child.name for child in path.iterdir() if child.suffix in _SUFFIXES)
        which = f", such as its {', '.join(inside[:3])}" if inside else ""
        raise ValueError(f"{str(path)!r} is a folder; expected a file of weights{which}")
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
        container = _read(path)
        check_total(4 * sum(values.size for values in container.arrays.values()))  # as float32
        return container
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    except Exception as error:  # readers raise arbitrary exceptions for damaged files
        raise ValueError(f"{str(path)!r} cannot be read: {_damage(error)}") from error


def _damage(error: Exception) -> str:
    """What an error of a reader says of its file."""
    text = str(error)
    if sizes := re.search(r"truncated file: eof = (\d+),.* stored_eof = (\d+)", text):  # of HDF5
        present, expected = map(int, sizes.groups())
        return f"it was cut short after {present:,} of {expected:,} bytes; get it again"
    if isinstance(error, zipfile.BadZipFile) and text == "File is not a zip file":
        return (
            "it was cut short, or is damaged: the directory at the end of its zip archive is "
            "missing; get it again"
        )
    return f"it is damaged ({type(error).__name__}: {text})"


def _read(path: Path) -> Container:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        if head.startswith(b"\x89HDF\r\n\x1a\n"):
            return _of_keras_hub(_hdf5(file), path)
        if head.startswith(b"PK\x03\x04"):
            return _zip(file, path)
        if head.startswith(b"\x93NUMPY"):
            return Container("npy", npy.dictionary(file))
        if head.startswith(b"\x80") and _LEGACY_TORCH in head[:16]:
            return _torch(torch_file.read_legacy(file, limits.MAX_BYTES), path)
        if head.startswith(mxnet.MAGIC):
            check_total(size)
            return Container("MXNet", mxnet.arrays(_mapped(path)))
        if re.match(rb"\x80[\x02-\x05]", head):
            check_total(size)
            found = pickles.read(file)
            return Container(
                found.kind,
                found.arrays,
                preprocess=found.preprocess,
                labels=found.labels,
                backend=found.backend,
            )
        if head.startswith(b"MATLAB 5.0 MAT-file"):
            check_total(size)
            net = matconvnet.read(_mapped(path))
            return Container("MatConvNet", net.arrays, preprocess=net.preprocess, labels=net.labels)
        if 2 <= int.from_bytes(head[:8], "little") <= size and head[8:9] == b"{":
            arrays = safetensors_file.arrays(path, _mapped(path))
            return _with_preset(Container("safetensors", arrays), presets.of_timm(path))
    if kind := foreign.kind_of(head, size, path.name):
        raise ValueError(kind)
    if _is_checkpoint(path):
        return _checkpoint(path)
    if size > limits.MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes; expected at most {limits.MAX_BYTES:,}")
    data = _mapped(path)
    side_files = onnx_file.SideFiles(path.parent)
    if (model := onnx_model.read(data, side_files)) is not None:
        layers = (*model.layers, *model.branches)
        arrays = {f"{one.name}/{role}": v for one in layers for role, v in one.arrays.items()}
        return Container("ONNX", arrays, model, beside=side_files.paths)
    if kind := foreign.kind_of_message(data):
        raise ValueError(kind)
    if arrays := frozen.arrays(data):
        return Container("frozen graph", arrays)
    if caffe_net := caffe.read(data):
        arrays, no_head, unused = caffe_net
        return Container("Caffe", arrays, no_head=no_head, unused=unused)
    if kind := foreign.kind_of_text(head):
        raise ValueError(kind)
    raise ValueError(
        "it is none of: Keras (.h5, .keras), NumPy (.npz, .npy), PyTorch (.pth), safetensors, "
        "MatConvNet (.mat), Caffe (.caffemodel), ONNX, MXNet (.params), Paddle (.pdparams), "
        "Lasagne (.pkl), a TensorFlow checkpoint or frozen graph; "
        f"it begins with {head[:8]!r} and has {size:,} bytes"
    )


def _torch(contents: torch_file.TorchFile, path: Path) -> Container:
    container = Container("PyTorch", contents.arrays, labels=contents.labels)
    return _with_preset(container, presets.of_timm(path))


def _with_preset(container: Container, preset: presets.Preset) -> Container:
    """What a file does not say itself is taken from the files beside it."""
    return replace(
        container,
        preprocess=container.preprocess or preset.preprocess,
        labels=container.labels or preset.labels,
    )


def _of_keras_hub(container: Container, path: Path) -> Container:
    """An HDF5 file with what a preset of KerasHub has beside it."""
    preset = presets.of_keras_hub(path)
    if preset.preprocess and path.name == presets.KERAS_HUB_TASK:
        base = path.with_name(presets.KERAS_HUB_BASE)
        if not base.is_file():
            raise ValueError(
                f"it is the head of a KerasHub classifier without its base, {base.name}; put that "
                "beside it"
            )
        with base.open("rb") as file:
            arrays = presets.with_dense_head(_hdf5(file).arrays | container.arrays)
        container = Container("HDF5", arrays, beside=[base])
    return _with_preset(container, preset)


def _mapped(path: Path) -> memoryview:
    """A file as memory-mapped bytes, which are read on access; arrays are views of them."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _hdf5(file: IO[bytes], config: bytes | None = None) -> Container:
    """``config`` is the model's configuration if it is stored separately from the weights."""
    is_legacy = config is None
    contents = hdf5.read(file, is_legacy=is_legacy)
    config, arrays = config or contents.config, contents.arrays
    if contents.backend == "theano":
        arrays = {name: kernel_flips.flipped(values) for name, values in arrays.items()}
    naming: keras_model.Naming = "paths" if is_legacy else "classes"
    model = keras_model.read(config, arrays, naming=naming) if config else None
    if config and model is None:
        preset = presets.of_keras_hub_classifier(config)
        if preset.preprocess:
            return _with_preset(Container("HDF5", presets.with_dense_head(arrays)), preset)
    return Container("HDF5", arrays, model, contents.order, backend=contents.backend)


def _zip(file: IO[bytes], path: Path) -> Container:
    _check_directory(file)
    with zipfile.ZipFile(file) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        if "model.weights.h5" in sizes:
            return _keras(archive, sizes)
        if any(name.endswith("/models/model.json") for name in sizes):
            raise ValueError(
                "it is a program of torch.export (.pt2); save its weights where it was made: "
                "torch.save(torch.export.load('FILE').state_dict, 'weights.pth')"
            )
        if any(name.endswith("data.pkl") for name in sizes):
            return _torch(torch_file.read_archive(archive, limits.MAX_BYTES), path)
        check_total(sum(sizes.values()))
        arrays = {}
        for name, size in sizes.items():
            if name.endswith(".npy"):
                with archive.open(name) as member:
                    arrays[name.removesuffix(".npy")] = npy.array(member, size)
        if not arrays:
            raise ValueError(foreign.kind_of_archive(list(sizes)))
        return Container("npz", arrays)


def _keras(archive: zipfile.ZipFile, sizes: dict[str, int]) -> Container:
    """A ``.keras`` file. Compressed weights are decompressed to memory first: HDF5 needs random
    access, and each backward seek in a compressed member decompresses it from the beginning."""
    config = None
    if "config.json" in sizes:
        if sizes["config.json"] > hdf5.MAX_ATTRIBUTE_BYTES:
            raise ValueError(f"its config.json has {sizes['config.json']:,} bytes")
        config = archive.read("config.json")
    # Up to three times as much, with the state of an optimizer.
    if sizes["model.weights.h5"] > 3 * limits.MAX_BYTES:
        check_total(sizes["model.weights.h5"])
    if archive.getinfo("model.weights.h5").compress_type == zipfile.ZIP_STORED:
        with archive.open("model.weights.h5") as inner:
            return _hdf5(inner, config)
    check_total(sizes["model.weights.h5"])
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
        for match in re.finditer(b"PK\x06\x06", end[:record]):  # of ZIP64, which takes precedence
            if len(end) >= match.start() + 48:
                (of_zip64,) = struct.unpack_from("<Q", end, match.start() + 40)
                num_bytes = max(num_bytes, of_zip64)
        if num_bytes > _MAX_DIRECTORY_BYTES:
            raise ValueError("it is a zip archive of far more files than weights are in")


def _is_checkpoint(path: Path) -> bool:
    """Whether a file is part of a checkpoint: an index or data file, or a V1 table."""
    if checkpoint.PART.search(path.name):
        return checkpoint.exists(path.with_name(checkpoint.PART.sub("", path.name)))
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8))
        return file.read(8) == _TABLE_MAGIC


def _saved_model(folder: Path) -> Container:
    """The Keras model in a SavedModel."""
    variables = folder / "variables" / "variables"
    opened = checkpoint.Checkpoint(variables) if checkpoint.exists(variables) else None
    layers = {} if opened is None else _keras_names(opened)
    if opened is None or not any(opened.shapes[key][:3] == (3, 3, 3) for key in layers):
        raise ValueError(
            f"{str(folder)!r} is a SavedModel, which is used without conversion: give the folder "
            "itself as the model. It has no Keras VGG, whose classes would be read"
        )
    container = _keras_checkpoint(opened, layers, saved_model.keras_config(folder))
    files = [path for path in variables.parent.iterdir() if path.is_file()]
    return replace(container, beside=sorted([*files, *folder.glob("*.pb")]))


def _checkpoint(path: Path) -> Container:
    opened = checkpoint.Checkpoint(path.with_name(checkpoint.PART.sub("", path.name)))
    if layers := _keras_names(opened):
        return _keras_checkpoint(opened, layers)
    names = {n: n for n, shape in opened.shapes.items() if shape and not _is_slot(n)}
    return Container("checkpoint", _arrays(opened, names))


def _keras_checkpoint(
    opened: checkpoint.Checkpoint, layers: dict[str, str], config: str | None = None
) -> Container:
    """``layers``: names by key. ``config``: that of the Keras model, if it is known."""
    if config is None:
        arrays = _arrays(opened, layers)
        return Container("TF2 checkpoint", arrays, order=_layer_names(arrays))
    full_names = keras_weights.full_names(_object_graph(opened))
    arrays = _arrays(opened, {key: full_names[key] for key in layers})
    return Container("TF2 checkpoint", arrays, keras_model.read(config, arrays, naming="layers"))


def _keras_names(opened: checkpoint.Checkpoint) -> dict[str, str]:
    graph = _object_graph(opened)
    return keras_weights.names_in_object_graph(graph, opened.shapes) if graph else {}


def _object_graph(opened: checkpoint.Checkpoint) -> bytes:
    """The serialized object graph; empty if there is none."""
    if object_keys.KEY not in opened.shapes:
        return b""
    values = opened.read({"graph": checkpoint.Entry(object_keys.KEY)})["graph"]
    return bytes(next(iter(np.asarray(values).ravel().tolist()), b""))


def _arrays(opened: checkpoint.Checkpoint, names: dict[str, str]) -> dict[str, np.ndarray]:
    """Values by name. ``names``: by key."""
    check_total(4 * sum(math.prod(opened.shapes[key]) for key in names))
    if not names:
        return {}
    values = opened.read({name: checkpoint.Entry(key) for key, name in names.items()})
    return {name: value.numpy() for name, value in values.items()}


def _layer_names(arrays: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.split("/")[-2] for name in arrays))


def _is_slot(name: str) -> bool:
    """Whether a variable is a slot variable of an optimizer."""
    return bool(re.search(r"/(Adam(_1)?|Momentum|RMSProp(_1)?|Adagrad|ExponentialMoving.*)$", name))
