"""The web application: routes, and how errors become answers."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from transfer.serving import rest
from transfer.serving.batching import Batcher, QueueFullError
from transfer.serving.confident_errors import ConfidentErrors
from transfer.serving.limits import Bodies, RateLimit, check_origin
from transfer.serving.metrics import Metrics
from transfer.serving.rest import RequestError
from transfer.serving.served_model import BadImageError, Image, ServedModel

logger = logging.getLogger(__name__)

PAGE = "page.html"
Result = TypeVar("Result")
_THREADS = 2
_MAX_TASKS = 64  # that are done or wait
_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
    "connect-src 'self'; img-src 'self' blob: data:; media-src blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server accepts, and what its page shows.

    ``hosts`` are the accepted Host headers, ``None`` for all. ``max_rate`` is in requests per
    second and client. ``max_waiting`` and ``batch_size`` are numbers of images. ``top_k`` classes
    are shown; an image is "not sure" if the highest probability is less than ``abstain_below``.
    """

    name: str
    hosts: frozenset[str] | None = None
    max_bytes: int = 20_000_000
    max_waiting: int = 1024
    max_rate: float | None = None
    batch_size: int = 32
    top_k: int = 5
    abstain_below: float | None = None


def build_app(
    model: ServedModel,
    settings: Settings,
    errors: ConfidentErrors | str,
    on_ready: Callable[[], None] = lambda: None,
) -> Starlette:
    """The application of a model.

    Args:
        model: the model.
        settings: limits, and what the page shows.
        errors: the most confident errors of its run; or the reason why they are not shown.
        on_ready: called when the model answers requests.
    """
    service = _Service(model, settings, errors, on_ready)
    name = "/v1/models/{name}"
    version = f"{name}/versions/{{version}}"
    routes = [
        Route("/", service.page),
        Route("/healthz", service.health),
        Route("/metrics", service.metrics_text),
        Route("/labels", service.labels),
        Route(f"{name}:predict", service.predict, methods=["POST"]),
        Route(f"{version}:predict", service.predict, methods=["POST"]),
        Route(name, service.status),
        Route(version, service.status),
        Route("/overlay/{label}", service.overlay, methods=["POST"]),
        Route("/confident-errors", service.list_errors),
        Route("/confident-errors/{number}/photo", service.error_photo),
        Route("/confident-errors/{number}/overlay", service.error_overlay),
        Route("/confident-errors/{number}/label", service.correct, methods=["POST"]),
    ]
    app = Starlette(routes=routes, lifespan=service.lifespan)
    for kind in (RequestError, HTTPException, BadImageError, QueueFullError, ClientDisconnect):
        app.add_exception_handler(kind, _error)
    app.add_exception_handler(Exception, _failure)
    app.add_middleware(_Guard, service=service)
    return app


