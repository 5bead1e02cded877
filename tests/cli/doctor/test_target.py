"""What a URL of the command line means, and the request that is sent to it."""

from __future__ import annotations

import json

import pytest

from llmproxy.cli.doctor.target import Target, target
from llmproxy.config.values import Wrong
from llmproxy.dialects.dialect import Dialect

KEY = "sk-" + "x" * 20


def sent(
    asked: Target, *, encoding: str = "gzip", **pace: object
) -> tuple[str, dict[str, str], str]:
    """The request line, the fields, and the body."""
    head, _, body = asked.request(encoding, pace).decode().partition("\r\n\r\n")
    line, *fields = head.split("\r\n")
    pairs = [field.partition(": ") for field in fields]
    return line, {name.lower(): value for name, _, value in pairs}, body


@pytest.mark.parametrize("word", ["https://llm.example.com", "https://llm.example.com/"])
def test_a_url_without_a_path_is_that_of_the_paced_stream(word: str) -> None:
    """Of llmproxy's own; five seconds of it."""
    asked = target(word)
    line, fields, body = sent(asked)
    assert asked.is_paced
    assert str(asked) == "https://llm.example.com/-/pace"
    assert line == "GET /-/pace?n=20&interval_ms=250&bytes=200&format=sse HTTP/1.1"
    assert fields["host"] == "llm.example.com"
    assert fields["accept-encoding"] == "gzip"
    assert "authorization" not in fields
    assert body == ""


def test_what_the_query_says_of_a_paced_stream_counts() -> None:
    """Below a prefix, too; a single check changes what it needs."""
    asked = target("http://127.0.0.1:8080/llm/-/pace?format=ndjson&n=7", key=KEY)
    line, fields, _ = sent(asked, n=9, mark="abc")
    assert line == ("GET /llm/-/pace?n=9&interval_ms=250&bytes=200&format=ndjson&mark=abc HTTP/1.1")
    assert fields["host"] == "127.0.0.1:8080"
    assert fields["authorization"] == f"Bearer {KEY}"


def test_a_question_about_a_stream_asks_for_none() -> None:
    """What stands in the query besides is kept, as a hop may need it."""
    line, _, _ = sent(target("http://a/-/pace?n=7&tenant=x"), ended="abc")
    assert line == "GET /-/pace?tenant=x&ended=abc HTTP/1.1"


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("http://a.example/sse", "GET /sse HTTP/1.1"),
        ("http://a.example/sse/?x=%20&y", "GET /sse/?x=%20&y HTTP/1.1"),
        ("http://a.example/?x=1", "GET /?x=1 HTTP/1.1"),
        ("http://a.example?x=1", "GET /?x=1 HTTP/1.1"),
        ("http://[::1]:9/a", "GET /a HTTP/1.1"),
    ],
)
def test_any_other_url_is_fetched_as_it_stands(word: str, line: str) -> None:
    """Path and query, byte for byte; the report does not show the query."""
    asked = target(word)
    assert sent(asked)[0] == line
    assert not asked.is_paced
    assert "?" not in str(asked)


@pytest.mark.parametrize(
    ("dialect", "base", "path", "key_field"),
    [
        (Dialect.OPENAI, "https://a/openai/v1", "/openai/v1/chat/completions", "authorization"),
        (Dialect.ANTHROPIC, "https://a", "/v1/messages", "x-api-key"),
        (Dialect.OLLAMA, "http://a:11434/", "/api/chat", "authorization"),
        (Dialect.OLLAMA, "http://a:11434/api/chat", "/api/chat", "authorization"),
    ],
)
def test_a_call(dialect: Dialect, base: str, path: str, key_field: str) -> None:
    """To the base URL that an SDK is given, or to the endpoint's own."""
    line, fields, body = sent(target(base, dialect=dialect, model="m-1", key=KEY))
    said = json.loads(body)
    assert line == f"POST {path} HTTP/1.1"
    assert KEY in fields[key_field]
    assert int(fields["content-length"]) == len(body)
    assert (said["model"], said["stream"]) == ("m-1", True)
    assert ("anthropic-version" in fields) is (dialect is Dialect.ANTHROPIC)
    assert ("max_tokens" in said) is (dialect is Dialect.ANTHROPIC)  # which needs it


@pytest.mark.parametrize(
    "word",
    [
        *("a.example", "ftp://a.example", "https://", "https://u:p@a.example/", "http://a/b c"),
        *("http://a/?x y", "http://a/?\n", "http://a/b#c", "http://a:0/", "http://a:99999/"),
    ],
)
def test_what_is_no_url(word: str) -> None:
    """Nothing is sent, so that nothing can be smuggled into a head."""
    with pytest.raises(Wrong):
        target(word)


def test_the_provider_itself_has_no_paced_stream() -> None:
    """Without a path there is nothing to ask it for."""
    with pytest.raises(Wrong):
        target("https://api.example", direct=True)
    assert target("https://api.example/sse", direct=True).direct
    assert target("https://api.example", dialect=Dialect.OLLAMA, model="m", direct=True).direct
