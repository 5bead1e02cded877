"""Who calls, with which key, and that no key of a client's is sent on (design 5 and 8)."""

from __future__ import annotations

import hashlib

import pytest

from tests.support.daemon import provider_table, route_table
from tests.support.live_proxy import STREAM_BODY, LiveProxy, client_config, live_fixture, post
from tests.support.sockets import request

KEY, OTHER, CREDENTIAL = "llmp_team-key", "llmp_other-key", "sk-provider-credential"

DIALECTS = ("openai", "anthropic")
CONFIG = "".join(
    [
        *(provider_table(name, 'credential = "key"', dialect=name) for name in DIALECTS),
        provider_table(
            "custom", 'credential = "key"', 'header = "X-Custom-Auth"', 'format = "Token {};v=1"'
        ),
        provider_table("open"),
        provider_table("passing", "pass_credential = true", dialect="anthropic"),
        provider_table(
            "google",
            *('credential = "key"', "key_query = true", 'headers = { openai-project = "ours" }'),
        ),
        *(route_table(f"/{name}", name) for name in (*DIALECTS, "custom", "open", "passing")),
        route_table("/google", "google"),
    ]
)

FIELDS = {
    "x-llmproxy-key": "{}",
    "Authorization": "Bearer {}",
    "x-api-key": "{}",
    "api-key": "{}",
    "x-goog-api-key": "{}",
}
CLIENTS = client_config("team", KEY) + client_config("other", OTHER)


def show(field: str, key: str = KEY) -> str:
    """Return a header line that shows ``key``."""
    return f"{field}: {FIELDS[field].format(key)}"


SECRETS = {"key": CREDENTIAL}
EXPIRED, AGING = "llmp_expired-key", "llmp_aging-key"
ROTATING = [
    f'{{ hash = "sha256:{hashlib.sha256(key.encode()).hexdigest()}", expires = {at} }}'
    for key, at in ((EXPIRED, "2026-01-01T00:00:00Z"), (AGING, '"2099-01-01T00:00:00Z"'))
]
CLIENTS += f"[clients.rotating]\nkeys = [{', '.join(ROTATING)}]\n"
live = live_fixture(CONFIG + CLIENTS, proxy="", credentials=SECRETS)
open_to_all = live_fixture(CONFIG + CLIENTS, credentials=SECRETS)


@pytest.mark.parametrize("field", FIELDS)
def test_a_key_is_known_in_each_field_and_crosses_in_none(live: LiveProxy, field: str) -> None:
    """The caller is named by it, and the provider gets its own credential instead."""
    received, got = live.ask(request("GET", "/openai/x", show(field), "X-Kept: 1"))
    assert got.status == 200
    names = [name for name, _ in received.fields]
    assert names == [b"host", b"x-kept", b"via", b"x-request-id", b"authorization"]
    assert received.values(b"authorization") == [b"Bearer " + CREDENTIAL.encode()]
    assert KEY.encode() not in b"".join(value for _, value in received.fields)
    assert live.trace(got)["client"] == "team"


def test_all_five_fields_together_are_dropped(live: LiveProxy) -> None:
    """Keys that agree name one client, and none of them is sent on."""
    lines = [show(field) for field in FIELDS]
    received, got = live.ask(request("GET", "/open/x", *lines))
    assert live.trace(got)["client"] == "team"
    assert [name for name, _ in received.fields] == [b"host", b"via", b"x-request-id"]


