"""What a running stream holds: nothing of the two heads, and no dictionary of its own."""

from __future__ import annotations

import gc
import tracemalloc

import pytest

from llmproxy.server.connection import ClientConnection
from llmproxy.server.request import Request
from tests.gateway.played import SSE, PlayedGateway, PlayedResponse
from tests.support.sockets import request

ASKED = "X-Asked: 1"
TOLD = (b"x-told", b"1")
SIZE = 500_000


def holders(name: bytes) -> list[object]:
    """Return the lists of fields with this name, and the tables of their values."""
    return [
        one
        for one in gc.get_objects()
        if (type(one) is list and any(type(of) is tuple and of[:1] == (name,) for of in one))
        or (type(one) is dict and name in one)
    ]


def streaming() -> tuple[PlayedGateway, PlayedResponse]:
    """Return a stream that runs."""
    played = PlayedGateway()
    played.call("POST", "/p/v1/chat/completions", ASKED)
    played.upstream.asked[-1].fields = []  # the test's own
    response = played.response(200, SSE, TOLD)
    for _ in range(3):
        response.push(b"data: {}\n\n")
    return played, response


def test_heads_are_let_go_of_while_the_body_runs() -> None:
    """Neither the story nor what it calls keeps the fields that came, or those that were sent."""
    assert holders(TOLD[0]) == holders(b"x-asked") == []
    played, response = streaming()
    assert holders(TOLD[0]) == holders(b"x-asked") == []
    assert played.got()[1][b"x-told"] == b"1"
    response.push(b"data: [DONE]\n\n")
    response.end()
    assert played.trace().end_reason == "complete"


def test_a_request_and_its_connection_have_no_dictionary() -> None:
    """All that is set while a stream runs has a slot, also what Twisted sets."""
    played, response = streaming()
    (connection,) = played.site.connections
    (request,) = connection.requests
    assert (type(connection), type(request)) == (ClientConnection, Request)
    assert (vars(connection), vars(request)) == ({}, {})
    response.push(b"data: [DONE]\n\n")
    response.end()
    assert played.trace().end_reason == "complete"


@pytest.mark.parametrize("route", ["", 'capture = "content"'])
def test_a_requests_body_is_let_go_of_while_the_response_runs(route: str) -> None:
    """It may have megabytes, and ``request_memory`` counts it no longer."""
    played = PlayedGateway(route=route)
    data = request("POST", "/p/v1/chat/completions", "X-Api-Key: key", body=b"[%b]" % (b" " * SIZE))
    played.send(data)  # what is made once is there
    played.response(200, SSE).end()
    tracemalloc.start()
    try:
        played.send(data)
        played.upstream.asked[-1].body = b""  # the test's own
        response = played.response(200, SSE)
        response.push(b"data: {}\n\n")
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < SIZE
    response.end()
