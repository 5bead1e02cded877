"""Header fields: which of them the proxy forwards, drops, adds and refuses."""

from __future__ import annotations

from typing import Any

import pytest

from llmproxy.errors import ProxyError
from llmproxy.http1.grammar import Fields, first_values
from llmproxy.http1.headers import (
    KEY_FIELDS,
    HeaderRewriter,
    for_client,
    host_of,
    is_ndjson,
    is_owned,
    is_stream,
    media_type,
    nominated,
    refuse_disguised,
)

HOP_BY_HOP = [
    b"connection",
    b"keep-alive",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
    b"proxy-authorization",
    b"proxy-authenticate",
    b"proxy-connection",
    b"proxy-anything",
]
VIA, ID = (b"via", b"1.1 us"), (b"x-request-id", b"our-id")


def sent(fields: Fields, **changes: Any) -> Fields:
    """Return the fields that the provider gets."""
    prepared: dict[str, Any] = {
        "pass_credential": False,
        "dropped": (),
        "defaults": (),
        "accept_events": True,
    }
    each: dict[str, Any] = {
        "via": b"1.1 us",
        "request_id": b"our-id",
        "streams": False,
        "identity": True,
        "credential": None,
    }
    for name, value in changes.items():
        (prepared if name in prepared else each)[name] = value
    credential = None if each["credential"] is None else each["credential"][0]
    return HeaderRewriter(credential=credential, **prepared).for_provider(
        fields, dict(fields), **each
    )


def crossed(fields: Fields, request_id: bytes) -> Fields:
    """Return the fields that the client gets."""
    return for_client(fields, first_values(fields), request_id)


# --- towards the provider -------------------------------------------------------------------------


def test_other_fields_are_forwarded_in_order() -> None:
    """Unknown fields, repeated ones and those with ``_`` keep their places and values."""
    fields = [
        (b"session_id", b"s"),
        (b"x-b", b"1"),
        (b"user-agent", b"ua \xff"),
        (b"x-b", b"2"),
        (b"cookie", b"a=b"),
        (b"accept", b"*/*"),
        (b"accept-encoding", b"gzip"),
        (b"content-type", b"application/json"),
        (b"content-encoding", b"gzip"),
        (b"anthropic-beta", b""),
    ]

    assert sent(fields) == [*fields, VIA, ID]


@pytest.mark.parametrize(
    "name",
    [
        *HOP_BY_HOP,
        *KEY_FIELDS,
        b"x-llmproxy-key",
        b"x-llmproxy-request-id",
        b"x-llmproxy-anything",
        b"expect",
        b"host",
        b"content-length",
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-anything",
    ],
)
def test_some_fields_of_a_request_are_dropped(name: bytes) -> None:
    """These are hop-by-hop fields, keys, our own fields, and the origin of a request."""
    kept = [(b"x-a", b"1"), (b"x-b", b"2")]
    assert sent([kept[0], (name, b"x"), kept[1]]) == [*kept, VIA, ID]


def test_a_provider_lacks_what_it_does_not_want() -> None:
    """It may still add such a field itself, and then its own value counts."""
    fields = [(b"x-a", b"1"), (b"x-b", b"2"), (b"x-a", b"3")]

    assert sent(fields, dropped=(b"x-a",)) == [(b"x-b", b"2"), VIA, ID]
    added = sent(fields, dropped=(b"x-a",), defaults=((b"x-a", b"ours"),))
    assert added == [(b"x-b", b"2"), VIA, (b"x-a", b"ours"), ID]


def test_fields_that_connection_nominates_are_dropped() -> None:
    """It may nominate in several lines, in any case, with white space."""
    fields = [
        (b"connection", b"X-A, close"),
        (b"x-a", b"1"),
        (b"x-b", b"2"),
        (b"x-c", b"3"),
        (b"connection", b" x-C\t,,"),
        (b"x-a", b"4"),
    ]

    assert nominated(fields) >= {b"x-a", b"close", b"x-c"}
    assert sent(fields) == [(b"x-b", b"2"), VIA, ID]


@pytest.mark.parametrize("name", [b"via", b"host", b"connection", b"x-forwarded-for", b"proxy-a"])
def test_a_field_that_the_proxy_writes_is_its_own(name: bytes) -> None:
    """No configuration may set it, and no client's crosses as it came."""
    assert is_owned(name)
    assert not is_owned(b"x-" + name)