@pytest.mark.parametrize(
    ("route", "field", "value"),
    [
        ("openai", b"authorization", f"Bearer {CREDENTIAL}"),
        ("anthropic", b"x-api-key", CREDENTIAL),
        ("custom", b"x-custom-auth", f"Token {CREDENTIAL};v=1"),
    ],
)
def test_the_credential_is_in_the_providers_own_field(
    live: LiveProxy, route: str, field: bytes, value: str
) -> None:
    """Header and format follow the dialect, or what the provider sets."""
    received, _ = live.ask(request("GET", f"/{route}/x", show("x-llmproxy-key")))
    assert received.values(field) == [value.encode()]
    keys = {b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key", b"x-custom-auth"}
    assert [name for name, _ in received.fields if name in keys] == [field]


def test_a_client_cannot_put_its_own_beside_the_credential(live: LiveProxy) -> None:
    """The provider's own field is dropped first, by whatever name; disguised, it is refused."""
    known = show("x-llmproxy-key")
    received, _ = live.ask(request("GET", "/custom/x", known, "x-custom-auth: forged"))
    assert received.values(b"x-custom-auth") == [f"Token {CREDENTIAL};v=1".encode()]
    assert live.reject(request("GET", "/custom/x", known, "x_custom_auth: forged")).status == 400


def test_a_provider_without_a_credential_gets_none(live: LiveProxy) -> None:
    """The provider sees no key at all."""
    received, _ = live.ask(request("GET", "/open/x", show("Authorization")))
    assert received.values(b"authorization") == []


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], b"no_key"),
        (["x-api-key: wrong"], b"unknown_key"),
        (["Authorization: Bearer wrong"], b"unknown_key"),
        ([f"Authorization: Basic {KEY}"], b"unknown_key"),
        ([f"Authorization: {KEY}"], b"unknown_key"),
        (["x-api-key:", "Authorization: Bearer"], b"no_key"),
        (["Authorization: Basic"], b"unknown_key"),
        ([show("x-api-key"), show("Authorization", OTHER)], b"keys_disagree"),
        (["x-api-key: wrong", "api-key: wrong"], b"unknown_key"),
        ([show("x-api-key"), show("x-api-key", OTHER)], b"keys_disagree"),
    ],
)
def test_an_unknown_client_is_rejected(live: LiveProxy, lines: list[str], reason: bytes) -> None:
    """401: no key, an unknown one, or two that disagree; no word of the key comes back."""
    got = live.reject(request("GET", "/openai/x", *lines))
    assert got.status == 401
    assert got.values(b"x-llmproxy-error") == [reason]
    assert got.values(b"www-authenticate") == [b"Bearer"]
    assert KEY.encode() not in got.body
    record = live.trace(got)
    assert (record["end_reason"], record["client"]) == ("rejected", None)


def test_a_wrong_key_is_rejected_before_the_body_is_looked_at(live: LiveProxy) -> None:
    """The caller learns nothing about bodies, models or routes behind its path."""
    got = live.reject(post("/openai/x", b"{not json", "x-api-key: wrong"))
    assert got.status == 401


def test_passing_routes_hand_on_the_callers_own_credential(live: LiveProxy) -> None:
    """The four SDK fields cross as they are; x-llmproxy-key says who calls, and stays here."""
    own = [f"{field}: {FIELDS[field].format('own')}" for field in list(FIELDS)[1:]]
    received, got = live.ask(request("GET", "/passing/x", show("x-llmproxy-key"), *own))
    assert live.trace(got)["client"] == "team"
    assert received.values(b"authorization") == [b"Bearer own"]
    for field in (b"x-api-key", b"api-key", b"x-goog-api-key"):
        assert received.values(field) == [b"own"]
    assert received.values(b"x-llmproxy-key") == []


def test_a_passed_credential_does_not_name_the_client(live: LiveProxy) -> None:
    """An SDK's field is the provider's affair there: without x-llmproxy-key it is a 401."""
    got = live.reject(request("GET", "/passing/x", "x-api-key: own"))
    assert got.status == 401
    assert got.json()["type"] == "error"


def test_anonymous_callers_are_served_and_wrong_keys_are_not(open_to_all: LiveProxy) -> None:
    """Showing no key is allowed, showing a wrong one is not."""
    _, got = open_to_all.ask(request("GET", "/openai/x"))
    assert open_to_all.trace(got)["client"] == "anonymous"
    _, got = open_to_all.ask(request("GET", "/openai/x", show("api-key")))
    assert open_to_all.trace(got)["client"] == "team"
    assert open_to_all.reject(request("GET", "/openai/x", "x-api-key: wrong")).status == 401
    received, got = open_to_all.ask(post("/passing/x", STREAM_BODY, "x-api-key: own"))
    assert received.values(b"x-api-key") == [b"own"]
    assert open_to_all.trace(got)["client"] == "anonymous"


def test_a_connection_nominee_cannot_strip_the_credential(live: LiveProxy) -> None:
    """Strip first, inject after: what a client nominates removes nothing that the proxy adds."""
    received, _ = live.ask(
        request(
            "GET",
            "/anthropic/x",
            show("x-llmproxy-key"),
            "Connection: x-api-key, via, x-request-id, host",
        )
    )
    assert received.values(b"x-api-key") == [CREDENTIAL.encode()]
    assert len(received.values(b"via")) == 1
    assert len(received.values(b"host")) == 1
    assert len(received.values(b"x-request-id")) == 1


