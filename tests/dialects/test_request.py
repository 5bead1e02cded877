"""What a request asks for, put together from its type, its body and its path."""

from __future__ import annotations

import pytest

from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.json_spans import BodyError
from llmproxy.dialects.request import is_held, read_request

JSON = b"application/json"
BODY = b'{"model": "m", "stream": true}'
FORM = b"multipart/form-data; boundary=x"
FORM_BODY = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--x--\r\n'


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
    assert facts.wants_stream(Dialect.OPENAI, b"/v1/chat") is True


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
    assert facts.wants_stream(Dialect.OPENAI, b"/v1/chat") is None
    assert facts.wants_stream(Dialect.OLLAMA, b"/api/chat") is None


def test_a_form_names_its_model() -> None:
    """The field ``model`` of a multipart form counts; there is nothing to override."""
    facts = read_request(FORM, FORM_BODY, b"/v1/audio")

    assert (facts.model, facts.json, facts.model_span) == ("whisper", False, None)


@pytest.mark.parametrize(
    ("kind", "body", "path", "models"),
    [
        (JSON, b"{}", b"/deployments/d/chat", ("d",)),
        (None, b"", b"/v1/models/g:generate", ("g",)),
        (JSON, BODY, b"/deployments/d/chat", ("m", "d")),
        (JSON, BODY, b"/deployments/m/chat", ("m",)),
        (FORM, FORM_BODY, b"/deployments/d/audio", ("whisper", "d")),
    ],
)
def test_the_path_names_models_too(
    kind: bytes | None, body: bytes, path: bytes, models: tuple[str, ...]
) -> None:
    """What the body names comes first; what both name counts once."""
    facts = read_request(kind, body, path)

    assert facts.models == models
    assert facts.model == models[0]


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
        (Dialect.RAW, b"/api/chat", b"{}", False),
        (Dialect.RAW, b"/", b'{"stream":true}', True),
    ],
)
def test_what_asks_for_a_stream(dialect: Dialect, path: bytes, body: bytes, streams: bool) -> None:
    """``"stream": true``, and in Ollama's own API also by leaving it out."""
    assert read_request(JSON, body, path).wants_stream(dialect, path) is streams


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (JSON, b"{"),
        (JSON, b'{"model":"a","model":"b"}'),
        (b"text/plain", b' {"model": 5}'),
        (FORM, b"--x"),
        (b"multipart/form-data", FORM_BODY),
    ],
)
def test_a_body_that_is_not_what_it_says_is_refused(kind: bytes, body: bytes) -> None:
    """What two readers could read differently is an error."""
    with pytest.raises(BodyError):
        read_request(kind, body, b"/")


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
