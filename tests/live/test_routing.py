"""From path, host and model to a provider, and who may go there (design 4)."""

from __future__ import annotations

import pytest

from tests.support.daemon import provider_table, route_table
from tests.support.live_proxy import LiveProxy, Response, client_config, live_fixture, post
from tests.support.sockets import Received, request


def provider(name: str, dialect: str = "openai") -> str:
    """Return a provider that marks its requests with its name."""
    return provider_table(name, f'headers = {{ x-picked = "{name}" }}', dialect=dialect)


def route(path: str, name: str, more: str = "") -> str:
    """Return a route of a name to the provider of that name."""
    return route_table(path, name, f'name = "{name}"', more)


JSON = "Content-Type: application/json"

CONFIG = "".join(
    [
        *map(
            provider, ("short", "long", "host", "model", "both", "gpt", "unnamed", "root", "listed")
        ),
        *map(provider, ("override", "first", "second")),
        provider("local", "ollama"),
        route("/v", "short"),
        route("/v/deep", "long"),
        route("/v", "model", 'models = ["m-*", "exact"]'),
        route("/v", "host", 'hosts = ["inference.local"]'),
        route("/v", "both", 'hosts = ["inference.local"]\nmodels = ["m-*"]'),
        route("/only", "gpt", 'models = ["gpt-*"]'),
        route("/only", "unnamed", 'models = ["-"]'),
        route("/order", "first", 'models = ["a*"]'),
        route("/order", "second", 'models = ["ab*"]'),
        route("/over", "override", '[routes.override]\noverride = { model = "new \\"m\\" ü" }'),
        route("/local", "local"),
        route("/", "root"),
        route("/listed", "listed", 'models = ["gpt-*"]'),
        provider("azure"),
        route("/azure", "azure", '[routes.override]\nazure = { model = "prod" }'),
        client_config(
            "limited", "limited-key", 'routes = ["short", "gpt", "listed"]\nmodels = ["ok-*"]'
        ),
        client_config("nameless", "nameless-key", 'models = ["-"]'),
    ]
)

live = live_fixture(CONFIG)


def picked(asked: tuple[Received, Response]) -> str:
    """Return the provider that was chosen."""
    (name,) = asked[0].values(b"x-picked")
    return name.decode()


def model(name: str) -> bytes:
    """Return a body that names a model."""
    return b'{"model":"%b"}' % name.encode()


@pytest.mark.parametrize(
    ("target", "host", "name", "expected"),
    [
        ("/v/x", "proxy", "other", "short"),
        ("/v/x", "proxy", "m-1", "model"),
        ("/v/x", "proxy", "exact", "model"),
        ("/v/x", "proxy", "exactly", "short"),
        ("/v/deep/x", "proxy", "m-1", "long"),
        ("/v/deeper", "proxy", "other", "short"),
        ("/v/x", "inference.local", "other", "host"),
        ("/v/x", "Inference.LOCAL:8080", "other", "host"),
        ("/v/x", "inference.local", "m-1", "both"),
        ("/v/x", "inference.local.evil", "other", "short"),
        ("/order/x", "proxy", "abc", "first"),
        ("/only/x", "proxy", "gpt-4o", "gpt"),
        ("/elsewhere", "proxy", "m", "root"),
    ],
)
def test_the_longest_path_wins_then_the_route_that_says_more(
    live: LiveProxy, target: str, host: str, name: str, expected: str
) -> None:
    """Among equals the order of the file decides."""
    sent = post(target, model(name)).replace(b"Host: proxy", f"Host: {host}".encode())
    asked = live.ask(sent)
    assert picked(asked) == expected
    record = live.trace(asked[1])
    assert (record["route"], record["provider"], record["model"]) == (expected, expected, name)


def test_a_request_that_names_no_model_needs_a_route_for_that(live: LiveProxy) -> None:
    """`-` takes it if it has no body; a route for some models does not, one for all does."""
    assert picked(live.ask(request("GET", "/only/models/x"))) == "unnamed"
    assert picked(live.ask(request("DELETE", "/only/x"))) == "unnamed"
    assert picked(live.ask(request("GET", "/v/x"))) == "short"
    assert picked(live.ask(post("/v/x", b'{"model":null}'))) == "short"
    for body in (b'{"model":null}', b"{}", b"[]", model("claude")):
        assert picked(live.ask(post("/only/x", body))) == "root"


