"""``serve``: a fine-tuned model on a port of this machine."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transfer.layers.classifier import Classifier
from transfer.runs import run_folder
from transfer.serving.confident_errors import ConfidentErrors
from transfer.serving.limits import is_loopback, loopback_hosts
from transfer.serving.served_model import ServedModel

try:
    import uvicorn

    from transfer.serving.app import Settings, build_app
except ImportError as error:
    raise ImportError(
        f"serving needs a package that is not installed ({error}): pip install "
        "'vgg-transfer[serve]'"
    ) from error

logger = logging.getLogger(__name__)

_GRACE = 30  # seconds for requests in flight when the server is stopped
_MAX_CONNECTIONS = 4096


def serve(
    run: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8501,
    name: str | None = None,
    max_mb: float = 20,
    max_megapixels: float = 50,
    max_queue: int = 1024,
    max_rate: float | None = None,
    batch_size: int = 32,
    top_k: int = 5,
    abstain_below: float | None = None,
    show_errors: bool | None = None,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a page and the REST API of TensorFlow Serving until SIGINT or SIGTERM; requests in
    flight are then answered.

    Args:
        run: run folder, or checkpoint prefix of a fine-tuned model.
        host: address to bind to. By default, only this machine can connect.
        port: port to bind to; 0 takes any free one.
        name: name of the model in URLs. Default: that of the run folder.
        max_mb: maximum size of a request in megabytes.
        max_megapixels: maximum size of an image in millions of pixels.
        max_queue: maximum number of images that wait; more requests are refused (503).
        max_rate: maximum number of requests per second of each client; more are refused (429).
        batch_size: maximum number of images that are computed together.
        top_k: number of classes that the page shows.
        abstain_below: an image is "not sure" if the probability of its most probable class (0 to 1)
            is less than this.
        show_errors: whether the page shows the held-out images with the most confident errors, and
            corrects their labels. Default: if only this machine can connect.
        on_ready: called with the URL when the server answers requests.

    Raises:
        FileNotFoundError: if the model does not exist.
        OSError: if the port is taken.
        ValueError: if an argument is out of its range.
    """
    run = Path(run).expanduser()
    for argument, value in {"max_mb": max_mb, "max_megapixels": max_megapixels}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{argument}={value}: expected a number above 0")
    for argument, count in {
        "max_queue": max_queue,
        "batch_size": batch_size,
        "top_k": top_k,
    }.items():
        if count < 1:
            raise ValueError(f"{argument}={count}: expected at least 1")
    if max_rate is not None and not max_rate > 0:
        raise ValueError(f"max_rate={max_rate}: expected more than 0")
    if abstain_below is not None and not 0 <= abstain_below <= 1:
        raise ValueError(f"abstain_below={abstain_below}: expected a probability, 0 to 1")
    if name is not None and "/" in name:
        raise ValueError(f"name={name!r}: expected a name without /, as a part of a URL")
    is_local = is_loopback(host)
    model = ServedModel(Classifier.load(run), int(max_megapixels * 1e6))
    with _bound(host, port) as bound:
        port = bound.getsockname()[1]
        settings = Settings(
            name=name or _name_of(run),
            hosts=loopback_hosts(host, port) if is_local else None,
            max_bytes=int(max_mb * 1e6),
            max_waiting=max_queue,
            max_rate=max_rate,
            batch_size=batch_size,
            top_k=top_k,
            abstain_below=abstain_below,
        )
        if not is_local:
            logger.warning(
                f"everybody who reaches port {port} of this machine can use the model: there is no "
                "encryption and no password"
            )
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        errors = _confident_errors(run, is_local if show_errors is None else show_errors)
        app = build_app(model, settings, errors, on_ready=lambda: on_ready(url))
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=_GRACE,
        )
        with _ending_normally():
            uvicorn.Server(config).run(sockets=[bound])


def _name_of(run: Path) -> str:
    """The name of a run folder, as it may stand in a URL."""
    folder = run if run.is_dir() else run.parent
    return re.sub(r"[^\w.-]+", "-", folder.resolve().name) or "model"


def _confident_errors(run: Path, is_shown: bool) -> ConfidentErrors | str:
    if not is_shown:
        return "they are shown only to this machine"
    if not (run / run_folder.CONFIG).is_file():
        return f"{run} is not a run folder"
    try:
        return ConfidentErrors(run)
    except (OSError, ValueError) as error:
        return str(error)


def _bound(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
        OSError: if there is no such address, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        text = f"{host}:{port} cannot be bound ({getattr(error, 'strerror', None) or error})"
        raise OSError(number, text + "; choose another port or host") from error


@contextlib.contextmanager
def _ending_normally() -> Iterator[None]:
    """Within the context, a signal that stopped the server does not end the process: uvicorn raises
    it again when the last request is answered."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for stop in (signal.SIGINT, signal.SIGTERM):
            before[stop] = signal.signal(stop, lambda *_: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
