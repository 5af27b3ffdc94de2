"""Limits on what requests may use, without a server."""

import contextlib

import pytest
from starlette.requests import Request

from transfer.serving.limits import Bodies
from transfer.serving.rest import RequestError


def request(**headers):
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": pairs})


def test_a_chunked_body_reserves_the_maximum_whatever_length_it_declares():
    bodies = Bodies(100)
    chunked = request(content_length="1", transfer_encoding="chunked")
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(bodies.reserved(chunked))
        with pytest.raises(RequestError, match="busy") as error, bodies.reserved(chunked):
            pass
        assert error.value.status == 503
    with bodies.reserved(request(content_length="100")):
        pass
