"""A look inside: bodies in a Content-Encoding, and large ones, which take several turns."""

from __future__ import annotations

import gzip
import inspect
import itertools
import json
import random
import sys
import zlib
from collections.abc import Callable

import brotli
import pytest
from twisted.internet.error import ConnectionDone

from llmproxy.net.turns import BUDGET_S
from tests.gateway.played import BODY, JSON, PlayedGateway
from tests.support.sockets import request
from tests.support.turning import TurningReactor

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STRICT = 'models = ["m", "n"]'
OVERRIDE = '[routes.override]\np = { model = "n" }'
INJECT = 'include_usage = "inject"'
OTHER = BODY.replace(b'"m"', b'"n"')
CHAT = "/p/v1/chat/completions"


def raw_deflate(data: bytes) -> bytes:
    """Compress without zlib's frame, as some clients do."""
    coder = zlib.compressobj(wbits=-15)
    return coder.compress(data) + coder.flush()


ENCODERS: dict[str, list[Callable[[bytes], bytes]]] = {
    "gzip": [gzip.compress],
    "deflate": [zlib.compress, raw_deflate],
    "br": [brotli.compress],
    "zstd": [zstd.compress],
}
CODED = [(coding, coder) for coding, coders in ENCODERS.items() for coder in coders]


def called(played: PlayedGateway, body: bytes, *fields: str, target: str = CHAT) -> PlayedGateway:
    """Let a request come in, and the turns pass that it takes to read it."""
    played.call("POST", target, JSON, *fields, body=body)
    played.clock.advance(0)
    return played


def coded(played: PlayedGateway, body: bytes, coding: str, target: str = CHAT) -> PlayedGateway:
    """Let a coded request come in."""
    return called(played, body, f"Content-Encoding: {coding}", target=target)


@pytest.mark.parametrize(("coding", "encode"), CODED)
@pytest.mark.parametrize("name", ["{}", "{} ", "identity, {}", "X"])
def test_a_coded_body_is_read_and_sent_as_it_came(
    coding: str, encode: Callable[[bytes], bytes], name: str
) -> None:
    """Its model decides; the provider gets the caller's own bytes, and the coding's name."""
    value = coding.upper() if name == "X" else name.format(coding)
    sent = encode(BODY)
    played = coded(PlayedGateway(route=STRICT), sent, value)

    assert played.asked.body == sent
    assert (b"content-encoding", value.strip().encode()) in played.asked.fields
    assert played.site.memory.held == len(sent) + len(BODY)
    played.response().end()
    trace = played.trace()
    assert (trace.model, trace.model_from, trace.stream) == ("m", "body", True)
    assert trace.bytes_in == len(sent)


@pytest.mark.parametrize(("coding", "encode"), CODED)
def test_a_coded_body_cannot_hide_its_model(coding: str, encode: Callable[[bytes], bytes]) -> None:
    """What is not allowed is refused in every coding."""
    played = coded(PlayedGateway(client='models = ["x"]'), encode(BODY), coding)

    assert played.refusal() == (403, "model_forbidden")
    assert not played.upstream.asked


