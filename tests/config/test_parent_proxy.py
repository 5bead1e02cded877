"""The parent proxy: how its keys are written, and which provider is reached through which."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from llmproxy.config import ParentProxy, Secret, Url
from tests.support.configs import accepted, problems_of, vault

PARENT = {"proxy.parent_proxy": '"http://proxy.corp.example:3128"'}
URL = Url(scheme="http", host="proxy.corp.example", port=3128)


def chosen(url: str, changes: Mapping[str, str] | None = None) -> Url | None:
    """Return the parent of a provider with this URL."""
    config = accepted({"providers.p.url": json.dumps(url), **PARENT, **(changes or {})})
    parent = config.parent_proxy_for(config.providers["p"])
    return None if parent is None else parent.url


def secret(folder: Path, content: bytes, key: str = "proxy.parent_proxy") -> dict[str, str]:
    """Return a file in which a parent has a credential file with this content."""
    directory = vault(folder)
    (directory / "parent").write_bytes(content)
    return {
        "credentials.directory": json.dumps(str(directory)),
        key: PARENT["proxy.parent_proxy"],
        f"{key}_credential": '"parent"',
    }


def test_without_the_key_a_provider_is_reached_directly() -> None:
    """No parent is there by default."""
    config = accepted({"providers.p.url": '"https://api.example"'})
    assert config.parent_proxy_for(config.providers["p"]) is None


# --- past the parent ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "url", "is_direct"),
    [
        ("api.example", "https://api.example", True),
        ("API.example", "https://api.example:8443", True),
        ("api.example", "https://other.example", False),
        ("api.example", "https://api.example.org", False),
        ("*.internal", "http://llm.internal", True),
        ("*.internal", "http://a.llm.internal", True),
        ("*.internal", "http://internal", False),
        ("*.internal", "http://llm-internal", False),
        ("10.0.0.0/8", "http://10.1.2.3:8000", True),
        ("10.0.0.0/8", "http://11.1.2.3:8000", False),
        ("10.0.0.0/8", "http://ten.example", False),
        ("10.1.2.3", "http://10.1.2.3:8000", True),
        ("fd00::/8", "http://[fd12::1]", True),
        ("fd12::1", "http://[fd12:0::1]", True),
        ("[fd12::1]", "http://[fd12::1]", True),
        ("fd00::/8", "http://10.1.2.3", False),
        ("bücher.example", "https://xn--bcher-kva.example", True),
    ],
)
def test_some_hosts_are_reached_past_the_parent(pattern: str, url: str, is_direct: bool) -> None:
    """Names, names below a domain, addresses and networks; a name is no address of a network."""
    found = chosen(url, {"proxy.no_parent_proxy": json.dumps([pattern])})
    assert found == (None if is_direct else URL)


@pytest.mark.parametrize("host", ["localhost", "a.localhost", "127.0.0.1", "127.1.2.3", "[::1]"])
def test_this_machine_is_reached_directly_unless_the_file_says_otherwise(host: str) -> None:
    """The parent would take such a name for its own machine; an array of one's own replaces it."""
    assert chosen(f"http://{host}:11434") is None
    assert chosen(f"http://{host}:11434", {"proxy.no_parent_proxy": "[]"}) == URL


def test_a_provider_may_have_its_own_parent_or_none() -> None:
    """What a provider says of its parent counts, whatever ``[proxy]`` says of the host."""
    none = {"providers.p.parent_proxy": '"none"'}
    other = {"providers.p.parent_proxy": '"http://10.0.0.9:8888"'}
    listed = {"proxy.no_parent_proxy": '["api.example"]'}
    assert chosen("https://api.example", none) is None
    assert chosen("https://api.example", {**other, **listed}) == Url(
        scheme="http", host="10.0.0.9", port=8888
    )


def test_the_credential_goes_to_its_own_parent_alone(tmp_path: Path) -> None:
    """A provider with a parent of its own does not show the other parent's credential there."""
    changes = secret(tmp_path, b"team:pass\n")
    config = accepted({**changes, "providers.p.url": '"https://api.example"'})
    assert config.parent_proxy_for(config.providers["p"]) == ParentProxy(URL, Secret("team:pass"))
    config = accepted({**changes, "providers.p.parent_proxy": PARENT["proxy.parent_proxy"]})
    assert config.parent_proxy_for(config.providers["p"]) == ParentProxy(URL, None)


def test_a_providers_parent_has_a_credential_of_its_own(tmp_path: Path) -> None:
    """It is named beside the provider's ``parent_proxy``."""
    config = accepted(secret(tmp_path, b"team:pass\n", "providers.p.parent_proxy"))
    assert config.parent_proxy_for(config.providers["p"]) == ParentProxy(URL, Secret("team:pass"))


