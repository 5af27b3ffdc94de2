"""Read the arrays of HDF5 files, and the names and configuration that Keras stores beside them.

Links to other files are not followed, and sizes are checked before memory is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import IO, NamedTuple

import h5py
import numpy as np

from transfer.vgg.published.limits import MAX_DIMENSIONS, MAX_ENTRIES, check_total

MAX_ATTRIBUTE_BYTES = 2**26
_MAX_CHUNKS = 100_000
_MAX_COMPRESSION = 1100  # deflate expands a byte to at most 1032


class Contents(NamedTuple):
    """``arrays``: floating-point arrays by their path, without those of optimizers. ``config``: the
    configuration of a Keras model, if it is in the file. ``order``: names of the layers.
    ``backend``: that of Keras 2, such as ``theano``; empty if the file does not say."""

    arrays: dict[str, np.ndarray]
    config: bytes | None
    order: list[str]
    backend: str


def read(file: IO[bytes], *, is_legacy: bool) -> Contents:
    """Read a file.

    Args:
        file: a file or anything seekable.
        is_legacy: whether a model was saved in HDF5 as a whole; ``False`` if its configuration is
            stored separately.

    Raises:
        ValueError: if it has links, or is larger than a VGG.
    """
    arrays: dict[str, np.ndarray] = {}
    total = 0
    with h5py.File(file, "r") as root:
        for name, dataset in _datasets(root):
            if not np.issubdtype(dataset.dtype, np.floating) or "optimizer" in name:
                continue
            total += dataset.nbytes
            check_total(total)
            _check_stored(name, dataset)
            arrays[name] = dataset[()]
        config = _attribute(root, "model_config") if is_legacy else None
        weights = root.get("model_weights", root) if is_legacy else root
        order = _names(weights, "layer_names") or _group_names(root)
        backend = _attribute(weights, "backend") or _attribute(root, "backend") or b""
    return Contents(arrays, config, order, backend.decode("utf-8", "replace").lower())


def _datasets(root: h5py.Group) -> Iterator[tuple[str, h5py.Dataset]]:
    """All arrays of a file, in the order of their names. External and soft links, and several links
    to one group, are refused."""
    seen: set[int] = set()
    pending: list[tuple[str, h5py.Group]] = [("", root)]
    for _ in range(MAX_ENTRIES):
        if not pending:
            return
        path, group = pending.pop()
        if path.count("/") > 12:
            raise ValueError("its groups are nested too deep")
        address = h5py.h5o.get_info(group.id).addr
        if address in seen:
            raise ValueError(f"its group {path!r} is there under another name already")
        seen.add(address)
        if len(group) > MAX_ENTRIES:
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
    raise ValueError(f"it has over {MAX_ENTRIES:,} groups")


def _check_stored(name: str, dataset: h5py.Dataset) -> None:
    """Check that the values of an array are stored in this file, in a form that is fast to read."""
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"its array {name!r} lies in another file")
    if dataset.ndim > MAX_DIMENSIONS:
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
        check_total(math.prod(dataset.chunks) * dataset.dtype.itemsize)


def _attribute(group: h5py.Group, name: str) -> bytes | None:
    """A text attribute of a group; ``None`` if it does not exist."""
    if name not in group.attrs:
        return None
    if group.attrs.get_id(name).get_storage_size() > MAX_ATTRIBUTE_BYTES:
        raise ValueError(f"its {name} has over {MAX_ATTRIBUTE_BYTES:,} bytes")
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
        if group.attrs.get_id(part).get_storage_size() > MAX_ATTRIBUTE_BYTES:
            raise ValueError(f"its {part} has over {MAX_ATTRIBUTE_BYTES:,} bytes")
        values = np.ravel(group.attrs[part])[:MAX_ENTRIES]
        names += [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values]
    return names


def _group_names(root: h5py.Group) -> list[str]:
    """The names of the layers of a file of Keras 3, which has a group for each: those outside of
    nested models, in no order that means anything."""
    layers = root.get("layers")
    return list(layers)[:MAX_ENTRIES] if isinstance(layers, h5py.Group) else []
