"""What ``vgg-transfer pull`` does; its flags are in ``recipes.pull``."""

from __future__ import annotations

import http.client
import os
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from recipes import console
from recipes.convert import ConvertConfig
from transfer import Backbone, load_meta_graph
from transfer.core.files import draft_folder, unshare, write_text
from transfer.models import retention
from transfer.vgg.published import conversion
from transfer.vgg.published.conversion import file_md5

TIMEOUT_S = 8.0
_CHUNK = 2**20
_TOLERANCE = 1e-4  # between probabilities


@dataclass(frozen=True)
class Weights:
    """Where weights are published; source: keras.applications.vgg16 and vgg19."""

    url: str
    md5: str
    model: Any

    @property
    def path(self) -> Path:
        """Where Keras looks for them before it downloads them."""
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


def run(name: str, out: Path, *, convolutional: bool) -> list[str]:
    """Download, convert, and compare with the Keras model; returns what to print.

    Raises:
        ConnectionError: if there is no network.
        ValueError: if the file is not the one that was published, or the results differ.
    """
    weights = PUBLISHED[name]
    conversion.check_out(out)
    download(weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    with draft_folder(out.parent) as folder:
        draft = folder / out.name
        config = ConvertConfig(out=draft, convolutional=convolutional)
        *lines, _ = conversion.run(weights.path, config)
        difference = compare(draft, weights)
        if not difference <= _TOLERANCE:
            raise ValueError(
                f"the converted model and Keras' {name} differ by {difference:.2g} in a "
                f"probability; expected at most {_TOLERANCE:g}; nothing was written, report this"
            )
        for path in sorted(draft.parent.iterdir()):
            if path.name != retention.STATE:  # there may be one, which lists other checkpoints
                os.replace(path, out.parent / path.name)
        state, _ = retention.plan(out, out.name, None, None)
        write_text(out.with_name(retention.STATE), state)
    return [*lines, f"probabilities differ from Keras' by at most {difference:.1g}", str(out)]


def download(weights: Weights) -> None:
    """Get a file, or the rest of it, into Keras' cache.

    Raises:
        ConnectionError, ValueError: see ``run``; what has come so far stays for the next time.
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
            if response.status != 206:  # it gives the whole file
                done = 0
            _receive(response, part, done)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not done:  # there is no rest
            raise ConnectionError(_manual(weights, f"the server says {error.code}")) from error
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise ConnectionError(_manual(weights, reason)) from error
    if file_md5(part) != weights.md5:
        part.unlink()
        raise ValueError(
            f"what came from {weights.url} is not the published file (its MD5 differs); it was "
            "deleted, try again"
        )
    part.replace(path)


def compare(prefix: Path, weights: Weights) -> float:
    """The largest difference between a probability of the model and of Keras' own, on an image of
    noise and one of stripes."""
    graph = load_meta_graph(prefix)
    preprocess = graph.preprocess(graph.card.input)
    shape = (1, preprocess.size, preprocess.size, 3)
    noise = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    stripes = np.linspace(0, 255, preprocess.size, dtype=np.float32)[:, None, None]
    images = np.concatenate([noise, np.broadcast_to(stripes, shape)])
    ours = np.asarray(Backbone(graph, tap="prob")(preprocess(images)))
    inputs = keras.applications.vgg16.preprocess_input(images.copy())
    theirs = weights.model(weights=str(weights.path))(inputs, training=False)
    return float(np.max(np.abs(ours - np.asarray(theirs))))


def _opened(request: urllib.request.Request) -> Any:
    """The response, within ``TIMEOUT_S``. The timeout of ``urlopen`` is for each address, and a
    name server has none; so it is waited for from outside."""
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(urllib.request.urlopen(request, timeout=TIMEOUT_S))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    if not found:
        raise TimeoutError(f"no answer within {TIMEOUT_S:g} s")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _receive(response: Any, part: Path, done: int) -> None:
    """Append what comes to ``part``, which has ``done`` bytes already.

    Raises:
        ConnectionError: if it ends before its end.
    """
    total = done + int(response.headers.get("Content-Length", 0))
    with (
        part.open("r+b" if done else "wb") as file,
        console.download_bar(part.stem, done, total) as bar,
    ):
        file.seek(done)
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
            done += len(chunk)
    if done < total:
        raise ConnectionError(f"it was cut after {done:,} of {total:,} bytes; pull again to go on")


def _manual(weights: Weights, reason: str) -> str:
    return (
        f"cannot download {weights.url} ({reason}); get it where there is a network and put it at "
        f"{str(weights.path)!r}, or convert any copy of published weights: vgg-transfer convert "
        "FILE --out PREFIX"
    )
