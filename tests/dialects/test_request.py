"""What a request asks for, put together from its type, its body and its path."""

from __future__ import annotations

import pytest

from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoints import endpoint
from llmproxy.dialects.json_spans import BodyError, finish
from llmproxy.dialects.request import (
    RequestFacts,
    UnknownBody,
    is_held,
    is_readable,
    reads_list,
    usual_request,
)
from llmproxy.dialects.request import read_request as read_in_steps

JSON = b"application/json"
BODY = b'{"model": "m", "stream": true}'
FORM = b"multipart/form-data; boundary=x"
FORM_BODY = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--x--\r\n'


def read_request(
    kind: bytes | None,
    body: bytes,
    target: bytes,
    method: bytes = b"POST",
    *,
    strict: bool = False,
) -> RequestFacts:
    """Return what a request asks for; a usual one is read alike in both ways."""
    facts = finish(read_in_steps(kind, body, target, method, strict=strict))
    usual = usual_request(kind, body, target, method)
    assert usual is None or usual == facts
    return facts


@pytest.mark.parametrize(
    "kind",
    [
        JSON,
        b"Application/JSON; charset=utf-8",
        b"application/vnd.x+json",
        None,
        b"",
        b"text/plain",
        b"application/x-www-form-urlencoded",
    ],
)
def test_what_a_provider_may_read_as_json_is_read(kind: bytes | None) -> None:
    """JSON, and types that curl and old SDKs put on it, name a model and a stream."""
    facts = read_request(kind, BODY, b"/v1/chat")

    assert (facts.model, facts.models, facts.json) == ("m", ("m",), True)
    assert facts.model_span is not None
    assert BODY[slice(*facts.model_span)] == b'"m"'
    assert facts.wants_stream(endpoint(Dialect.OPENAI, b"/v1/chat")) is True


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"application/octet-stream", BODY),
        (b"audio/wav", BODY),
        (b"text/html", BODY),
        (b"text/plain", b"model=m"),
        (b"text/plain", b"[1]"),
        (b"application/x-www-form-urlencoded", b"model=m&stream=true"),
        (None, b"hello {"),
        (JSON, b""),
        (FORM, b""),
    ],
)
def test_other_bodies_are_opaque(kind: bytes | None, body: bytes) -> None:
    """Such a body names nothing, and whether it asks for a stream is not known."""
    facts = read_request(kind, body, b"/v1/chat")

    assert (facts.model, facts.models, facts.json, facts.model_span) == (None, (), False, None)
    assert facts.wants_stream(endpoint(Dialect.OPENAI, b"/v1/chat")) is None
    assert facts.wants_stream(endpoint(Dialect.OLLAMA, b"/api/chat")) is None


def test_a_form_names_its_model() -> None:
    """The field ``model`` of a multipart form counts, and can be overridden."""
    facts = read_request(FORM, FORM_BODY, b"/v1/audio")

    assert (facts.model, facts.source, facts.json) == ("whisper", "form", False)
    assert facts.model_span is not None
    assert FORM_BODY[slice(*facts.model_span)] == b"whisper"


@pytest.mark.parametrize(
    ("kind", "body", "target", "models", "source"),
    [
        (JSON, b"{}", b"/deployments/d/chat", ("d",), "path"),
        (None, b"", b"/v1/models/g:generate", ("g",), "path"),
        (JSON, BODY, b"/deployments/d/chat", ("m", "d"), "body"),
        (JSON, BODY, b"/deployments/m/chat", ("m",), "body"),
        (FORM, FORM_BODY, b"/deployments/d/audio", ("whisper", "d"), "form"),
        (JSON, BODY, b"/deployments/d%2Fe/chat?model=q", ("m", "d/e", "d", "q"), "body"),
        (None, b"", b"/v1/realtime?model=q", ("q",), "query"),
        (JSON, b"{}", b"/v1/models", (), None),
        (None, b"", b"/v1/models", (), None),
    ],
)
def test_the_target_names_models_too(
    kind: bytes | None, body: bytes, target: bytes, models: tuple[str, ...], source: str | None
) -> None:
    """What the body names comes first; what both name counts once."""
    facts = read_request(kind, body, target)

    assert (facts.models, facts.source) == (models, source)
    assert facts.model == (models[0] if models else None)
    assert facts.in_query is (b"?" in target)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"application/octet-stream", BODY),
        (b"application/json\xa0", BODY),
        (b"application/json, a/b", BODY),
        (b"a/b, application/json", BODY),
        (b"application/a/b+json", BODY),
        (b"application/json; charset=utf-7", BODY),
        (b"application/json; charset=utf-8; charset=utf-16", BODY),
        (b"application/json; charset*=utf-7''", BODY),
        (FORM + b"; charset=utf-7", FORM_BODY),
        (b"multipart/mixed; boundary=x", FORM_BODY),
        (b"audio/wav", b"RIFF"),
        (b"text/plain", b"model=m"),
        (b"application/x-www-form-urlencoded", b"model=m&stream=true"),
        (None, b"hello {"),
        (None, '{"model":"m"}'.encode("utf-16")),
    ],
)
def test_where_the_model_matters_nothing_is_left_unread(kind: bytes | None, body: bytes) -> None:
    """A body of which it is not sure how a provider reads it is refused; elsewhere it crosses."""
    with pytest.raises(UnknownBody):
        read_request(kind, body, b"/", strict=True)
    if kind != FORM + b"; charset=utf-7":
        read_request(kind, body, b"/")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (JSON, BODY),
        (b'application/json; charset="UTF-8"', BODY),
        (b"application/json;charset=utf8;x=y", BODY),
        (None, BODY),
        (b"text/plain", BODY),
        (b"text/plain", b" " * 100 + BODY),
        (FORM, FORM_BODY.replace(b"whisper", b"m")),
    ],
)
def test_where_the_model_matters_what_is_understood_is_read(
    kind: bytes | None, body: bytes
) -> None:
    """JSON and forms in UTF-8 are, under the types that curl and old SDKs give to JSON, too."""
    assert read_request(kind, body, b"/", strict=True).model == "m"


