"""Serve a fine-tuned model on this machine: a page to try it, and a REST API for programs.

    vgg-transfer serve RUN
    vgg-transfer serve RUN --port 8080 --abstain-below 0.7

The page classifies photos and camera pictures, shows the region that explains each prediction, and
corrects labels of held-out images. Programs use the REST API of TensorFlow Serving. Ctrl-C and
SIGTERM end the server when requests in flight are answered, with exit status 0. Needs
``pip install 'vgg-transfer[serve]'``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from cyclopts import Parameter

from recipes.startup import job


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Flags of ``vgg-transfer serve``, with their defaults."""

    host: str = "127.0.0.1"
    """Address to bind to. By default, only this machine can connect; 0.0.0.0 is open to all."""
    port: int = 8501
    """Port to bind to; 0 takes any free one."""
    name: str | None = None
    """Name of the model in URLs, /v1/models/NAME. [default: that of the run folder]"""
    top_k: int = 5
    """Number of classes that the page shows per image, most probable first."""
    abstain_below: float | None = None
    """Show "not sure" for images whose most probable class has a lower probability (0 to 1)."""
    batch_size: int = 32
    """Maximum number of images that are computed together."""
    max_mb: float = 20
    """Maximum size of a request in megabytes."""
    max_megapixels: float = 50
    """Maximum size of an image in millions of pixels."""
    max_queue: int = 1024
    """Maximum number of images that wait; further requests get status 503."""
    max_rate: float | None = None
    """Maximum number of requests per second of each client; further ones get status 429. [default:
    no limit]"""
    show_errors: bool | None = None
    """Show the held-out images with the most confident errors, and let labels be corrected.
    [default: if only this machine can connect]"""


def serve(run: Path, /, config: ServeConfig = ServeConfig()) -> int:
    """Serve a page and a REST API.

    Args:
        run: run folder of finetune, or checkpoint prefix of a fine-tuned model.
    """
    results = sys.stdout
    with job():
        from transfer.serving.server import serve as serve_run

        def ready(url: str) -> None:
            print(url, file=results, flush=True)

        serve_run(run, **vars(config), on_ready=ready)
    return 0