def test_a_nominated_field_of_ours_is_still_added() -> None:
    """A client cannot nominate a field that the proxy adds."""
    fields = [(b"connection", b"via, x-request-id, x-api-key"), (b"x-request-id", b"theirs")]

    assert sent(fields, credential=(b"x-api-key", b"k")) == [VIA, ID, (b"x-api-key", b"k")]


@pytest.mark.parametrize("name", KEY_FIELDS)
def test_the_credential_of_a_client_can_be_forwarded(name: bytes) -> None:
    """With ``pass_credential`` the key fields of SDKs are forwarded, and ours never is."""
    fields = [(name, b"theirs"), (b"x-llmproxy-key", b"ours")]

    assert sent(fields, pass_credential=True) == [(name, b"theirs"), VIA, ID]


@pytest.mark.parametrize("name", [b"authorization", b"x-api-key", b"x-own"])
def test_the_credential_of_the_provider_replaces_the_clients(name: bytes) -> None:
    """A request has one credential, the provider's, in whatever field."""
    fields = [(name, b"theirs"), (b"authorization", b"Bearer theirs")]

    assert sent(fields, credential=(name, b"ours")) == [VIA, ID, (name, b"ours")]


def test_the_id_of_a_client_is_forwarded() -> None:
    """Ours is added only if the client sent none."""
    assert sent([(b"x-request-id", b"theirs")]) == [(b"x-request-id", b"theirs"), VIA]


def test_a_name_that_is_dropped_itself_is_not_disguised() -> None:
    """A provider may lack both spellings of a name; one alone is spelt in no other way."""
    refuse_disguised([b"session_id"], {b"session_id", b"session-id"})
    with pytest.raises(ProxyError):
        refuse_disguised([b"session_id"], {b"session-id"})
    with pytest.raises(ProxyError):
        refuse_disguised([b"x_api_key"], {b"x_api_key"})


def test_via_is_extended() -> None:
    """The hops before us stay in their order, and we are the last."""
    fields = [(b"via", b"1.0 a"), (b"x-a", b"1"), (b"via", b"1.1 b, 1.1 c")]

    assert sent(fields) == [(b"x-a", b"1"), (b"via", b"1.0 a, 1.1 b, 1.1 c, 1.1 us"), ID]


def test_default_fields_of_a_provider_are_added() -> None:
    """A field of the client stays, and is not doubled."""
    defaults = ((b"anthropic-version", b"2023-06-01"), (b"x-b", b"default"))

    assert sent([(b"x-b", b"theirs")], defaults=defaults) == [
        (b"x-b", b"theirs"),
        VIA,
        (b"anthropic-version", b"2023-06-01"),
        ID,
    ]


@pytest.mark.parametrize(
    ("streams", "events", "fields", "added"),
    [
        (True, True, [], [(b"accept", b"text/event-stream")]),
        (True, True, [(b"accept", b"application/json")], []),
        (True, False, [], []),
        (False, True, [], []),
    ],
)
def test_accept_is_added_to_requests_for_a_stream(
    streams: bool, events: bool, fields: Fields, added: Fields
) -> None:
    """It is added if the dialect has SSE and the client sent no ``Accept``."""
    got = sent(fields, streams=streams, accept_events=events, identity=False)

    assert got == [*fields, VIA, *added, ID]


@pytest.mark.parametrize(
    ("streams", "identity", "expected"),
    [
        (True, True, [b"identity"]),
        (True, False, [b"gzip", b"br"]),
        (False, True, [b"gzip", b"br"]),
        (False, False, [b"gzip", b"br"]),
    ],
)
def test_a_stream_is_requested_without_encoding(
    streams: bool, identity: bool, expected: list[bytes]
) -> None:
    """``identity`` replaces the encodings of the client; ``pass`` forwards them."""
    fields = [(b"accept-encoding", b"gzip"), (b"accept", b"x"), (b"accept-encoding", b"br")]
    got = sent(fields, streams=streams, identity=identity)

    assert [value for name, value in got if name == b"accept-encoding"] == expected


def test_accept_encoding_is_not_added() -> None:
    """With ``pass``, a request without the field is forwarded without it."""
    assert sent([], streams=True, identity=False, accept_events=False) == [VIA, ID]


# --- disguises ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        b"x_api_key",
        b"api_key",
        b"x_goog-api_key",
        b"x_llmproxy_key",
        b"x-llmproxy_anything",
        b"x_forwarded_for",
        b"proxy_authorization",
        b"transfer_encoding",
        b"content_length",
        b"keep_alive",
    ],
)
def test_disguised_names_are_refused(name: bytes) -> None:
    """A name that spells a field of ours with ``_`` is a 400 that names it."""
    with pytest.raises(ProxyError) as caught:
        refuse_disguised([b"x", name])

    assert (caught.value.status, caught.value.end) == (400, "rejected")
    assert name.decode() in caught.value.message


