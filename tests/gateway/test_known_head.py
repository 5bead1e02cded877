"""A head that is known: its requests are served as if it were new, and no key is kept with it."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llmproxy.gateway.known_head import KnownHead
from llmproxy.server.connection import Phase
from llmproxy.server.seen_heads import SeenHead
from tests.gateway.played import BODY, JSON, PlayedGateway
from tests.support.sockets import request

OTHER = "sha256:" + hashlib.sha256(b"other").hexdigest()
MORE = f"""
[providers.q]
url = "https://q.example"
dialect = "openai"

[[routes]]
name = "other"
path = "/p"
providers = ["q"]
models = ["other*"]
override.q = {{ model = "theirs" }}

[[routes]]
path = "/page"
providers = ["q"]
allowed_origins = ["https://page.example"]

[[routes]]
path = "/passes"
providers = ["passes"]

[providers.passes]
url = "https://passes.example"
dialect = "openai"
pass_credential = true

[clients.d]
keys = ["{OTHER}"]
models = ["m"]
"""
TIMES = 4
"""How often each request comes: its head is known from the third time on."""


def known(played: PlayedGateway) -> list[SeenHead]:
    """Return the heads that are known."""
    return [one for one in played.site.router.heads._heads.values() if one is not None]


def asked(played: PlayedGateway, *fields: str, target: str, body: bytes) -> Any:
    """Let a request come in and its response go out; return all that was seen of it."""
    before = len(played.upstream.asked)
    played.send(request("POST", target, *fields, body=body))
    played.clock.advance(0)
    said: dict[str, Any] = {}
    if len(played.upstream.asked) > before:
        call = played.asked
        said = {
            name: value for name, value in vars(call).items() if name not in ("response", "began")
        }
        response = played.response(
            200, (b"content-type", b"application/json"), (b"content-length", b"2")
        )
        response.push(b"{}")
        response.end()
        played.clock.advance(0)
    trace = played.sink.traces.pop()
    name = trace.id.encode()
    sent = [one if one[1] != name else (one[0], b"ours") for one in said.pop("fields", [])]
    status, got, answer = played.got()
    wire = {key: value.replace(name, b"ours") for key, value in got.items()}
    record = {**msgspec.structs.asdict(trace), "id": ""}
    return said, sent, status, wire, answer.replace(name, b"ours"), record


OWN = ("X-Llmproxy-Key: key", JSON)
USUAL = ("X-Api-Key: key", JSON)
CALLS = {
    "usual": (USUAL, "/p/v1/chat/completions", BODY),
    "with a session and an id": (
        (*USUAL, "X-Session-Id: s", "X-Request-Id: theirs", "User-Agent: ua"),
        "/p/v1/chat/completions",
        BODY,
    ),
    "behind a hop": ((*USUAL, "Via: 1.1 hop", "Via: 1.0 other"), "/p/v1/chat/completions", BODY),
    "with an option": ((*USUAL, "Connection: keep-alive, x-a", "X-A: 1"), "/p/v1/x", BODY),
    "with an encoding": ((*USUAL, "Accept-Encoding: gzip", "Accept: */*"), "/p/v1/x", BODY),
    "without a model": (USUAL, "/p/v1/chat/completions", b"{}"),
    "another route's model": (USUAL, "/p/v1/chat/completions", b'{"model":"other-1"}'),
    "odd JSON": (USUAL, "/p/v1/chat/completions", b'\n{"\\u006dodel":"m", "a":[1e3]}'),
    "no JSON": (USUAL, "/p/v1/chat/completions", b"{"),
    "a query": (USUAL, "/p/v1/messages?beta=true", BODY),
    "a model in the query": (USUAL, "/p/v1/messages?model=x", BODY),
    "a model in the path": (USUAL, "/p/openai/deployments/d/chat/completions", BODY),
    "a client that may not": (("X-Api-Key: other", JSON), "/p/v1/x", b'{"model":"n"}'),
    "an unknown key": (("X-Api-Key: unknown", JSON), "/p/v1/x", BODY),
    "a misplaced key": ((*USUAL, "X-Note: key"), "/p/v1/x", BODY),
    "another type": (("X-Api-Key: key", "Content-Type: text/plain"), "/p/v1/x", BODY),
    "a coded body": ((*USUAL, "Content-Encoding: x"), "/p/v1/x", BODY),
    "a page's": ((*USUAL, "Origin: https://page.example"), "/page/v1/x", BODY),
    "its own key": (
        ("X-Llmproxy-Key: key", "Authorization: Bearer theirs", JSON),
        "/passes/v1/x",
        BODY,
    ),
    "no route": (USUAL, "/nowhere", BODY),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_request_is_served_as_if_its_head_were_new(name: str) -> None:
    """Provider, client and record see the same each time."""
    fields, target, body = CALLS[name]
    played = PlayedGateway(more=MORE)

    first, *others = [asked(played, *fields, target=target, body=body) for _ in range(TIMES)]

    assert others == [first] * (TIMES - 1)


@pytest.mark.parametrize(
    ("name", "is_known"),
    [
        ("usual", True),
        ("with a session and an id", True),
        ("behind a hop", True),
        ("a query", True),
        ("without a model", True),
        ("a model in the query", False),
        ("a model in the path", False),
        ("a client that may not", False),
        ("an unknown key", False),
        ("another type", False),
        ("a coded body", False),
        ("a page's", False),
    ],
)
def test_usual_heads_are_known_and_others_are_not(name: str, is_known: bool) -> None:
    """What is known is that of a usual call."""
    fields, target, body = CALLS[name]
    played = PlayedGateway(more=MORE)

    for _ in range(TIMES):
        asked(played, *fields, target=target, body=body)

    assert bool(known(played)) is is_known


def test_a_known_head_leads_each_model_to_its_own_route() -> None:
    """The body decides as before: another provider, a refusal, a length that is too much."""
    played = PlayedGateway(more=MORE, route='models = ["m", "n"]')
    target = "/p/v1/chat/completions"
    for _ in range(TIMES):
        asked(played, *USUAL, target=target, body=BODY)
    assert known(played)

    for _ in range(2):
        said, _, status, *_ = asked(played, *USUAL, target=target, body=b'{"model":"other-2"}')
        assert (status, said["provider"], said["body"]) == (200, "q", b'{"model":"theirs"}')
        _, _, status, wire, *_ = asked(played, *USUAL, target=target, body=b'{"model":"z"}')
        assert (status, wire[b"x-llmproxy-error"]) == (404, b"no_route")
        _, _, status, wire, *_ = asked(played, *USUAL, target=target, body=b'{"model":')
        assert (status, wire[b"x-llmproxy-error"]) == (400, b"bad_body")


def test_the_credential_is_that_of_the_moment(tmp_path: Path) -> None:
    """It is no part of what is known."""
    (tmp_path / "k").write_text("old")
    more = f'[credentials]\ndirectory = "{tmp_path}"'
    played = PlayedGateway(provider='credential = "k"', more=more)
    for _ in range(TIMES):
        asked(played, *USUAL, target="/p/v1/x", body=BODY)
    (candidate,) = played.gateway._routes.at(b"/p/v1/x", "h")._found[0].candidates
    assert candidate.credential is not None
    # It is read-only in the protocol: of a command it changes by itself.
    candidate.credential.field = (b"authorization", b"Bearer new")  # type: ignore[misc]  # see above

    _, sent, *_ = asked(played, *USUAL, target="/p/v1/x", body=BODY)

    assert sent[-1] == (b"authorization", b"Bearer new")


@pytest.mark.parametrize("split", [0, 1, 40, 200])
def test_a_body_may_come_later_than_a_known_head(split: int) -> None:
    """The head is known by then; the body is its client's, and is bounded as before."""
    played = PlayedGateway()
    for _ in range(TIMES):
        asked(played, *USUAL, target="/p/v1/x", body=BODY)
    data = request("POST", "/p/v1/x", *USUAL, body=BODY.ljust(240))
    start = data.index(b"\r\n\r\n") + 4

    played.send(data[: start + split])
    channel: Any = played.channel
    assert channel.phase is Phase.BODY
    (held,) = channel.requests
    assert held.seen is known(played)[0]
    assert held.owner == "c"
    played.send(data[start + split :])

    assert played.asked.body == BODY.ljust(240)