def test_where_the_model_matters_its_name_has_one_spelling() -> None:
    """Go's reader takes ``Model`` for it, others do not."""
    with pytest.raises(BodyError, match="lower case"):
        read_request(JSON, b'{"Model":"m"}', b"/", strict=True)
    assert read_request(JSON, b'{"Model":"m"}', b"/").models == ()


@pytest.mark.parametrize(
    ("method", "path", "reads"),
    [
        (b"GET", b"/v1/models", True),
        (b"HEAD", b"/openai/models/", True),
        (b"GET", b"/api/tags", True),
        (b"GET", b"/v1/models/m", False),
        (b"GET", b"/tags", False),
        (b"GET", b"/v1/mymodels", False),
        (b"POST", b"/v1/models", False),
        (b"DELETE", b"/v1/models", False),
    ],
)
def test_what_reads_a_list_of_models(method: bytes, path: bytes, reads: bool) -> None:
    """Of OpenAI, Anthropic and Gemini, and of Ollama."""
    assert reads_list(method, path) is reads


@pytest.mark.parametrize(
    ("kind", "readable"),
    [(JSON, True), (None, True), (FORM, True), (b"audio/wav", False), (b"multipart/mixed", False)],
)
def test_which_types_are_read(kind: bytes | None, readable: bool) -> None:
    """JSON, what is perhaps JSON, and forms."""
    assert is_readable(kind) is readable


@pytest.mark.parametrize(
    ("dialect", "path", "body", "streams"),
    [
        (Dialect.OPENAI, b"/v1/chat/completions", b'{"stream":true}', True),
        (Dialect.OPENAI, b"/v1/chat/completions", b'{"stream":false}', False),
        (Dialect.OPENAI, b"/v1/chat/completions", b"{}", False),
        (Dialect.OPENAI, b"/v1/chat", b"{}", False),
        (Dialect.OPENAI, b"/api/chat", b"{}", True),
        (Dialect.ANTHROPIC, b"/v1/messages", b'{"stream":false}', False),
        (Dialect.OLLAMA, b"/api/chat", b"{}", True),
        (Dialect.OLLAMA, b"/api/chat/", b"{}", True),
        (Dialect.OLLAMA, b"/x/api/generate", b"{}", True),
        (Dialect.OLLAMA, b"/api/chat", b'{"stream":false}', False),
        (Dialect.OLLAMA, b"/api/chat", b'{"stream":null}', True),
        (Dialect.OLLAMA, b"/api/embed", b"{}", False),
        (Dialect.OLLAMA, b"/api/tags", b"{}", False),
        (Dialect.OLLAMA, b"/v1/chat/completions", b"{}", False),
        (Dialect.GEMINI, b"/v1beta/models/m:streamGenerateContent", b"{}", True),
        (Dialect.GEMINI, b"/v1beta/models/m:streamGenerateContent", b'{"stream":false}', True),
        (Dialect.GEMINI, b"/v1beta/models/m:streamGenerateContent", b"", True),
        (Dialect.GEMINI, b"/v1beta/models/m:generateContent", b'{"stream":true}', False),
        (Dialect.GEMINI, b"/v1beta/models/m:embedContent", b"{}", False),
        (Dialect.GEMINI, b"/v1beta/models/m:countTokens", b"{}", False),
        (Dialect.RAW, b"/api/chat", b"{}", False),
        (Dialect.RAW, b"/", b'{"stream":true}', True),
    ],
)
def test_what_asks_for_a_stream(dialect: Dialect, path: bytes, body: bytes, streams: bool) -> None:
    """``"stream": true``, in Ollama's own API also by leaving it out, and Gemini's path."""
    assert read_request(JSON, body, path).wants_stream(endpoint(dialect, path)) is streams