@pytest.mark.parametrize("name", [b"session_id", b"_", b"x_custom", b"user_agent", b"x-api-key"])
def test_other_names_are_no_disguise(name: bytes) -> None:
    """Codex sends ``session_id``; names without ``_`` are dropped, and not refused."""
    refuse_disguised([name])


# --- towards the client ---------------------------------------------------------------------------


def test_fields_of_a_response_are_forwarded_in_order() -> None:
    """Limits, ids, cookies, encodings and lengths are the provider's, in order."""
    fields = [
        (b"date", b"today"),
        (b"server", b"cloud"),
        (b"content-type", b"application/json"),
        (b"content-length", b"7"),
        (b"content-encoding", b"gzip"),
        (b"retry-after", b"1"),
        (b"x-ratelimit-remaining-tokens", b"5"),
        (b"request-id", b"req_1"),
        (b"x-request-id", b"req_2"),
        (b"anthropic-ratelimit-x", b"1"),
        (b"openai-version", b"2"),
        (b"set-cookie", b"a=1"),
        (b"set-cookie", b"b=2"),
        (b"cache-control", b"private"),
        (b"x-accel-buffering", b"yes"),
        (b"location", b"/else"),
    ]

    assert crossed(fields, b"our-id") == [*fields, (b"x-llmproxy-request-id", b"our-id")]


@pytest.mark.parametrize(
    "name",
    [
        *HOP_BY_HOP,
        b"alt-svc",
        b"strict-transport-security",
        b"x-llmproxy-error",
        b"x-llmproxy-request-id",
    ],
)
def test_some_fields_of_a_response_are_dropped(name: bytes) -> None:
    """These are hop-by-hop fields, those of the provider's host, and those that are ours."""
    kept = [(b"a", b"1"), (b"b", b"2"), (b"x-llmproxy-request-id", b"i")]
    assert crossed([kept[0], (name, b"x"), kept[1]], b"i") == kept


def test_fields_that_the_connection_of_a_response_nominates_are_dropped() -> None:
    """The provider's ``Connection`` has the same effect."""
    fields = [(b"connection", b"close, X-Hop"), (b"x-hop", b"1"), (b"a", b"1")]

    assert crossed(fields, b"i") == [(b"a", b"1"), (b"x-llmproxy-request-id", b"i")]


@pytest.mark.parametrize(
    "kind",
    [
        b"text/event-stream",
        b"Text/Event-Stream; charset=utf-8",
        b"application/x-ndjson",
        b"application/jsonl",
    ],
)
def test_streams_are_kept_from_buffers(kind: bytes) -> None:
    """Fields against buffering replace those of the provider, and are not doubled."""
    fields = [
        (b"cache-control", b"max-age=1"),
        (b"content-type", kind),
        (b"x-accel-buffering", b"yes"),
        (b"cache-control", b"public"),
    ]

    assert crossed(fields, b"i") == [
        (b"content-type", kind),
        (b"cache-control", b"no-cache, no-transform"),
        (b"x-accel-buffering", b"no"),
        (b"x-llmproxy-request-id", b"i"),
    ]


# --- small things ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "stream", "ndjson"),
    [
        (b"text/event-stream", True, False),
        (b"text/event-stream;x=y", True, False),
        (b"application/x-ndjson", True, True),
        (b"APPLICATION/JSONL ; x", True, True),
        (b"application/json", False, False),
        (b"text/event-streamer", False, False),
        (b"", False, False),
        (None, False, False),
    ],
)
def test_types_of_streams(kind: bytes | None, stream: bool, ndjson: bool) -> None:
    """SSE and NDJSON are streams; parameters and case do not matter."""
    assert (is_stream(kind), is_ndjson(kind)) == (stream, ndjson)


def test_media_types() -> None:
    """The type stands before its parameters, and is in lower case."""
    assert media_type(b" Text/HTML ; charset=x") == b"text/html"
    assert media_type(None) == b""


@pytest.mark.parametrize(
    ("value", "host"),
    [
        (b"Host.Example", "host.example"),
        (b"h:8080", "h"),
        (b"h:", "h"),
        (b"[::1]", "[::1]"),
        (b"[::1]:80", "[::1]"),
        (b"", ""),
        (None, ""),
    ],
)
def test_host_is_a_name_without_port(value: bytes | None, host: str) -> None:
    """It is in lower case; IPv6 addresses keep their brackets."""
    assert host_of(value) == host