def test_a_known_head_may_announce_too_much() -> None:
    """It is refused before a byte of the body is asked for."""
    played = PlayedGateway(route='request_body = "100B"')
    for _ in range(TIMES):
        asked(played, *USUAL, target="/p/v1/x", body=BODY)
    assert known(played)

    _, _, status, wire, *_ = asked(played, *USUAL, target="/p/v1/x", body=BODY.ljust(101))

    assert (status, wire[b"x-llmproxy-error"]) == (413, b"body_too_large")


@pytest.mark.parametrize(
    "fields",
    [
        USUAL,
        ("Authorization: Bearer key", JSON),
        ("X-Llmproxy-Key: key", "Authorization: Bearer sk-theirs", JSON),
        ("X-Llmproxy-Key: key", "Cookie: sk-theirs", JSON),
    ],
)
@pytest.mark.parametrize("target", ["/p/v1/x", "/passes/v1/x"])
def test_no_key_can_be_read_back(fields: tuple[str, ...], target: str, tmp_path: Path) -> None:
    """Neither the client's key, nor one that crosses, nor the provider's is kept with a head."""
    (tmp_path / "k").write_text("sk-ours")
    more = f'{MORE}\n[credentials]\ndirectory = "{tmp_path}"'
    played = PlayedGateway(provider='credential = "k"', more=more)
    for _ in range(TIMES):
        asked(played, *fields, target=target, body=BODY)

    kept = [one.found for one in known(played)]
    secrets = (b"Bearer", b"sk-", b": key", b"key: ")
    texts = [line for one in kept for line, _ in one.crossing.values()]
    records = [msgspec.json.encode(one.trace) for one in kept]

    assert [text for text in texts + records for secret in secrets if secret in text] == []


def test_a_head_whose_keys_expire_is_never_known() -> None:
    """The time is looked at for each request."""
    key = "sha256:" + hashlib.sha256(b"soon").hexdigest()
    client = f'\n[clients.e]\nkeys = [{{ hash = "{key}", expires = 2100-01-01T00:00:00Z }}]'
    played = PlayedGateway(more=client)

    for _ in range(TIMES):
        asked(played, "X-Api-Key: soon", JSON, target="/p/v1/x", body=BODY)

    assert known(played) == []


def test_what_is_known_dies_with_its_router() -> None:
    """A reload brings another router; nothing keeps what the old one has seen."""
    played = PlayedGateway()
    for _ in range(TIMES):
        asked(played, *USUAL, target="/p/v1/x", body=BODY)
    assert known(played)

    played.site.serve(type(played.site.router)(played.gateway))
    played.upstream.asked.clear()
    gc.collect()

    assert [one for one in gc.get_objects() if isinstance(one, KnownHead)] == []