@pytest.mark.parametrize("line", ["Authorization: Bearer", "x-api-key:", "Authorization:"])
def test_an_empty_field_is_no_key(live: LiveProxy, open_to_all: LiveProxy, line: str) -> None:
    """Editors send it: it hides no good key, and does not make an anonymous caller a wrong one."""
    received, got = live.ask(request("GET", "/openai/x", line, show("x-llmproxy-key")))
    assert live.trace(got)["client"] == "team"
    assert received.values(b"authorization") == [f"Bearer {CREDENTIAL}".encode()]
    assert received.values(b"x-api-key") == []
    _, got = open_to_all.ask(request("GET", "/openai/x", line))
    assert open_to_all.trace(got)["client"] == "anonymous"


@pytest.mark.parametrize(
    "line",
    [
        f"Authorization: {KEY}",
        f"Authorization: Bearer  {KEY}",
        f"x-api-key: Bearer {KEY}",
        f"x-api-key: {KEY}, {KEY}",
        f"Cookie: session={KEY}",
    ],
)
def test_our_key_is_never_sent_on(live: LiveProxy, open_to_all: LiveProxy, line: str) -> None:
    """Whether it is presented or not, in whatever form: the refusal names the header."""
    for proxy, lines in ((live, [show("x-llmproxy-key"), line]), (open_to_all, [line])):
        if proxy is open_to_all and line.startswith("Cookie"):
            continue  # nothing says that this is a key
        got = proxy.reject(request("GET", "/passing/x", *lines))
        assert (got.status, got.error) == (401, "misplaced_key")
        assert line.partition(":")[0].lower() in got.json()["error"]["message"]
        assert KEY.encode() not in got.body


def test_a_key_in_the_query_is_read_where_the_provider_asks_for_it(live: LiveProxy) -> None:
    """It names the caller and is cut; elsewhere it is refused, and the place is named."""
    received, got = live.ask(request("GET", f"/google/v1beta/models?alt=sse&key={KEY}&x=%20"))
    assert received.target == b"/v1beta/models?alt=sse&x=%20"
    record = live.trace(got)
    assert (record["client"], record["path"]) == ("team", "/google/v1beta/models")
    got = live.reject(request("GET", "/google/x?key=wrong"))
    assert (got.status, got.error) == (401, "unknown_key")
    for route in ("openai", "open", "passing"):
        got = live.reject(request("GET", f"/{route}/x?key={KEY}"))
        assert (got.status, got.error) == (401, "misplaced_key")
        assert "the query" in got.json()["error"]["message"]
    assert KEY not in str(live.daemon.traces()) + str(live.daemon.log)


def test_our_credential_acts_for_no_account_of_the_callers(live: LiveProxy) -> None:
    """The operator may choose one; without a credential of ours the caller's own crosses."""
    lines = ["OpenAI-Organization: theirs", "OpenAI-Project: theirs", "True-Client-IP: 10.0.0.1"]
    known = show("x-llmproxy-key")
    received, _ = live.ask(request("GET", "/openai/x", known, *lines))
    assert [name for name, _ in received.fields] == [
        *(b"host", b"via", b"x-request-id", b"authorization"),
    ]
    received, _ = live.ask(request("GET", "/google/x", known, *lines))
    assert received.values(b"openai-project") == [b"ours"]
    received, _ = live.ask(request("GET", "/passing/x", known, *lines))
    assert received.values(b"openai-organization") == [b"theirs"]
    assert received.values(b"true-client-ip") == []
    got = live.reject(request("GET", "/open/x", known, "true_client_ip: 10.0.0.1"))
    assert (got.status, got.error) == (400, "bad_header")


@pytest.mark.parametrize("route", DIALECTS)
def test_a_key_that_has_expired_gets_an_error_that_says_so(live: LiveProxy, route: str) -> None:
    """The error has the shape of the route's dialect; the client's other key is good."""
    got = live.reject(request("GET", f"/{route}/x", show("x-api-key", EXPIRED)))
    assert (got.status, got.error) == (401, "key_expired")
    assert "has expired" in got.json()["error"]["message"]
    assert EXPIRED.encode() not in got.body
    assert live.daemon.wait_log("", error="key_expired")["detail"] == "a key of rotating"
    record = live.trace(got)
    assert (record["client"], record["error"]) == (None, "key_expired")
    _, got = live.ask(request("GET", f"/{route}/x", show("x-api-key", AGING)))
    assert live.trace(got)["client"] == "rotating"


def test_when_the_next_key_expires_is_a_metric(live: LiveProxy) -> None:
    """Only clients whose keys expire have one."""
    name = "llmproxy_client_key_expires_timestamp_seconds"
    found = {key: at for key, at in live.daemon.metrics().items() if key.startswith(name)}
    assert found == {f'{name}{{client="rotating"}}': 4070908800.0}