BROKEN = [
    (JSON, b"{"),
    (JSON, b'{"model":"a","model":"b"}'),
    (b"text/plain", b' {"model": 5}'),
    (None, b'{"model":"a","model":"b"}'),
    (FORM, b"--x"),
    (b"multipart/form-data", FORM_BODY),
]


@pytest.mark.parametrize(("kind", "body"), BROKEN)
def test_a_body_that_is_not_what_it_says_is_refused(kind: bytes | None, body: bytes) -> None:
    """What two readers could read differently is an error, and not one of its type."""
    with pytest.raises(BodyError) as caught:
        read_request(kind, body, b"/", strict=True)
    assert not isinstance(caught.value, UnknownBody)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        *BROKEN[2:],
        (b"text/plain", b"{name}, hello"),
        (None, b"{{template}}"),
        (b"application/x-www-form-urlencoded", b'{"a":1'),
        (None, b"{" * 1000),
    ],
)
def test_where_the_model_decides_nothing_a_body_need_not_be_json(
    kind: bytes | None, body: bytes
) -> None:
    """Only what says that it is JSON must be; another body crosses, and says nothing."""
    facts = read_request(kind, body, b"/")
    assert (
        facts.models,
        facts.json,
        facts.wants_stream(endpoint(Dialect.OLLAMA, b"/api/chat")),
    ) == (
        (),
        False,
        None,
    )
    for broken in BROKEN[:2]:
        with pytest.raises(BodyError):
            read_request(*broken, b"/")


@pytest.mark.parametrize(
    "target",
    [b"/deployments/%ff/x", b"/models/" + b"m" * 2000, b"/?model=" + b"m" * 2000, b"/models" * 20],
)
def test_where_the_model_decides_nothing_a_target_need_not_be_clear(target: bytes) -> None:
    """What is wrong with a name in it is an error only where it matters."""
    for kind, body, models in ((None, b"", ()), (JSON, BODY, ("m",))):
        assert finish(read_in_steps(kind, body, target, strict=False)).models == models
        with pytest.raises(BodyError):
            finish(read_in_steps(kind, body, target, strict=True))
        with pytest.raises(BodyError):
            usual_request(kind, body, target)


@pytest.mark.parametrize(
    "member",
    [
        b'"models":["big"]',
        b'"Models":["big"]',
        rb'"model\u0073":["big"]',
        b'"fallbacks":["big"]',
        b'"FALLBACKS":[{"x":["big"]}]',
        b'"context_window_fallbacks":[{"m":["big"]}]',
        b'"content_policy_fallbacks":[{"m":["big"]}]',
    ],
)
def test_where_the_model_matters_no_other_member_chooses_one(member: bytes) -> None:
    """Gateways behind us take further models from these; elsewhere they cross."""
    for body in (b'{"model":"m",%b}' % member, b'{%b,"model":"m","x":1}' % member):
        assert usual_request(JSON, body, b"/") is None
        with pytest.raises(BodyError, match="further models"):
            read_request(JSON, body, b"/", strict=True)
        assert read_request(JSON, body + b" ", b"/").models == ("m",)


@pytest.mark.parametrize(
    "text",
    [
        b'"models":null,"fallbacks":[]',
        b'"x":{"models":["big"],"fallbacks":["big"]}',
        b'"x":"fallbacks","y":"models","model_x":1',
        b'"my_fallbacks":1,"modelss":1',
    ],
)
def test_members_that_choose_nothing_are_taken(text: bytes) -> None:
    """What is empty, stands further inside, or is called otherwise."""
    body = b'{"model":"m",%b}' % text
    assert read_request(JSON, body, b"/", strict=True).models == ("m",)


def test_a_form_names_no_further_models() -> None:
    """Some gateways read the fields of a form as they read JSON."""
    body = FORM_BODY.replace(b'"model"', b'"fallbacks"')
    with pytest.raises(BodyError, match="further models"):
        read_request(FORM, body, b"/", strict=True)


def test_a_path_names_a_model_for_a_call() -> None:
    """A resource that is read needs none."""
    path = b"/v1/models/org/m"
    for method, models in ((b"POST", ("org", "org/m")), (b"GET", ()), (b"HEAD", ())):
        assert read_request(None, b"", path, method).models == models


@pytest.mark.parametrize(
    ("kind", "plain", "model_matters"),
    [
        (JSON, True, True),
        (b"application/x+json; x=y", True, True),
        (None, True, True),
        (b"text/plain", True, True),
        (b"application/x-www-form-urlencoded", True, True),
        (FORM, False, True),
        (b"application/octet-stream", False, False),
        (b"audio/wav", False, False),
    ],
)
def test_what_is_held(kind: bytes | None, plain: bool, model_matters: bool) -> None:
    """JSON is held, a form where its model decides something, and everything else streams."""
    assert is_held(kind, model_matters=lambda: False) is plain
    assert is_held(kind, model_matters=lambda: True) is model_matters
