"""Request bodies: exact, bounded, rejected in words, and dropped in time (design 4)."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from tests.support.daemon import route_table
from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    assert_settles,
    client_config,
    live_fixture,
    post,
    read_response,
    until,
)
from tests.support.scripts import LAST, OK, Turn
from tests.support.sockets import Wire, chunked, request

KIB = 1024
LIMITS = '[limits]\nrequest_body = "64KiB"\nrequest_memory = "256KiB"\n'

live = live_fixture(
    ONE_ROUTE
    + LIMITS
    + route_table("/big", "p", 'request_body = "200KiB"')
    + route_table("/small", "p", 'request_body = "1KiB"')
    + route_table("/inside", "p", 'models = ["m"]')
    + client_config("limited", "limited-key", 'models = ["m"]')
)

roomy = live_fixture()


PAUSE = threading.Event()
"""Never set: a wait for it is a pause."""

JSON, OCTETS = "Content-Type: application/json", "Content-Type: application/octet-stream"


def json_text(size: int) -> bytes:
    """Return so many bytes of JSON: a body that is held."""
    return b'"' + b"x" * (size - 2) + b'"'


def test_a_body_is_exact(live: LiveProxy) -> None:
    """Every byte value crosses; so does JSON with its spaces, and an empty body stays empty."""
    every = bytes(range(256)) * 4
    received, _ = live.ask(request("POST", "/p/x", OCTETS, body=every))
    assert received.body == every
    text = b' {"b" : 1.50, "a":"\\u00e4\xc3\xa4" }\r\n'
    assert live.ask(post("/p/x", text))[0].body == text
    received, _ = live.ask(request("POST", "/p/x", "Content-Length: 0"))
    assert received.body == b""
    assert received.values(b"content-length") == [b"0"]


def test_a_large_body_is_exact_for_a_provider_that_reads_slowly(roomy: LiveProxy) -> None:
    """The proxy holds 20 MB, which the kernel takes in many pieces."""
    body = json_text(20_000_000)
    received, got = roomy.ask(post("/p/x", body))
    assert received.body == body
    assert got.body == b"ok"
    assert roomy.trace(got)["bytes_in"] == len(body)


@pytest.mark.parametrize("unit", [b'["["],', b"[" * 500 + b"]" * 500 + b","])
def test_a_body_of_brackets_does_not_hold_up_the_others(roomy: LiveProxy, unit: bytes) -> None:
    """While thirty megabytes of them are read, nobody waits for a large part of that time."""
    body = b'{"x":[' + unit * (30_000_000 // len(unit)) + b"1]}"
    roomy.reply(OK)
    longest = 0.0
    with roomy.connect() as client, ThreadPoolExecutor(1) as pool:
        client.send(post("/p/brackets", body))
        response, start = pool.submit(read_response, client), time.monotonic()
        while not response.done():
            began = time.monotonic()
            assert roomy.daemon.admin("/livez") == "alive\n"
            longest = max(longest, time.monotonic() - began)
        assert response.result().status == 200
    assert longest < (time.monotonic() - start) / 3


@pytest.mark.parametrize(
    ("target", "size"), [("/p/x", 64 * KIB), ("/big/x", 200 * KIB), ("/small/x", KIB)]
)
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_the_limit_itself_passes_and_a_byte_more_does_not(
    live: LiveProxy, target: str, size: int, framing: str
) -> None:
    """Each route has its own limit; the length decides, or where there is none, the bytes."""

    def sent(count: int) -> bytes:
        if framing == "length":
            return post(target, json_text(count))
        head = request("POST", target, JSON, "Transfer-Encoding: chunked")
        return head + chunked(json_text(count)) + LAST

    received, _ = live.ask(sent(size))
    assert len(received.body) == size
    got = live.reject(sent(size + 1))
    assert (got.status, got.error) == (413, "body_too_large")
    assert got.json()["error"]["code"] == "body_too_large"
    assert_settles(live.daemon)


@pytest.mark.parametrize("kind", [JSON, OCTETS])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_rejection_can_be_read_although_the_upload_goes_on(
    live: LiveProxy, framing: str, kind: str
) -> None:
    """A client that sends 8 MB before it reads finds the 413, and no reset in its place."""
    live.hold()
    body = b"x" * 8_000_000
    with live.connect() as client:
        if framing == "length":
            client.send(request("POST", "/p/x", kind, body=body))
        else:
            client.send(request("POST", "/p/x", kind, "Transfer-Encoding: chunked"))
            client.send(chunked(*[body[:100_000]] * 80), LAST)
        got = read_response(client)
        assert got.status == 413
        assert got.values(b"connection") == [b"close"]
        assert client.wait_closed() == "fin"
        assert client.buffer == b""


def test_a_rejected_upload_without_end_is_not_read_for_ever(live: LiveProxy) -> None:
    """The refusal is given at once, and the connection is closed a little later."""
    with live.connect() as client:
        client.send(request("POST", "/p/x", OCTETS, "Content-Length: 1000000000"))
        assert read_response(client).status == 413

        def upload() -> None:
            with suppress(OSError):
                while True:
                    client.send(b"x" * 65536)

        uploading = threading.Thread(target=upload)
        uploading.start()
        uploading.join(20)
        assert not uploading.is_alive()
    assert_settles(live.daemon)


def test_the_bodies_held_at_once_are_bounded(live: LiveProxy) -> None:
    """503 with a retry-after once the memory is taken; it is free again when a body was served."""
    count, size = 3, 60 * KIB
    body = json_text(size)
    held = [live.connect() for _ in range(count)]
    for client in held:
        client.send(request("POST", "/p/x", JSON, f"Content-Length: {size}"), body[:-1])

    until(lambda: live.gauge("request_bytes_held") == count * (size - 1), "all bodies are held")
    got = live.reject(post("/p/x", body))
    assert (got.status, got.error) == (503, "memory_full")
    assert [int(value) > 0 for value in got.values(b"retry-after")] == [True]
    live.reply(OK)
    with held.pop() as client:
        client.send(body[-1:])
        assert read_response(client).status == 200
    assert live.gauge("request_bytes_held") == (count - 1) * (size - 1)
    received, _ = live.ask(post("/p/x", body))
    assert received.body == body
    for client in held:
        client.sock.close()
    assert_settles(live.daemon)


def test_one_client_does_not_take_the_memory_of_the_others(live: LiveProxy) -> None:
    """Eight unfinished bodies of one leave room for another, and those that rest make more."""
    size = 60 * KIB
    body = json_text(size)
    greedy = [live.connect() for _ in range(8)]
    for client in greedy:
        client.send(request("POST", "/p/x", JSON, f"Content-Length: {size}"), body[:-1])
    until(lambda: live.gauge("request_bytes_held") >= 3 * (size - 1), "three bodies are held")
    key = "x-llmproxy-key: limited-key"
    asked = b'{"model": "m", "x": "' + b"x" * (48 * KIB) + b'"}'
    received, _ = live.ask(post("/inside", asked, key))
    assert received.body == asked

    waiting = live.connect()
    waiting.send(request("POST", "/inside", JSON, key, f"Content-Length: {size}"), body[:-1])
    until(lambda: live.gauge("request_bytes_held") >= 4 * (size - 1), "the others' is held, too")
    PAUSE.wait(1.1)
    received, _ = live.ask(post("/inside", asked, key))
    assert received.body == asked
    for client in [*greedy, waiting]:
        client.sock.close()
    assert_settles(live.daemon)


def test_a_body_is_dropped_once_the_response_began(live: LiveProxy) -> None:
    """A long stream does not hold the memory of its request."""
    turn = Turn()

    def script(wire: Wire) -> None:
        wire.read_request()
        turn.take()
        wire.send(OK.removesuffix(b"ok"))
        turn.take()
        wire.send(b"ok")

    live.script = script
    with live.connect() as client:
        client.send(post("/p/x", json_text(1000)))
        until(lambda: live.gauge("request_bytes_held") == 1000, "the body is held meanwhile")
        turn.give()
        client.read_until(b"\r\n\r\n")
        assert live.gauge("request_bytes_held") == 0
        turn.give()
        assert client.read(2) == b"ok"


def test_an_encoded_body_is_rejected_where_the_model_decides(live: LiveProxy) -> None:
    """415 where the route or the client is bound to models; elsewhere it crosses unread."""
    encoded = ("Content-Encoding: gzip",)
    got = live.reject(post("/inside/x", b"\x1f\x8b...", *encoded))
    assert (got.status, got.error) == (415, "encoded_body")
    limited = (*encoded, "x-llmproxy-key: limited-key")
    assert live.reject(post("/p/x", b"\x1f\x8b...", *limited)).status == 415
    received, _ = live.ask(post("/p/x", b"\x1f\x8b...", *encoded))
    assert received.body == b"\x1f\x8b..."
    assert received.values(b"content-encoding") == [b"gzip"]
