"""WebSocket handshakes: what is one, what is a faulty one, and what its subprotocols mean."""

from __future__ import annotations

import pytest

from llmproxy.errors import ProxyError
from llmproxy.http1.grammar import Fields
from llmproxy.http1.websocket import accept_of, is_handshake, read_handshake

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
FIELDS: Fields = [
    (b"host", b"x"),
    (b"upgrade", b"websocket"),
    (b"connection", b"Upgrade"),
    (b"sec-websocket-version", b"13"),
    (b"sec-websocket-key", KEY),
]
ACCEPTED: Fields = [
    (b"upgrade", b"WebSocket"),
    (b"connection", b"upgrade"),
    (b"sec-websocket-accept", b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
]


@pytest.mark.parametrize(
    ("upgrade", "connection", "version", "is_one"),
    [
        (b"websocket", b"Upgrade", b"HTTP/1.1", True),
        (b"WebSocket", b"keep-alive, UPGRADE", b"HTTP/1.1", True),
        (b"h2c, websocket/13", b"upgrade", b"HTTP/1.1", True),
        (b"websocket", b"Upgrade", b"HTTP/1.0", False),
        (b"websocket", b"keep-alive", b"HTTP/1.1", False),
        (b"h2c", b"upgrade", b"HTTP/1.1", False),
    ],
)
def test_what_is_a_handshake(
    upgrade: bytes, connection: bytes, version: bytes, is_one: bool
) -> None:
    """Both fields are needed, and HTTP/1.1."""
    fields = [(b"upgrade", upgrade), (b"connection", connection)]
    assert is_handshake(fields, version) is is_one


def test_the_proof_is_that_of_the_rfc() -> None:
    """RFC 6455, section 1.3, has an example."""
    assert accept_of(KEY) == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_101_must_prove_itself(missing: int) -> None:
    """Each of its three fields is needed."""
    handshake = read_handshake(b"GET", FIELDS, has_body=False)
    handshake.prove(ACCEPTED)
    with pytest.raises(ProxyError) as raised:
        handshake.prove(ACCEPTED[:missing] + ACCEPTED[missing + 1 :])
    assert raised.value.reason == "upstream_protocol"


@pytest.mark.parametrize(
    ("value", "rest", "meant"),
    [
        (b"realtime", [b"realtime"], []),
        (
            b"realtime, openai-insecure-api-key.sk-1, openai-beta.realtime-v1",
            [b"realtime, openai-beta.realtime-v1"],
            [(b"authorization", b"Bearer sk-1")],
        ),
        (b"openai-insecure-api-key.sk-1", [], [(b"authorization", b"Bearer sk-1")]),
        (
            b"realtime,openai-organization.o,openai-project.p",
            [b"realtime"],
            [(b"openai-organization", b"o"), (b"openai-project", b"p")],
        ),
    ],
)
def test_subprotocols_that_mean_fields_become_fields(
    value: bytes, rest: list[bytes], meant: Fields
) -> None:
    """The others stay, in their order."""
    handshake = read_handshake(
        b"GET", [*FIELDS, (b"sec-websocket-protocol", value)], has_body=False
    )
    found = [value for name, value in handshake.fields if name == b"sec-websocket-protocol"]
    assert found == rest
    assert handshake.fields[-len(meant) :] == meant or not meant


def test_realtime_is_answered_where_the_provider_answers_nothing() -> None:
    """What the provider answers stays."""
    fields = [*FIELDS, (b"sec-websocket-protocol", b"x"), (b"sec-websocket-protocol", b"realtime")]
    handshake = read_handshake(b"GET", fields, has_body=False)
    assert handshake.subprotocol(ACCEPTED) == [(b"sec-websocket-protocol", b"realtime")]
    assert not handshake.subprotocol([*ACCEPTED, (b"sec-websocket-protocol", b"x")])
    assert not read_handshake(b"GET", FIELDS, has_body=False).subprotocol(ACCEPTED)
