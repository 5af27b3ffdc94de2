"""Files in object stores and on web servers, by their URLs, through fsspec.

URLs may come from untrusted manifests, so the stores are limited to those that only read the bytes
of an object: other fsspec protocols unpack archives, write caches or interpret templates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, TypeVar

import fsspec

T = TypeVar("T")
R = TypeVar("R")

STORES = (
    *("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "hf", "hdfs"),
    *("webhdfs", "http", "https", "memory"),
)
"""fsspec protocols that may be used; ``file`` URLs are read as local paths."""
_AT_A_TIME = 32  # requests; each waits for the network most of the time
_FEW = 100  # files of a folder for which single requests are cheaper than a listing
# What stores call the version of an object, best first. Times are least reliable.
_VERSIONS = (
    *(
        "ETag",
        "etag",
        "md5Hash",
        "content_md5",
        "Content-MD5",
        "Digest",
        "generation",
        "version_id",
    ),
    *("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "modificationTime"),
    "created",
)


def is_url(text: str) -> bool:
    """Whether a text is a URL rather than a path."""
    return re.match("[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def check_url(url: str) -> None:
    """Check that a URL is one of ``STORES``.

    Raises:
        ValueError: if it is not.
    """
    store = url.partition("://")[0].lower()
    if store not in STORES or "::" in url:
        raise ValueError(f"{url!r} is not a URL of a known store; expected {', '.join(STORES)}")


def read(url: str) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: if the store is unknown, or its package is not installed.
        OSError: if the file cannot be read.
    """
    store, path = _open(url)
    return store.cat_file(path)


def in_parallel(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The results of a function that waits for the network, for several items at a time."""
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        return [*pool.map(function, items)]


def states(urls: Sequence[str]) -> list[tuple[str, ...]]:
    """Size and version (ETag, or else time of the last change) of several files, which change with
    the content, without reading the files. Lists a folder once instead of asking for each file.

    A file that does not exist has a state of its own.

    Raises:
        OSError: if a store cannot be asked.
    """
    by_folder: dict[str, list[str]] = {}
    for url in urls:
        by_folder.setdefault(url.rpartition("/")[0], []).append(url)
    known: dict[str, tuple[str, ...]] = {}
    for listed in in_parallel(_listed, by_folder.values()):
        known |= listed
    rest = [url for url in urls if url not in known]
    known |= zip(rest, in_parallel(_state, rest), strict=True)
    return [known[url] for url in urls]


def _open(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    check_url(url)
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url!r} cannot be opened: {error}") from error


def _listed(urls: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The states of files of one folder, as far as it can be listed."""
    if len(urls) <= _FEW:
        return {}
    store, path = _open(urls[0].rpartition("/")[0])
    try:
        listed = store.ls(path, detail=True)
    except Exception:  # web servers have no listings, and accounts may not be allowed to list
        return {}
    finally:
        store.invalidate_cache(path)  # the store keeps a copy
    by_path = {info["name"].lstrip("/"): info for info in listed}
    infos = {url: by_path.get(fsspec.core.strip_protocol(url).lstrip("/")) for url in urls}
    # Index pages of web servers tell neither sizes nor versions.
    known = {url: info for url, info in infos.items() if info and info.get("size") is not None}
    return {url: _version(info) for url, info in known.items()}


def _state(url: str) -> tuple[str, ...]:
    store, path = _open(url)
    try:
        return _version(store.info(path))
    except FileNotFoundError:  # an unreadable image, which is named or left out as one
        return ("missing",)


def _version(info: Mapping[str, Any]) -> tuple[str, ...]:
    version = next((info[key] for key in _VERSIONS if info.get(key) is not None), "")
    if isinstance(version, datetime):  # in a listing, some stores give the same time as a number
        version = version.timestamp()
    return str(info.get("size")), str(version).strip('"')
