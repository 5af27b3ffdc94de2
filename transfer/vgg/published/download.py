"""Download published weights of the catalogue, verify and convert them."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import logging
import os
import shutil
import tarfile
import tempfile
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np

from transfer.core.files import draft_folder, lock, locked, unshare, write_text
from transfer.layers.backbone import Backbone
from transfer.models import retention
from transfer.models.card import read_card, write_card
from transfer.models.meta_graph import load_meta_graph
from transfer.models.saver import file_sha256
from transfer.vgg.architectures import ARCHITECTURES, num_parameters
from transfer.vgg.published import conversion
from transfer.vgg.published.catalogue import CATALOGUE, Entry
from transfer.vgg.published.conversion import Conversion, file_md5

logger = logging.getLogger(__name__)

TIMEOUT_S = 8.0
_CHUNK = 2**20
_TOLERANCE = 1e-4  # of probabilities


@dataclass(frozen=True)
class Weights:
    """A file to download: its entry in the catalogue, and the Keras model that it is compared with,
    if Keras has it."""

    entry: Entry
    model: Any = None

    @property
    def path(self) -> Path:
        """The file in Keras' cache."""
        home = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser()
        return home / "models" / self.entry.file_name

    @property
    def max_bytes(self) -> int:
        """Limit for the size of the file: its weights in float32, and a quarter for anything
        else."""
        return 5 * num_parameters(ARCHITECTURES[self.entry.network], self.entry.num_classes)

    @property
    def min_bytes(self) -> int:
        """A size that no such file is below, also compressed; a page with an error is."""
        return 3 * num_parameters(ARCHITECTURES[self.entry.network], self.entry.num_classes)

    def difference(self, path: Path) -> str:
        """What differs between a file and the published one, its hash or, where none is published,
        its size; empty if nothing does."""
        if self.entry.md5 and file_md5(path) != self.entry.md5:
            return "MD5"
        digits = self.entry.sha256
        if digits and not file_sha256(path).startswith(digits):
            return "SHA-256"
        size = path.stat().st_size
        return f"size of {size:,} bytes" if size < self.min_bytes else ""


_MODELS = {"vgg16": keras.applications.VGG16, "vgg19": keras.applications.VGG19}
PUBLISHED = {name: Weights(entry, _MODELS.get(name)) for name, entry in CATALOGUE.items()}


class Bar(Protocol):
    """A progress bar, such as tqdm's."""

    def update(self, num_bytes: int, /) -> Any: ...


Progress = Callable[[str, int, int], AbstractContextManager[Bar]]
"""Makes a progress bar from a file name, the bytes already received, and the total bytes."""


@dataclass(frozen=True)
class Pulled:
    """``max_difference`` is the largest difference of a probability from Keras' model; ``None`` if
    Keras has none. ``verified_by`` is the hash that was compared, or ``unverified``."""

    conversion: Conversion
    max_difference: float | None
    verified_by: str

    def describe(self) -> list[str]:
        """Lines that describe the model, see ``Conversion.describe``, and how it was verified."""
        lines = self.conversion.describe()
        if self.max_difference is not None:
            lines.append(f"probabilities differ from Keras' by at most {self.max_difference:.1g}")
        is_unverified = self.verified_by == "unverified"
        unverified = "unverified: no hash of this file is published"
        verified = f"verified by its published {self.verified_by}"
        return [*lines, unverified if is_unverified else verified]