# --- the credential file --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "read"),
    [
        (b"team:pass\n", "team:pass"),
        (b"team:pass\r\n", "team:pass"),
        (b"team:a:b c ", "team:a:b c "),
        (b"team:\n", "team:"),
        ("jürgen:pässword€\n".encode(), "jürgen:pässword€"),
    ],
)
def test_a_credential_file_holds_a_name_and_a_password(
    tmp_path: Path, content: bytes, read: str
) -> None:
    """In UTF-8, up to the first colon the name; one line end is cut (RFC 7617, section 2)."""
    assert accepted(secret(tmp_path, content)).proxy.parent_proxy_credential == Secret(read)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "a credential file that is not empty"),
        (b"s3cret-pass\n", "a credential file with NAME:PASSWORD"),
        (b"team:s3cret\npass\n", "a credential file of one line, without control characters"),
        (b"team:s3cret\x00\n", "a credential file of one line, without control characters"),
        ("team:s3cret\u0085".encode(), "a credential file of one line, without control characters"),
        (b"team:s3cret\xfc\n", "a credential file in UTF-8"),
    ],
)
def test_another_content_is_refused_and_not_shown(
    tmp_path: Path, content: bytes, words: str
) -> None:
    """The problem says what is expected, and quotes nothing of the file."""
    problems = problems_of(secret(tmp_path, content))
    assert problems == (f"proxy.parent_proxy_credential: expected {words}",)


# --- mistakes -------------------------------------------------------------------------------------

_URL_WORDS = 'the URL of a proxy, such as "http://proxy.corp.example:3128"'
_HOST_WORDS = (
    'a host\'s name or address, "*.DOMAIN" or a network such as "10.0.0.0/8", without a port'
)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("proxy.parent_proxy", '"proxy.corp.example:3128"', f"{_URL_WORDS}, got "),
        ("proxy.parent_proxy", "3128", f"{_URL_WORDS}, got 3128"),
        ("proxy.parent_proxy", '"none"', f"{_URL_WORDS}, got "),
        ("proxy.parent_proxy", '"http://p:3128/x"', f"{_URL_WORDS}, without a path, got "),
        (
            "proxy.parent_proxy",
            '"https://p:3128"',
            f"{_URL_WORDS}: the way to the proxy itself cannot be TLS, got ",
        ),
        (
            "proxy.parent_proxy",
            '"http://team:s3cret@p:3128"',
            f"{_URL_WORDS}, without a user or password: use `parent_proxy_credential`",
        ),
        ("providers.p.parent_proxy", '"off"', f'{_URL_WORDS}, or "none", got "off"'),
        ("providers.p.parent_proxy", '"https://p:1"', f"{_URL_WORDS}: the way to the proxy"),
        ("proxy.no_parent_proxy[0]", '["internal:443"]', f'{_HOST_WORDS}, got "internal:443"'),
        ("proxy.no_parent_proxy[0]", '[".internal"]', f'{_HOST_WORDS}, got ".internal"'),
        ("proxy.no_parent_proxy[0]", '["*"]', f'{_HOST_WORDS}, got "*"'),
        ("proxy.no_parent_proxy[0]", '["*.10.0.0.1"]', f"{_HOST_WORDS}, got "),
        ("proxy.no_parent_proxy[0]", '["10.0.0.1/8"]', f"{_HOST_WORDS}, got "),
        ("proxy.no_parent_proxy[0]", "[8]", f"{_HOST_WORDS}, got 8"),
    ],
)
def test_a_mistake_is_told(key: str, value: str, words: str) -> None:
    """The problem names the key and what it takes; a user in a URL is not shown."""
    name = key.removesuffix("[0]")
    (problem,) = problems_of({**PARENT, name: value})
    assert problem.startswith(f"{key}: expected {words}")
    assert "s3cret" not in problem


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"proxy.no_parent_proxy": '["a"]'}, "proxy.no_parent_proxy"),
        ({"proxy.parent_proxy_credential": '"key"'}, "proxy.parent_proxy_credential"),
        ({"providers.p.parent_proxy_credential": '"key"'}, "providers.p.parent_proxy_credential"),
        (
            {
                "providers.p.parent_proxy": '"none"',
                "providers.p.parent_proxy_credential": '"key"',
            },
            "providers.p.parent_proxy_credential",
        ),
    ],
)
def test_what_is_for_a_parent_needs_one(tmp_path: Path, changes: dict[str, str], key: str) -> None:
    """Without the URL of a parent in the same section these keys would do nothing."""
    directory = vault(tmp_path)
    (directory / "key").write_text("team:pass\n")
    changes["credentials.directory"] = json.dumps(str(directory))
    expected = f"{key}: expected `parent_proxy` with a URL beside it, which it is for"
    assert problems_of(changes) == (expected,)


def test_the_effective_configuration_shows_no_credential(tmp_path: Path) -> None:
    """URLs are shown as they are, and of a credential that there is one."""
    shown = accepted(secret(tmp_path, b"team:s3cret\n")).redacted()
    proxy, providers = shown["proxy"], shown["providers"]
    assert isinstance(proxy, dict)
    assert isinstance(providers, dict)
    assert proxy["parent_proxy"] == "http://proxy.corp.example:3128"
    assert proxy["parent_proxy_credential"] is True
    assert proxy["no_parent_proxy"] == ["localhost", "*.localhost", "127.0.0.0/8", "::1"]
    assert providers["p"]["parent_proxy"] is None
    assert providers["p"]["parent_proxy_credential"] is False
    assert "s3cret" not in json.dumps(shown)
