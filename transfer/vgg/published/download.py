"""Download the weights of VGG16 and VGG19 from Keras Applications and convert them."""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np

from transfer.core.files import draft_folder, unshare, write_text
from transfer.layers.backbone import Backbone
from transfer.models import retention
from transfer.models.meta_graph import load_meta_graph
from transfer.vgg.published import conversion
from transfer.vgg.published.conversion import Conversion, file_md5

TIMEOUT_S = 8.0
_CHUNK = 2**20
_TOLERANCE = 1e-4  # of probabilities


@dataclass(frozen=True)
class Weights:
    """URL, MD5 and Keras model of published weights; source: keras.applications.vgg16 and vgg19."""

    url: str
    md5: str
    model: Any

    @property
    def path(self) -> Path:
        """The file in Keras' cache."""
        home = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser()
        return home / "models" / self.url.rsplit("/", 1)[1]


_BASE = "https://storage.googleapis.com/tensorflow/keras-applications"
_FILE = "weights_tf_dim_ordering_tf_kernels.h5"
PUBLISHED = {
    "vgg16": Weights(
        f"{_BASE}/vgg16/vgg16_{_FILE}",
        "64373286793e3c8b2b4e3219cbf3544b",
        keras.applications.VGG16,
    ),
    "vgg19": Weights(
        f"{_BASE}/vgg19/vgg19_{_FILE}",
        "cbe5617147190e668d6c5d5026f83318",
        keras.applications.VGG19,
    ),
}


class Bar(Protocol):
    """A progress bar, such as tqdm's."""

    def update(self, num_bytes: int, /) -> Any: ...


Progress = Callable[[str, int, int], AbstractContextManager[Bar]]
"""Makes a progress bar from a file name, the bytes already received, and the total bytes."""


@dataclass(frozen=True)
class Pulled:
    """``max_difference`` is the largest difference of a probability from Keras' model."""

    conversion: Conversion
    max_difference: float


def pull(
    name: str,
    out: str | Path,
    *,
    convolutional: bool = False,
    progress: Progress | None = None,
) -> Pulled:
    """Download published weights of a VGG, convert them, and compare the result with Keras' model.

    Args:
        name: ``vgg16`` or ``vgg19``.
        out: prefix of the model to write.
        convolutional: write fc6 to fc8 as convolutions, for images of any size from 32 pixels.
        progress: makes a progress bar of the download.

    Raises:
        ConnectionError: if the download fails.
        ValueError: if the name is unknown, the downloaded file has another hash than the published
            one, or the probabilities differ from those of Keras' model.
    """
    if name not in PUBLISHED:
        raise ValueError(f"no weights of {name!r} are known; choose from {', '.join(PUBLISHED)}")
    weights, out = PUBLISHED[name], Path(out)
    conversion.check_out(out)
    download(weights, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    with draft_folder(out.parent) as folder:
        draft = folder / out.name
        converted = conversion.convert(weights.path, draft, convolutional=convolutional)
        difference = compare(draft, weights)
        if not difference <= _TOLERANCE:
            raise ValueError(
                f"the converted model and Keras' {name} differ by {difference:.2g} in a "
                f"probability; expected at most {_TOLERANCE:g}; nothing was written, report this"
            )
        for path in sorted(draft.parent.iterdir()):
            if path.name != retention.STATE:  # an existing one may list other checkpoints
                os.replace(path, out.parent / path.name)
        state, _ = retention.plan(out, out.name, None, None)
        write_text(out.with_name(retention.STATE), state)
    return Pulled(replace(converted, prefix=out), difference)


def download(weights: Weights, progress: Progress | None = None) -> None:
    """Download a file, or the missing rest of it, into Keras' cache.

    Raises:
        ConnectionError, ValueError: see ``pull``; a partial download is kept and resumed next time.
    """
    path = weights.path
    if path.is_file() and file_md5(path) == weights.md5:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    unshare(part)
    done = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(weights.url, headers={"Range": f"bytes={done}-"})
    try:
        with _opened(request) as response:
            if response.status != 206:  # the server ignores the range
                done = 0
            _receive(response, part, done, progress or _no_progress)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not done:  # 416: the file is complete
            raise ConnectionError(_manual(weights, f"the server says {error.code}")) from error
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise ConnectionError(_manual(weights, reason)) from error
    if file_md5(part) != weights.md5:
        part.unlink()
        raise ValueError(
            f"the download from {weights.url} is not the published file (its MD5 differs); it was "
            "deleted, try again"
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


def _receive(response: Any, part: Path, done: int, progress: Progress) -> None:
    """Append the response to ``part``, which already has ``done`` bytes.

    Raises:
        ConnectionError: if the response ends early.
    """
    total = done + int(response.headers.get("Content-Length", 0))
    with (
        part.open("r+b" if done else "wb") as file,
        progress(part.stem, done, total) as bar,
    ):
        file.seek(done)
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
            done += len(chunk)
    if done < total:
        raise ConnectionError(f"it was cut after {done:,} of {total:,} bytes; pull again to resume")


@contextlib.contextmanager
def _no_progress(what: str, done: int, total: int) -> Iterator[Bar]:
    del what, done, total
    yield _Silent()


class _Silent:
    def update(self, num_bytes: int, /) -> None:
        del num_bytes


def _manual(weights: Weights, reason: str) -> str:
    return (
        f"cannot download {weights.url} ({reason}); download it elsewhere and put it at "
        f"{str(weights.path)!r}, or convert any copy of published weights"
    )