def pull(
    name: str,
    out: str | Path,
    *,
    convolutional: bool = False,
    progress: Progress | None = None,
) -> Pulled:
    """Download published weights of a VGG, verify and convert them, and compare the result with
    Keras' model, if Keras has it.

    Args:
        name: a key of ``catalogue.CATALOGUE``, such as ``vgg16`` or ``vgg19_bn-torchvision``.
        out: prefix of the model to write.
        convolutional: write fc6 to fc8 as convolutions, for images of any size from 32 pixels.
        progress: makes a progress bar of the download.

    Raises:
        ConnectionError: if the download fails.
        ValueError: if the name is unknown, the downloaded file has another hash than the published
            one, is another network than the catalogue says, or its probabilities differ from those
            of Keras' model.
    """
    if name not in PUBLISHED:
        raise ValueError(f"no weights of {name!r} are known; choose from {', '.join(PUBLISHED)}")
    weights, out = PUBLISHED[name], Path(out)
    conversion.check_out(out)
    download(weights, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    with draft_folder(out.parent) as folder:
        draft = folder / out.name
        options: dict[str, Any] = {}
        if weights.model is None:
            options["preprocess"] = weights.entry.preprocess
        with unpacked(weights) as file:
            converted = conversion.convert(file, draft, convolutional=convolutional, **options)
        _check_entry(converted, weights.entry)
        difference = compare(draft, weights) if weights.model else None
        if difference is not None and not difference <= _TOLERANCE:
            raise ValueError(
                f"the converted model and Keras' {name} differ by {difference:.2g} in a "
                f"probability; expected at most {_TOLERANCE:g}; nothing was written, report this"
            )
        converted = _with_origin(converted, weights.entry)
        for path in sorted(draft.parent.iterdir()):
            if path.name != retention.STATE:  # an existing one may list other checkpoints
                os.replace(path, out.parent / path.name)
        state, _ = retention.plan(out, out.name, None, None)
        write_text(out.with_name(retention.STATE), state)
    return Pulled(replace(converted, prefix=out), difference, weights.entry.verified_by)


def _check_entry(converted: Conversion, entry: Entry) -> None:
    """Check that the file has the network and as many classes as the catalogue says."""
    if (converted.network, converted.num_classes) != (entry.network, entry.num_classes):
        raise ValueError(
            f"{entry.url} has {converted.network} with {converted.num_classes or 'no'} classes; "
            f"expected {entry.network} with {entry.num_classes}; nothing was written"
        )


def _with_origin(converted: Conversion, entry: Entry) -> Conversion:
    """The card with licence and training set of the catalogue, if the file was verified."""
    if converted.card.licence or not (entry.md5 or entry.sha256):
        return converted
    path = converted.prefix.with_name(f"{converted.prefix.name}.json")
    card = replace(read_card(path), licence=entry.licence, trained_on=entry.trained_on)
    write_card(path, card)
    return replace(converted, card=card, origin=converted.origin or entry.name)


@contextlib.contextmanager
def unpacked(weights: Weights) -> Iterator[Path]:
    """The file of weights: the download itself, or the only checkpoint in an archive.

    Raises:
        ValueError: if the archive is damaged, too large, or does not have one checkpoint.
    """
    if not weights.path.name.endswith(".tar.gz"):
        yield weights.path
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = _unpack(weights, Path(folder))
        except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
            raise ValueError(
                f"{str(weights.path)!r} is not the published archive ({error}); delete it, and "
                "pull again"
            ) from error
        yield file


def _unpack(weights: Weights, folder: Path) -> Path:
    """Write the checkpoint of an archive to a folder. The archive is decompressed first, within a
    limit, since ``tarfile`` reads headers of any size."""
    plain, target = folder / "weights.tar", folder / "weights.ckpt"
    with gzip.open(weights.path) as source, plain.open("wb") as file:
        while chunk := source.read(_CHUNK):
            if file.tell() + len(chunk) > weights.max_bytes:
                raise ValueError(f"it unpacks to over {weights.max_bytes:,} bytes")
            file.write(chunk)
    with tarfile.open(plain, "r:") as archive:
        members = [one for one in archive if one.isfile() and one.name.endswith(".ckpt")]
        if len(members) != 1:
            raise ValueError(f"it has {len(members)} checkpoints; expected one")
        if members[0].size > weights.max_bytes:  # a sparse file may be larger than its archive
            raise ValueError(f"its checkpoint has over {weights.max_bytes:,} bytes")
        checkpoint = archive.extractfile(members[0])
        assert checkpoint is not None
        with checkpoint, target.open("wb") as file:
            shutil.copyfileobj(checkpoint, file)
    return target


def download(weights: Weights, progress: Progress | None = None) -> None:
    """Download a file, or the missing rest of it, into Keras' cache, unless it is there.

    Raises:
        ConnectionError, ValueError: see ``pull``; a partial download is kept and resumed next time.
    """
    path = weights.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(
        lock(path.with_name(f"{path.name}.lock")),
        lambda: logger.info(f"another process downloads {path.name}; waiting for it"),
    ):
        if not path.is_file() or weights.difference(path):
            _download(weights, progress or _no_progress)


def _download(weights: Weights, progress: Progress) -> None:
    path = weights.path
    part = path.with_name(f"{path.name}.part")
    unshare(part)
    done = part.stat().st_size if part.is_file() else 0
    if done > weights.max_bytes:  # of another file
        part.unlink()
        done = 0
    request = urllib.request.Request(weights.entry.url, headers={"Range": f"bytes={done}-"})
    try:
        with _opened(request) as response:
            if response.status != 206:  # the server ignores the range
                done = 0
            _receive(response, part, done, weights.max_bytes, progress)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not done:  # 416: the file is complete
            raise ConnectionError(_manual(weights, f"the server says {error.code}")) from error
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise ConnectionError(_manual(weights, reason)) from error
    if differing := weights.difference(part):
        part.unlink()
        raise ValueError(
            f"the download from {weights.entry.url} is not the published file (its {differing} "
            "differs); it was deleted, try again"
        )
    part.replace(path)


def compare(prefix: Path, weights: Weights) -> float:
    """The largest difference between probabilities of the model and of Keras' model, on an image of
    noise and an image of stripes."""
    graph = load_meta_graph(prefix)
    preprocess = graph.preprocess(str(graph.card.input))
    shape = (1, *preprocess.shape)
    noise = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    stripes = np.linspace(0, 255, preprocess.height, dtype=np.float32)[:, None, None]
    images = np.concatenate([noise, np.broadcast_to(stripes, shape)])
    ours = np.asarray(Backbone(graph, tap="prob")(preprocess(images)))
    inputs = keras.applications.vgg16.preprocess_input(images.copy())
    theirs = weights.model(weights=str(weights.path))(inputs, training=False)
    return float(np.max(np.abs(ours - np.asarray(theirs))))


def _opened(request: urllib.request.Request) -> Any:
    """The response to a request, within ``TIMEOUT_S``. ``urlopen`` applies its timeout to each
    address, and none to name resolution; so it runs in a thread that is joined with a timeout."""
    result: list[Any] = []

    def ask() -> None:
        try:
            result.append(urllib.request.urlopen(request, timeout=TIMEOUT_S))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    if not result:
        raise TimeoutError(f"no answer within {TIMEOUT_S:g} s")
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def _receive(response: Any, part: Path, done: int, max_bytes: int, progress: Progress) -> None:
    """Append the response to ``part``, which already has ``done`` bytes.

    Raises:
        ConnectionError: if the response ends early.
        ValueError: if the file has over ``max_bytes``.
    """
    length = response.headers.get("Content-Length") or "0"
    total = done + (int(length) if length.isdecimal() else 0)
    _check_size(total, max_bytes)
    with (
        part.open("r+b" if done else "wb") as file,
        progress(part.stem, done, total) as bar,
    ):
        file.seek(done)
        while chunk := response.read(_CHUNK):
            done += len(chunk)
            _check_size(done, max_bytes)
            file.write(chunk)
            bar.update(len(chunk))
    if done < total:
        raise ConnectionError(f"it was cut after {done:,} of {total:,} bytes; pull again to resume")


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise ValueError(
            f"the server sends {num_bytes:,} bytes or more; these weights have at most "
            f"{max_bytes:,}, so it is not the published file"
        )


@contextlib.contextmanager
def _no_progress(what: str, done: int, total: int) -> Iterator[Bar]:
    del what, done, total
    yield _Silent()


class _Silent:
    def update(self, num_bytes: int, /) -> None:
        del num_bytes


def _manual(weights: Weights, reason: str) -> str:
    return (
        f"cannot download {weights.entry.url} ({reason}); download it elsewhere and put it at "
        f"{str(weights.path)!r}, or convert any copy of published weights"
    )