@pytest.mark.parametrize(("coding", "encode"), CODED)
def test_a_coded_body_that_is_changed_goes_without_its_coding(
    coding: str, encode: Callable[[bytes], bytes]
) -> None:
    """An override and an added option make an identity body of it."""
    played = coded(PlayedGateway(route=f"{INJECT}\n{OVERRIDE}"), encode(BODY), coding)

    assert json.loads(played.asked.body) == {
        "model": "n",
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert not [name for name, _ in played.asked.fields if name == b"content-encoding"]
    only_added = coded(PlayedGateway(route=INJECT), encode(BODY), coding)
    assert json.loads(only_added.asked.body)["stream_options"] == {"include_usage": True}
    played.response().end()
    assert played.trace().model == "m"


def test_a_coded_form_is_overridden() -> None:
    """The field of the form changes, and nothing else."""
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--b--\r\n'
    played = PlayedGateway(route=OVERRIDE)
    kind = "Content-Type: multipart/form-data; boundary=b"
    played.call("POST", CHAT, kind, "Content-Encoding: gzip", body=gzip.compress(form % b"m"))
    played.clock.advance(0)

    assert played.asked.body == form % b"n"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", BODY),
        ("gzip", gzip.compress(BODY)[:-9]),
        ("gzip", gzip.compress(BODY) + b"x"),
        ("gzip", gzip.compress(BODY) + gzip.compress(b" ")),
        ("gzip", gzip.compress(BODY) + b"\0\0"),
        ("zstd", zstd.compress(BODY) + zstd.compress(b" ")),
        ("zstd", b"\x28\xb5\x2f\xfd" + b"\xff" * 200),
        ("br", brotli.compress(BODY) + b"x"),
        ("deflate", zlib.compress(BODY) + b"x"),
        ("gzip", gzip.compress(b" " * 10**7 + BODY)),
        ("gzip, gzip", gzip.compress(gzip.compress(BODY))),
        ("compress", BODY),
        ("exi", BODY),
    ],
    ids=itertools.count(),
)
def test_a_body_in_an_unclear_coding_is_refused_where_it_must_be_read(
    strict: bool, coding: str, body: bytes
) -> None:
    """The refusal names the codings that would do; elsewhere the body crosses unread."""
    route = STRICT if strict else INJECT
    played = coded(PlayedGateway(route=route), body, coding)

    if strict:
        status, fields, text = played.got()
        assert (status, fields[b"x-llmproxy-error"]) == (415, b"encoded_body")
        assert fields[b"accept-encoding"] == b"gzip, deflate, br, zstd"
        assert b"Accept-Encoding" in text
    else:
        assert played.asked.body == body
        assert dict(played.asked.fields)[b"content-encoding"] == coding.encode()
        played.response().end()
    assert played.trace().model is None


@pytest.mark.parametrize("length", ["Content-Length: 4", "Transfer-Encoding: chunked"])
def test_a_type_that_is_not_read_is_refused_where_the_model_matters(length: str) -> None:
    """It is refused before the body comes, and where that came along; elsewhere it streams."""
    head = ("X-Api-Key: key", "Content-Type: audio/wav", length)
    for body in (b"", b"RIFF" if "Length" in length else b"4\r\nRIFF\r\n0\r\n\r\n"):
        for route in (STRICT, OVERRIDE):
            played = PlayedGateway(route=route)
            played.send(request("POST", CHAT, *head) + body)
            status, fields, _ = played.got()
            assert (status, fields[b"x-llmproxy-error"]) == (415, b"unread_body")
            assert fields[b"accept"] == b"application/json, multipart/form-data"
        played = PlayedGateway(route=INJECT)
        played.send(request("POST", CHAT, *head) + body)
        assert played.asked.body is not None


def test_a_body_that_can_be_read_in_two_ways_is_refused() -> None:
    """Whether its model matters or not."""
    for route in (STRICT, ""):
        played = called(PlayedGateway(route=route), b'{"model":"m","model":"n"}')
        assert played.refusal() == (400, "bad_body")


def test_two_lines_of_codings_are_one_list() -> None:
    """A second line is a second coding."""
    body = gzip.compress(BODY)
    lines = ("Content-Encoding: gzip", "Content-Encoding: gzip")
    assert called(PlayedGateway(route=STRICT), body, *lines).refusal()[0] == 415
    lines = ("Content-Encoding: identity", "Content-Encoding: identity")
    assert called(PlayedGateway(route=STRICT), BODY, *lines).asked.body == BODY


def test_a_decoded_body_is_bounded_by_the_routes_limit() -> None:
    """A body that is larger than the route takes once it is decoded is a 413."""
    noise = random.Random(1).randbytes(20_000).hex()
    body = gzip.compress(b'{"model":"m","x":"%b"}' % noise.encode())
    for limit, status in (("39KiB", 413), ("40KiB", None)):
        played = coded(PlayedGateway(route=f'{STRICT}\nrequest_body = "{limit}"'), body, "gzip")
        if status is None:
            assert played.asked.body == body
        else:
            assert played.refusal() == (413, "body_too_large")
            assert played.trace().error == "body_too_large"


