"""Which requests are refused: from other sites, too large, too slow, too many."""

from __future__ import annotations

import contextlib
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Iterator

import anyio
from starlette.requests import Request

from transfer.serving.rest import RequestError

_SECONDS_OF_BODY = 30.0
_BODIES = 8  # of the maximum size, in memory at a time
_MAX_CLIENTS = 10_000  # whose rates are known


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to the host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def loopback_hosts(host: str, port: int) -> frozenset[str]:
    """The Host headers with which a server on this machine is addressed."""
    names = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host}
    ports = {f":{port}"} | ({""} if port == 80 else set())
    return frozenset(name + port for name in names for port in ports)


def check_origin(request: Request, hosts: frozenset[str] | None) -> None:
    """Refuse requests that a page of another site makes.

    The Host header of a name that another site points to this machine (DNS rebinding) is the name
    of that site; a page that posts to this address directly has another origin.

    Args:
        request: the request.
        hosts: the expected Host headers; ``None`` accepts all.

    Raises:
        RequestError: if the host or the origin is another one.
    """
    host = request.headers.get("host", "").lower()
    if hosts is not None and host not in hosts:
        raise RequestError(
            403, f"the Host header is {host!r}; this server is {', '.join(sorted(hosts))}"
        )
    origin = request.headers.get("origin")
    if request.method == "POST" and origin is not None and _host_of(origin) != host:
        raise RequestError(403, f"the request comes from the page of another site, {origin!r}")


def _host_of(origin: str) -> str:
    """Host and port of an Origin header, which is no URL if it does not come from a browser."""
    return origin.lower().partition("://")[2]


class Bodies:
    """Reads the bodies of requests, with limits on the size of each and on the memory of all.

    Args:
        max_bytes: maximum size of one body.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._free = _BODIES * max_bytes

    @contextlib.contextmanager
    def reserved(self, request: Request) -> Iterator[None]:
        """Reserve memory while a request is answered.

        Raises:
            RequestError: if the body is too large, or others take the memory.
        """
        length = request.headers.get("content-length", "")
        is_chunked = "transfer-encoding" in request.headers  # the length then does not count
        size = int(length) if length.isdecimal() and not is_chunked else self.max_bytes
        if size > self.max_bytes:
            raise self._too_large()
        if size > self._free:
            raise RequestError(503, "the server is busy with other requests", retry_after=1)
        self._free -= size
        try:
            yield
        finally:
            self._free += size

    async def read(self, request: Request) -> bytes:
        """The body.

        Raises:
            RequestError: if it is too large or takes too long.
        """
        chunks, size = [], 0
        try:
            with anyio.fail_after(_SECONDS_OF_BODY):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > self.max_bytes:
                        raise self._too_large()
                    chunks.append(chunk)
        except TimeoutError:
            raise RequestError(408, f"the body took more than {_SECONDS_OF_BODY:g} s") from None
        return b"".join(chunks)

    def _too_large(self) -> RequestError:
        return RequestError(413, f"the body has more than {self.max_bytes / 1e6:g} MB")


class RateLimit:
    """A number of requests per second for each client (token bucket of one second).

    Args:
        rate: requests per second; ``None`` for no limit.
    """

    def __init__(self, rate: float | None):
        self._rate = rate
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def check(self, client: str) -> None:
        """Count a request.

        Raises:
            RequestError: if there are too many.
        """
        if self._rate is None:
            return
        most, now = max(1.0, self._rate), time.monotonic()
        tokens, last = self._clients.pop(client, (most, now))
        tokens = min(most, tokens + (now - last) * self._rate)
        is_allowed = tokens >= 1
        self._clients[client] = (tokens - is_allowed, now)
        if len(self._clients) > _MAX_CLIENTS:
            self._clients.popitem(last=False)
        if not is_allowed:
            wait = max(1, round((1 - tokens) / self._rate + 0.5))
            raise RequestError(429, f"more than {self._rate:g} requests per second", wait)
