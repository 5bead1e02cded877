"""``[shared]``: where the engine is, and what may stand beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmproxy.config import Secret
from llmproxy.config.engine_url import EngineUrl
from tests.support.configs import accepted, problems_of, vault


@pytest.mark.parametrize(
    ("url", "found", "shown"),
    [
        ("redis://h", EngineUrl(host="h", port=6379), "redis://h:6379/0"),
        ("redis://h:1/2", EngineUrl(host="h", port=1, database=2), "redis://h:1/2"),
        ("rediss://H.example/", EngineUrl(host="h.example", port=6379, tls=True), None),
        ("redis://[::1]:7", EngineUrl(host="::1", port=7), "redis://[::1]:7/0"),
        ("unix:///run/redis/redis.sock", EngineUrl(path="/run/redis/redis.sock"), None),
    ],
)
def test_an_engine_is_named_by_its_url(url: str, found: EngineUrl, shown: str | None) -> None:
    """By TCP, by TLS or by a socket, and is shown as one."""
    shared = accepted({"shared.url": json.dumps(url)}).shared
    assert shared.url == found
    assert str(shared.url) == (shown or str(found))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://h", "expected redis://HOST:PORT/DATABASE"),
        ("redis://", "expected redis://HOST:PORT/DATABASE"),
        ("redis://h:0", "expected a port from 1 to 65535"),
        ("redis://h:70000", "expected a port from 1 to 65535"),
        ("redis://h/x", "expected redis://HOST:PORT/DATABASE"),
        ("redis://a b", "expected a host"),
        ("unix://run/redis", "expected redis://HOST:PORT/DATABASE"),
        ("redis://:p4ss@h", "expected a URL without a user or password: use `user` and"),
    ],
)
def test_a_wrong_url_is_told(url: str, words: str) -> None:
    """A password in it is not shown."""
    problems = problems_of({"shared.url": json.dumps(url)})
    assert any(one.startswith(f"shared.url: {words}") for one in problems)
    assert "p4ss" not in "".join(problems)


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"strict": "true"}, "strict"),
        ({"url": '"redis://h"', "user": '"u"'}, "user"),
        ({"url": '"redis://h"', "prefix": '"a b"'}, "prefix"),
        ({"url": '"redis://h"', "timeout": '"soon"'}, "timeout"),
    ],
)
def test_a_key_without_its_fellow_is_told(keys: dict[str, str], key: str) -> None:
    """As each is for something."""
    (problem,) = problems_of({f"shared.{name}": value for name, value in keys.items()})
    assert problem.startswith(f"shared.{key}: expected ")


def test_an_authority_is_for_tls_alone(tmp_path: Path) -> None:
    """And is a file of certificates."""
    missing = json.dumps(str(tmp_path / "missing"))
    problems = problems_of({"shared.url": '"redis://h"', "shared.ca": missing})
    assert [one.partition(":")[0] for one in problems] == ["shared.ca", "shared.ca"]


def test_the_password_is_in_a_file(tmp_path: Path) -> None:
    """And is never shown."""
    folder = vault(tmp_path)
    (folder / "engine").write_text("p4ss\n")
    config = accepted(
        {
            "credentials.directory": json.dumps(str(folder)),
            "shared.url": '"redis://h"',
            "shared.user": '"u"',
            "shared.credential": '"engine"',
        }
    )
    assert config.shared.credential == Secret("p4ss")
    assert '"credential": true' in json.dumps(config.redacted()["shared"])
    assert "p4ss" not in repr(config)