def test_a_list_of_models_needs_no_model(live: LiveProxy) -> None:
    """Whoever may use the route may read it, also where no route has `-`."""
    for target in ("/listed/v1/models", "/listed/api/tags", "/v/v1/models?limit=5"):
        sent = request("GET", target, "x-llmproxy-key: limited-key")
        expected = "listed" if "listed" in target else "short"
        assert picked(live.ask(sent)) == expected
    got = live.reject(request("GET", "/v/deep/models", "x-llmproxy-key: limited-key"))
    assert got.error == "route_forbidden"
    got = live.reject(request("GET", "/v/v1/models/x", "x-llmproxy-key: limited-key"))
    assert got.error == "model_forbidden"
    sent = request("GET", "/v/v1/models", "x-llmproxy-key: limited-key", JSON, body=b"{}")
    assert live.reject(sent).error == "model_forbidden"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/only/deployments/gpt-4/chat", "gpt"),
        ("/only/openai/deployments/gpt-4/chat/completions", "gpt"),
        ("/only/v1beta/models/gpt-4:generateContent", "gpt"),
        ("/only/v1/models", "unnamed"),
    ],
)
def test_a_path_may_name_the_model(live: LiveProxy, target: str, expected: str) -> None:
    """The paths of Azure and Gemini do."""
    assert picked(live.ask(request("GET", target))) == expected


def test_a_form_may_name_the_model(live: LiveProxy) -> None:
    """An audio upload does; the form crosses untouched."""
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n\0\xff\r\n'
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ngpt-audio\r\n--b--\r\n'
    )
    kind = "Content-Type: multipart/form-data; boundary=b"
    asked = live.ask(request("POST", "/only/x", kind, body=form))
    assert picked(asked) == "gpt"
    assert asked[0].body == form


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"gpt-a","model":"gpt-b"}',
        b'{"stream":true,"model":"gpt-a","stream":false}',
        b'{"model":"gpt-a","mo\\u0064el":"gpt-b"}',
        b'{"model":1}',
        b'{"model":"gpt-a"',
        b"\xef\xbb\xbf{}",
    ],
)
def test_a_body_that_can_be_read_in_two_ways_is_rejected(live: LiveProxy, body: bytes) -> None:
    """400: the next reader must not see another model than the proxy did."""
    got = live.reject(post("/only/x", body))
    assert (got.status, got.error) == (400, "bad_body")


def test_an_override_changes_the_bytes_of_the_model_alone(live: LiveProxy) -> None:
    """Spaces, order, escapes and numbers stay as they were; another member called model, too."""
    before = b'{ "a":1.0e2 ,"x":{"model":"in"},\n"model" : "\\u006fld" , "z":"\\u00fc\xc3\xbc" }\n'
    received, got = live.ask(post("/over/x", before))
    after = before.replace(b'"\\u006fld"', '"new \\"m\\" ü"'.encode())
    assert received.body == after
    assert received.values(b"content-length") == [b"%d" % len(after)]
    assert live.trace(got)["model"] == "old"


def test_an_override_inserts_nothing(live: LiveProxy) -> None:
    """A body without a model is refused: the provider would take a model of its own."""
    got = live.reject(post("/over/x", b'{"input":"x"}'))
    assert (got.status, got.error) == (400, "bad_body")
    assert "model" in got.json()["error"]["message"]


@pytest.mark.parametrize(
    ("key", "target", "body", "status", "reason"),
    [
        ("limited-key", "/v/x", model("ok-1"), 200, []),
        ("limited-key", "/v/x", model("bad"), 403, [b"model_forbidden"]),
        ("limited-key", "/v/x", b"{}", 403, [b"model_forbidden"]),
        ("limited-key", "/v/deep/x", model("ok-1"), 403, [b"route_forbidden"]),
        ("limited-key", "/v/deployments/bad/x", model("ok-1"), 403, [b"model_forbidden"]),
        ("limited-key", "/v/deployments%2Fbad/x", model("ok-1"), 403, [b"model_forbidden"]),
        ("limited-key", "/v/deployments//bad/x", model("ok-1"), 403, [b"model_forbidden"]),
        ("limited-key", "/v/deployments;a=b/bad/x", model("ok-1"), 403, [b"model_forbidden"]),
        ("limited-key", "/v/deployments/ok-2/x", model("ok-1"), 200, []),
        ("limited-key", "/v/x?model=bad", model("ok-1"), 403, [b"model_forbidden"]),
        ("limited-key", "/v/x", b'{"Model":"ok-1"}', 400, [b"bad_body"]),
        ("nameless-key", "/v/x", b"{}", 403, [b"model_forbidden"]),
        ("nameless-key", "/v/x", model("any"), 403, [b"model_forbidden"]),
    ],
)
def test_a_client_may_use_its_routes_and_models_alone(
    live: LiveProxy, key: str, target: str, body: bytes, status: int, reason: list[bytes]
) -> None:
    """403, whichever of body, path and query names the model that is not allowed."""
    sent = post(target, body, f"x-llmproxy-key: {key}")
    got = live.ask(sent)[1] if status == 200 else live.reject(sent)
    assert got.status == status
    assert got.values(b"x-llmproxy-error") == reason