class _Service:
    """The handlers of requests."""

    def __init__(
        self,
        model: ServedModel,
        settings: Settings,
        errors: ConfidentErrors | str,
        on_ready: Callable[[], None],
    ):
        self.model, self.settings, self.errors = model, settings, errors
        self.bodies = Bodies(settings.max_bytes)
        self.rate = RateLimit(settings.max_rate)
        self.metrics = Metrics()
        self._num_tasks = 0
        self._on_ready = on_ready
        self._page = (files("transfer.serving") / PAGE).read_text(encoding="utf-8")
        self._batcher = Batcher[Image, "np.ndarray | BadImageError"](
            self._compute, batch_size=settings.batch_size, max_waiting=settings.max_waiting
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._work, self._parsing = (anyio.CapacityLimiter(_THREADS) for _ in range(2))
        async with self._batcher.running():
            await self._batcher([np.zeros((9, 9, 3), np.uint8)])  # traces the network
            # Splits the network; in the first request, all others would wait for it.
            await anyio.to_thread.run_sync(lambda: self.model.can_explain)
            self._on_ready()
            yield

    def _compute(self, images: list[Image]) -> list[np.ndarray | BadImageError]:
        self.metrics.batches.observe(len(images))
        return self.model.probabilities(images)

    async def page(self, _: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        shown = {
            "name": self.settings.name,
            "labels": self.model.labels,
            "top_k": min(self.settings.top_k, len(self.model.labels)),
            "abstain_below": self.settings.abstain_below,
            "max_bytes": self.settings.max_bytes,
            "can_explain": self.model.can_explain,
        }
        data = json.dumps(shown).replace("<", "\\u003c")
        page = self._page.replace("NONCE", nonce).replace("SETTINGS", data, 1)
        policy = _POLICY.format(nonce=nonce)
        return HTMLResponse(page, headers={"content-security-policy": policy})

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics_text(self, _: Request) -> Response:
        self.metrics.waiting.set(len(self._batcher))
        text = generate_latest(self.metrics.registry)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    async def labels(self, _: Request) -> Response:
        return JSONResponse({"labels": self.model.labels})

    async def status(self, request: Request) -> Response:
        self._check_model(request)
        return JSONResponse(rest.status())

    async def predict(self, request: Request) -> Response:
        self._check_model(request)
        with self.bodies.reserved(request):
            body = await self.bodies.read(request)
            parsed = await anyio.to_thread.run_sync(
                rest.parse, body, self.settings.max_waiting, limiter=self._parsing
            )
            found = iter(
                await self._batcher([x for x in parsed.images if not isinstance(x, BadImageError)])
            )
        results = [x if isinstance(x, BadImageError) else next(found) for x in parsed.images]
        num_failed = sum(isinstance(result, BadImageError) for result in results)
        self.metrics.images.labels("predicted").inc(len(results) - num_failed)
        self.metrics.images.labels("unreadable").inc(num_failed)
        threshold = self.settings.abstain_below
        answer = rest.answer(parsed, results, self.model.labels, threshold)
        return JSONResponse(answer)

    async def overlay(self, request: Request) -> Response:
        label = _number(request, "label", len(self.model.labels))
        with self.bodies.reserved(request):
            return await self._explain(await self.bodies.read(request), label)

    async def list_errors(self, _: Request) -> Response:
        if isinstance(self.errors, str):
            return JSONResponse({"reason": self.errors, "errors": []})
        try:
            corrected = await self._in_thread(self.errors.corrected)
        except (OSError, ValueError) as error:
            return JSONResponse({"reason": str(error), "errors": []})
        rows = zip(self.errors.all, corrected, strict=True)
        return JSONResponse({"errors": [vars(row) | {"corrected": label} for row, label in rows]})

    async def error_photo(self, request: Request) -> Response:
        data = await self._error_image(request)
        return _jpeg(await self._in_thread(self.model.photo, data))

    async def error_overlay(self, request: Request) -> Response:
        data = await self._error_image(request)
        error = self._errors().all[self._number(request)]
        if error.prediction not in self.model.labels:
            raise RequestError(404, f"the model has no class {error.prediction!r}")
        return await self._explain(data, self.model.labels.index(error.prediction))

    async def correct(self, request: Request) -> Response:
        number = self._number(request)
        with self.bodies.reserved(request):
            body = await self.bodies.read(request)
        try:
            label = json.loads(body)["label"]
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            raise RequestError(400, 'expected {"label": "..."}') from error
        if label not in self.model.labels:
            raise RequestError(400, f"{label!r} is not a class of the model")
        try:
            manifest = await self._in_thread(self._errors().correct, number, label)
        except (OSError, ValueError) as error:
            raise RequestError(409, str(error)) from error
        return JSONResponse({"label": label, "manifest": str(manifest)})

    async def _in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        """The result of slow work on single images, of which little is done at a time: large images
        take much memory."""
        if self._num_tasks >= _MAX_TASKS:
            raise RequestError(503, "the server is busy with other requests", retry_after=1)
        self._num_tasks += 1
        try:
            return await anyio.to_thread.run_sync(function, *args, limiter=self._work)
        finally:
            self._num_tasks -= 1

    def _check_model(self, request: Request) -> None:
        name, version = request.path_params["name"], request.path_params.get("version")
        if name != self.settings.name or version not in (None, rest.VERSION):
            asked = name if version is None else f"{name}, version {version}"
            raise RequestError(
                404, f"{asked} is not served; expected {self.settings.name}, version {rest.VERSION}"
            )

    async def _explain(self, data: bytes, label: int) -> Response:
        if not self.model.can_explain:
            raise RequestError(404, "the network has no feature maps; it cannot be explained")
        return _jpeg(await self._in_thread(self.model.overlay, data, label))

    def _errors(self) -> ConfidentErrors:
        if isinstance(self.errors, str):
            raise RequestError(404, self.errors)
        return self.errors

    def _number(self, request: Request) -> int:
        return _number(request, "number", len(self._errors().all))

    async def _error_image(self, request: Request) -> bytes:
        try:
            return await self._in_thread(self._errors().image, self._number(request))
        except (OSError, ValueError) as error:
            raise RequestError(404, str(error)) from error


class _Guard:
    """Middleware: refuses requests, adds headers to answers, and counts both."""

    def __init__(self, app: ASGIApp, service: _Service):
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, request = time.perf_counter(), Request(scope)
        code = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                extra = [(key.encode(), value.encode()) for key, value in _HEADERS.items()]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        app = self._app
        try:
            check_origin(request, self._service.settings.hosts)
            # Photos and overlays of errors are computed for each request, though they are GETs.
            if request.method == "POST" or request.url.path.endswith(("/overlay", "/photo")):
                self._service.rate.check(request.client.host if request.client else "")
        except RequestError as error:
            app = await _error(request, error)
        try:
            await app(scope, receive, send_with_headers)
        finally:
            handler = getattr(scope.get("endpoint"), "__name__", "none")
            self._service.metrics.answered(handler, code, time.perf_counter() - start)


def _number(request: Request, name: str, count: int) -> int:
    """A number of the path, below ``count``."""
    text = request.path_params[name]
    # Python refuses to convert thousands of digits.
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < count):
        raise RequestError(404, f"there is no {name} {text[:20]}; expected 0 to {count - 1}")
    return int(text)


def _jpeg(data: bytes) -> Response:
    return Response(data, media_type="image/jpeg")


async def _error(_: Request, error: Exception) -> Response:
    """The answer ``{"error": ...}`` to a request that cannot be answered."""
    status, retry_after = 400, None
    if isinstance(error, RequestError):
        status, retry_after = error.status, error.retry_after
    elif isinstance(error, HTTPException):
        status = error.status_code
    elif isinstance(error, QueueFullError):
        status, retry_after = 503, 1
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    text = error.detail if isinstance(error, HTTPException) else str(error)
    return JSONResponse({"error": text}, status, headers)


async def _failure(_: Request, error: Exception) -> Response:
    logger.error(f"a request failed: {type(error).__name__}: {error}")
    return JSONResponse({"error": "the server failed; its log says why"}, 500)