@pytest.mark.parametrize("more", ['request_body = "39KiB"', '[limits]\nrequest_memory = "40KiB"'])
def test_a_body_that_need_not_be_decoded_crosses_unread(more: str) -> None:
    """Where it would be decoded for an option alone, too much of it is no reason to refuse it."""
    noise = random.Random(1).randbytes(20_000).hex()
    body = gzip.compress(b'{"model":"m","stream":true,"x":"%b"}' % noise.encode())
    is_limit = more.startswith("[")
    played = coded(
        PlayedGateway(
            route=INJECT if is_limit else f"{INJECT}\n{more}", more=more if is_limit else ""
        ),
        body,
        "gzip",
    )
    assert played.asked.body == body
    played.response().end()
    assert played.trace().model is None


def test_a_decoded_body_is_bounded_by_the_route_that_it_takes() -> None:
    """Another route at the path may take more."""
    body = gzip.compress(b'{"model":"m","x":"%b"}' % (b"x" * 2000))
    more = '[[routes]]\npath = "/p"\nname = "q"\nproviders = ["p"]\nrequest_body = "4KiB"'
    for model, refusal in (("m", (413, "body_too_large")), ("n", None)):
        route = f'models = ["{model}"]\nrequest_body = "1KiB"'
        played = coded(PlayedGateway(route=route, more=more), body, "gzip")
        if refusal is None:
            assert played.asked.body == body
        else:
            assert played.refusal() == refusal


def test_a_decoded_body_counts_as_held() -> None:
    """It takes of ``request_memory``, and gives it back."""
    body = gzip.compress(b'{"model":"m","x":"%b"}' % (b"x" * 50_000))
    for memory, good in (("40KiB", False), ("80KiB", True)):
        more = f'[limits]\nrequest_memory = "{memory}"'
        played = coded(PlayedGateway(route=STRICT, more=more), body, "gzip")
        if good:
            assert played.site.memory.held == len(body) + 50_020
            played.response().end()
        else:
            assert played.refusal() == (503, "memory_full")
        played.trace()  # asserts that nothing is held any more


def in_turns(route: str) -> tuple[PlayedGateway, TurningReactor]:
    """Return a gateway that reads large bodies step by step, one or two in a turn."""
    played, reactor = PlayedGateway(route=route), TurningReactor()
    ticks = itertools.count()
    turns = played.gateway._reader._turns
    turns._reactor, turns._clock = reactor, lambda: next(ticks) * BUDGET_S / 2
    return played, reactor


@pytest.mark.parametrize("unit", [b"[],", b'"\\u0041",', b'{"a":[1]},', b"1,"])
@pytest.mark.parametrize("route", [STRICT, INJECT, OVERRIDE])
def test_a_large_body_is_read_in_several_turns(unit: bytes, route: str) -> None:
    """Whatever it holds, and whatever is done with it."""
    head = b'{"model":"m","stream":true,"x":['
    body = head + unit * (2_000_000 // len(unit)) + b"1]}"
    played, reactor = in_turns(route)
    played.call("POST", CHAT, body=body)
    turns = 0
    while not played.upstream.asked:
        assert reactor.calls
        reactor.turn()
        turns += 1
    assert turns > 10
    assert json.loads(played.asked.body)["x"] == json.loads(body)["x"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (JSON, b"{}"),
        (JSON, b'{"stream":true,"input":"x"}'),
        (JSON, b"[]"),
        (JSON, b" "),
        ("Content-Type: text/plain", b'{"x":1}'),
        ("Content-Type: multipart/form-data; boundary=b", b"--b--\r\n"),
    ],
)
def test_an_override_is_not_walked_around_by_naming_no_model(kind: str, body: bytes) -> None:
    """The provider would take a model of its own."""
    for fields in ((kind,), (kind, "Content-Encoding: gzip")):
        played = PlayedGateway(route=OVERRIDE)
        sent = gzip.compress(body) if len(fields) > 1 else body
        played.call("POST", CHAT, *fields, body=sent)
        assert played.refusal()[0] == 400
        assert not played.upstream.asked