FORM = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--b--\r\n'
FORM_TYPE = "Content-Type: multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("target", "kind", "before", "sent_to", "after"),
    [
        ("/azure/x", JSON, model("big"), "/x", model("prod")),
        (
            "/azure/deployments/big/x?a=1",
            JSON,
            model("big"),
            "/deployments/prod/x?a=1",
            model("prod"),
        ),
        ("/azure/deployments/big/x", JSON, b"{}", "/deployments/prod/x", b"{}"),
        ("/azure/models/big:chat", JSON, model("a"), "/models/prod:chat", model("prod")),
        ("/azure/audio", FORM_TYPE, FORM % b"big", "/audio", FORM % b"prod"),
        ("/azure/x", "Content-Type: text/plain", model("big"), "/x", model("prod")),
        ("/azure/x", "X-No: type", model("big"), "/x", model("prod")),
    ],
)
def test_every_place_of_a_model_is_overridden(
    live: LiveProxy, target: str, kind: str, before: bytes, sent_to: str, after: bytes
) -> None:
    """Body, form and path name the candidate's own model, and nothing else of them changes."""
    received, got = live.ask(request("POST", target, kind, body=before))

    assert (received.target.decode(), received.body) == (sent_to, after)
    assert received.values(b"content-length") == [b"%d" % len(after)]
    assert got.status == 200


@pytest.mark.parametrize(
    ("target", "fields", "body", "status", "reason"),
    [
        ("/azure/x?model=big", [JSON], model("big"), 400, "bad_query"),
        ("/azure/audio", [FORM_TYPE], b"--b--\r\n", 400, "bad_body"),
        ("/azure/deployments%2Fbig/x", [JSON], model("big"), 400, "bad_path"),
        ("/azure/deployments//big/x", [JSON], model("big"), 400, "bad_path"),
        ("/azure/deployments/a/deployments/b", [JSON], model("big"), 400, "bad_path"),
        ("/azure/x", ["Content-Type: application/octet-stream"], model("a"), 415, "unread_body"),
        ("/azure/x", ["Content-Type: audio/wav"], b"RIFF", 415, "unread_body"),
        ("/azure/x", ["Content-Type: application/json, a/b"], model("a"), 415, "unread_body"),
        ("/azure/x", ["Content-Type: application/json\xa0"], model("a"), 415, "unread_body"),
        ("/azure/x", [JSON + "; charset=utf-7"], model("a"), 415, "unread_body"),
        ("/azure/x", ["Content-Type: text/plain"], b"model=a", 415, "unread_body"),
        ("/azure/x", [], "{}".encode("utf-16"), 415, "unread_body"),
        ("/azure/x", [JSON], b'{"Model":"a"}', 400, "bad_body"),
        ("/azure/x", [FORM_TYPE], model("a"), 400, "bad_body"),
        ("/azure/x", [JSON, "Connection: Content-Type"], model("a"), 400, "bad_header"),
        ("/v/x", [JSON, "Connection: x, content-encoding"], model("a"), 400, "bad_header"),
        ("/v/x", [JSON, "Content_Type: text/plain"], model("a"), 400, "bad_header"),
    ],
)
def test_what_a_provider_might_read_otherwise_is_refused(
    live: LiveProxy, target: str, fields: list[str], body: bytes, status: int, reason: str
) -> None:
    """Where the model is overridden, it must be sure which one the provider reads."""
    got = live.reject(request("POST", target, *fields, body=body))

    assert (got.status, got.error) == (status, reason)
    if status == 415:
        assert got.values(b"accept") == [b"application/json, multipart/form-data"]


def test_a_body_that_nobody_reads_is_refused_before_it_comes(live: LiveProxy) -> None:
    """A client that announces it and waits gets the 415 at once, and no other client does."""
    length = "Content-Length: 1000000"
    sent = request("POST", "/azure/x", "Content-Type: audio/wav", length, "Expect: 100-continue")
    assert live.get(sent).error == "unread_body"
    sent = request("POST", "/local/x", "Content-Type: audio/wav", body=b"RIFF")
    assert live.ask(sent)[0].body == b"RIFF"


@pytest.mark.parametrize(
    ("target", "fields", "body", "source"),
    [
        ("/local/x", [JSON], model("m"), "body"),
        ("/local/deployments/m/x", [JSON], model("m"), "body"),
        ("/local/deployments/m/x", [JSON], b"{}", "path"),
        ("/local/x?model=m", [JSON], b"{}", "query"),
        ("/over/audio", [FORM_TYPE], FORM % b"m", "form"),
    ],
)
def test_the_record_says_what_decided_the_model(
    live: LiveProxy, target: str, fields: list[str], body: bytes, source: str
) -> None:
    """Its name, and where it stood."""
    record = live.trace(live.ask(request("POST", target, *fields, body=body))[1])

    assert (record["model"], record["model_from"]) == ("m", source)
    nothing = live.trace(live.ask(request("GET", "/local/x"))[1])
    assert (nothing["model"], nothing["model_from"]) == (None, None)