@pytest.mark.parametrize(
    ("method", "target", "body", "sent"),
    [
        ("POST", "/p/v1", b'{"model":null}', ("/base/v1", b'{"model":"n"}')),
        ("POST", "/p/deployments/m/completions", b"{}", ("/base/deployments/n/completions", b"{}")),
        ("POST", "/p/models/o/m:x", b'{"model":"m"}', ("/base/models/n:x", b'{"model":"n"}')),
        ("POST", "/p/model/n/invoke", b"{}", ("/base/model/n/invoke", b"{}")),
        ("GET", "/p/v1/models/m", b"", ("/base/v1/models/m", b"")),
        ("POST", "/p/v1/cancel", b"", ("/base/v1/cancel", b"")),
    ],
)
def test_an_override_replaces_every_name(
    method: str, target: str, body: bytes, sent: tuple[str, bytes]
) -> None:
    """In the body, in the path, or in both; a request without a body and a name needs none."""
    played = PlayedGateway(route=OVERRIDE)
    played.call(method, target, body=body)
    assert (played.asked.target.decode(), played.asked.body) == sent


@pytest.mark.parametrize(
    ("target", "refusal"),
    [
        ("/p/v1beta/models/org/BIG:generateContent", (403, "model_forbidden")),
        ("/p/model/BIG/invoke", (403, "model_forbidden")),
        ("/p/v1/models/org/BIG/predictions", (403, "model_forbidden")),
        ("/p/models/m/BIG", (403, "model_forbidden")),
        ("/p/deployments/org/m/chat/completions", None),
        ("/p/deployments/org%2Fm/chat/completions", None),
        ("/p/model/org%2Fm/converse", None),
    ],
)
def test_a_name_with_slashes_is_read_whole(target: str, refusal: tuple[int, str] | None) -> None:
    """A client needs the name alone, and gets no other."""
    played = PlayedGateway(client='models = ["org/m", "m"]')
    played.call("POST", target, body=b'{"model":"m"}')
    if refusal is None:
        assert played.asked.target.decode() == target.replace("/p/", "/base/")
    else:
        assert played.refusal() == refusal


DEAR = {
    "brackets": b'{"model":"m","stream":true,"x":[' + b"[[[[[]]]]]," * 11_000 + b"1]}",
    "wanted": b'{"model":"m","stream":true,' + b'"\\u0073x":1,' * 10_000 + b'"z":1}',
    "nested": b'{"model":"m","stream":true,"x":['
    + (b'{"a":' * 6 + b"1" + b"}" * 6 + b",") * 3400
    + b"1]}",
    "escapes": b'{"model":"m","stream":true,' + b'"\\/":1,' * 18_000 + b'"z":1}',
}
"""Bodies of some 120 KB that take long to read for their length."""


@pytest.mark.parametrize("name", DEAR)
def test_a_short_body_that_takes_long_is_read_in_several_turns(name: str) -> None:
    """How long a body is does not tell how long it takes; an option is added in turns, too."""
    played, reactor = in_turns(INJECT)
    played.call("POST", CHAT, body=DEAR[name])
    turns = 0
    while not played.upstream.asked:
        reactor.turn()
        turns += 1
    assert turns > 1000
    assert len(played.asked.body) > len(DEAR[name])


@pytest.mark.parametrize("fields", [(), ("Content-Encoding: gzip",)])
def test_an_ordinary_body_is_read_at_once(fields: tuple[str, ...]) -> None:
    """It waits for no turn if there is time left in this one, however it must be read."""
    body = rb'{"model":"m","stream":true,"messages":[{"content":"\u00e9 says \"model\""}]}'
    played = PlayedGateway(route=INJECT)
    played.call("POST", CHAT, JSON, *fields, body=gzip.compress(body) if fields else body)
    assert b"include_usage" in played.asked.body


@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_a_client_that_leaves_ends_the_reading_of_its_body(coding: str) -> None:
    """Nothing more is read of it, and nothing of it is held."""
    body = b'{"model":"m","x":[' + b"[]," * 500_000 + b"1]}"
    played, reactor = in_turns(STRICT)
    sent = gzip.compress(body) if coding == "gzip" else body
    played.call("POST", CHAT, JSON, f"Content-Encoding: {coding}", body=sent)
    reactor.turn()
    assert reactor.calls
    work, _ = played.gateway._reader._turns._waiting[0]
    played.transport.end(ConnectionDone())

    assert inspect.getgeneratorstate(work) == inspect.GEN_CLOSED
    reactor.turn()
    assert not reactor.calls
    assert played.trace().end_reason == "client_gone"
