"""The configuration: what is accepted, and how each mistake is told.

A file is written here as a flat mapping from a key's path to its TOML value, over the smallest file
that is accepted; so a test names the very path that the problem must name.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.config import (
    Config,
    ConfigError,
    Override,
    Provider,
    Secret,
    Timeouts,
    Trace,
    Url,
    ledger_path,
    load,
    parse,
)
from llmproxy.config.settings import ROOT, SECTIONS
from llmproxy.config.values import duration_or_off, show_duration, show_size, size
from llmproxy.errors import Dialect

KEYS = {"": ROOT.names} | {path: section.names for path, section in SECTIONS.items()}
NOT_BUILT = {"": ROOT.not_built} | {path: one.not_built for path, one in SECTIONS.items()}
DOCS = Path(__file__).parents[1] / "docs"
SECRET = "sk-very-secret-0123456789"
DIGEST = "ab" * 32
KEYS_LINE = f'["sha256:{DIGEST}"]'
BASE = {
    "proxy.anonymous": "true",
    "providers.p.url": '"http://127.0.0.1:1"',
    "providers.p.dialect": '"openai"',
    "routes[0].path": '"/a"',
    "routes[0].providers": '["p"]',
}


def toml(changes: Mapping[str, str | None]) -> str:
    """Return the smallest accepted file with ``changes``; ``None`` leaves a key out."""
    routes: dict[str, list[str]] = {}
    lines: list[str] = []
    for key, value in {**BASE, **changes}.items():
        route = re.fullmatch(r"(routes\[\d\])\.(.*)", key)
        if value is None:
            continue
        if route:
            routes.setdefault(route[1], []).append(f"{route[2]} = {value}")
        else:
            lines.append(f"{key} = {value}")
    if routes:
        tables = ", ".join("{ " + ", ".join(one) + " }" for one in routes.values())
        lines.append(f"routes = [{tables}]")
    return "\n".join(lines)


def accepted(changes: Mapping[str, str | None], **environ: str) -> Config:
    """Return the configuration of an accepted file."""
    return parse(toml(changes), environ=environ)


def refused(changes: Mapping[str, str | None], **environ: str) -> tuple[str, ...]:
    """Return the problems of a refused file."""
    with pytest.raises(ConfigError) as caught:
        parse(toml(changes), environ=environ)
    return caught.value.problems


@pytest.fixture
def vault(tmp_path: Path) -> Path:
    """A directory for credential files that is closed to everybody else, with one in it."""
    directory = tmp_path / "credentials"
    directory.mkdir(mode=0o700)
    (directory / "key").write_text(SECRET + "\n")
    return directory


def with_credential(vault: Path, **changes: str) -> dict[str, str]:
    """Return the changes by which the provider takes its credential from ``vault``."""
    return {
        "credentials.directory": json.dumps(str(vault)),
        "providers.p.credential": '"key"',
        **changes,
    }


# --- what is left out -----------------------------------------------------------------------------


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest file gives every default of the design."""
    monkeypatch.setattr(socket, "gethostname", lambda: "höst one")
    config = accepted({})
    assert config.proxy.listen == ("tcp:8080:interface=127.0.0.1",)
    assert (config.proxy.listen_tls, config.proxy.keypair) == ((), None)
    assert config.proxy.drain_timeout == 300
    assert config.proxy.max_connections == 20000
    assert config.proxy.via == "llmproxy-h-st-one"
    assert config.admin.listen == "tcp:9080:interface=127.0.0.1"
    assert config.admin.metrics_listen is None
    assert (config.trace.jsonl, config.trace.ledger, config.trace.otlp) == (None, None, None)
    assert (config.trace.keep, config.trace.session_header) == (30 * 86400, "x-session-id")
    assert config.clients == {}
    assert config.timeouts == Timeouts(
        connect=10,
        first_byte=600,
        idle=300,
        total=None,
        client_stall=60,
        request_head=10,
        request_body=60,
        client_idle=75,
        pool_idle=60,
    )
    assert msgspec.structs.asdict(config.limits) == {
        "request_head": 32768,
        "request_body": 32 * 1024**2,
        "request_memory": 256 * 1024**2,
        "response_head": 65536,
        "accumulate": 1024**2,
        "event": 1024**2,
        "connections_per_address": 0,
        "drains": 100,
    }


def test_defaults_of_a_route() -> None:
    """A route with a path and a provider takes any host and model and is named by its path."""
    (route,) = accepted({}).routes
    assert (route.name, route.path, route.providers) == ("a", "/a", ("p",))
    assert (route.hosts, route.models, route.strip, route.override) == (None, None, True, {})
    assert (route.timeouts, route.accept_encoding) == ({}, "identity")
    assert route.include_usage == "as-asked"
    assert (route.error_event, route.request_body) == (False, None)
    assert route.capture == "usage"


@pytest.mark.parametrize(
    ("dialect", "header", "format_"),
    [
        ("openai", "authorization", "Bearer {}"),
        ("anthropic", "x-api-key", "{}"),
        ("ollama", "authorization", "Bearer {}"),
        ("raw", "authorization", "Bearer {}"),
    ],
)
def test_header_and_format_follow_the_dialect(dialect: str, header: str, format_: str) -> None:
    """A provider's credential goes where its dialect wants it."""
    provider = accepted({"providers.p.dialect": f'"{dialect}"'}).providers["p"]
    assert (provider.dialect, provider.header, provider.format) == (
        Dialect(dialect),
        header,
        format_,
    )
    assert (provider.pool, provider.ca, provider.headers, provider.timeouts) == (1000, None, (), {})
    assert (provider.credential, provider.pass_credential) == (None, False)


# --- what is accepted -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("250ms", 0.25),
        ("10s", 10),
        ("1.5s", 1.5),
        ("5m", 300),
        ("2h", 7200),
        ("30d", 2592000),
        ("365d", 31536000),
        ("off", None),
    ],
)
def test_durations(written: str, seconds: float | None) -> None:
    """Every unit and a decimal are read as seconds."""
    assert accepted({"timeouts.idle": f'"{written}"'}).timeouts.idle == seconds


@pytest.mark.parametrize("key", KEYS["timeouts"])
def test_every_timeout_can_be_off(key: str) -> None:
    """Each deadline of [timeouts] can be switched off, and is told so."""
    config = accepted({f"timeouts.{key}": '"off"'})
    assert msgspec.structs.asdict(config.timeouts)[key] is None
    assert msgspec.json.decode(msgspec.json.encode(config.redacted()))["timeouts"][key] == "off"


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [("0", 0), ("512B", 512), ("16KiB", 16384), ("32MiB", 33554432), ("1GiB", 1073741824)],
)
def test_sizes(written: str, size_bytes: int) -> None:
    """Every unit is read as bytes, and a route may have a body limit of its own."""
    config = accepted(
        {"limits.request_body": f'"{written}"', "routes[0].request_body": f'"{written}"'}
    )
    assert config.limits.request_body == size_bytes
    assert config.routes[0].request_body == size_bytes


@given(st.integers(1, 365 * 86400 * 1000))
def test_a_shown_duration_is_read_as_itself(milliseconds: int) -> None:
    """What redacted() prints is what the file would say."""
    assert duration_or_off(show_duration(milliseconds / 1000)) == milliseconds / 1000


@given(st.integers(0, 2**39))
def test_a_shown_size_is_read_as_itself(size_bytes: int) -> None:
    """What redacted() prints is what the file would say, for sizes too."""
    assert size(show_size(size_bytes)) == size_bytes


@pytest.mark.parametrize(
    ("written", "url", "netloc"),
    [
        ("https://a.example", ("https", "a.example", 443, ""), "a.example"),
        ("HTTPS://A.Example:443/", ("https", "a.example", 443, ""), "a.example"),
        ("http://a.example:80/v1/", ("http", "a.example", 80, "/v1"), "a.example"),
        ("http://a.example:443/v1", ("http", "a.example", 443, "/v1"), "a.example:443"),
        ("https://[2001:DB8::1]:8443", ("https", "2001:db8::1", 8443, ""), "[2001:db8::1]:8443"),
        ("http://[::1]", ("http", "::1", 80, ""), "[::1]"),
        ("http://127.0.0.1:11434", ("http", "127.0.0.1", 11434, ""), "127.0.0.1:11434"),
        ("https://bücher.example", ("https", "xn--bcher-kva.example", 443, ""), None),
        ("http://ollama_1:1/a@b/%20c", ("http", "ollama_1", 1, "/a@b/%20c"), "ollama_1:1"),
    ],
)
def test_urls(written: str, url: tuple[str, str, int, str], netloc: str | None) -> None:
    """A URL is split once, its host made plain, and the Host field's value follows from it."""
    found = accepted({"providers.p.url": json.dumps(written)}).providers["p"].url
    assert (found.scheme, found.host, found.port, found.path) == url
    assert found.netloc == (netloc or url[1])
    assert accepted({"providers.p.url": json.dumps(str(found))}).providers["p"].url == found


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp:0",
        "tcp:port=8080:interface=0.0.0.0",
        "tcp6:8080",
        "ssl:8443:privateKey=/k.pem",
        "unix:/run/a b.sock:mode=660",
        "systemd:domain=INET:name=proxy",
        "haproxy:tcp:8080",
    ],
)
def test_endpoints(endpoint: str) -> None:
    """The server endpoints of Twisted are taken as they stand."""
    quoted = json.dumps(endpoint)
    config = accepted({"proxy.listen": f"[{quoted}]", "admin.metrics_listen": quoted})
    assert config.proxy.listen == (endpoint,)
    assert config.admin.metrics_listen == endpoint


def test_instance_is_filled_in() -> None:
    """{instance} stands for the daemon's name in every address and in the trace's file."""
    text = toml(
        {
            "proxy.listen": '["unix:/run/p-{instance}.sock", "tcp:808{instance}"]',
            "admin.listen": '"tcp:908{instance}"',
            "admin.metrics_listen": '"unix:/run/m-{instance}"',
            "trace.jsonl": '"/var/{instance}.jsonl"',
            "trace.ledger": '"/var/{instance}.sqlite3"',
        }
    )
    config = parse(text, instance="3", environ={})
    assert config.proxy.listen == ("unix:/run/p-3.sock", "tcp:8083")
    assert (config.admin.listen, config.admin.metrics_listen) == ("tcp:9083", "unix:/run/m-3")
    assert (config.trace.jsonl, config.trace.ledger) == ("/var/3.jsonl", "/var/3.sqlite3")
    assert parse(text, environ={}).trace.jsonl == "/var/0.jsonl"


def test_a_whole_trace() -> None:
    """Everything that [trace] may say arrives in its struct."""
    config = accepted(
        {
            "trace.ledger": '"/var/ledger"',
            "trace.keep": '"36h"',
            "trace.otlp": '"https://otel.example:4318/base/"',
            "trace.session_header": '"X-Conversation"',
        }
    )
    assert config.trace == Trace(
        ledger="/var/ledger",
        keep=36 * 3600,
        otlp=Url(scheme="https", host="otel.example", port=4318, path="/base"),
        session_header="x-conversation",
    )
    kept = accepted({"trace.ledger": '"/var/ledger"', "trace.keep": '"off"'})
    assert kept.trace.keep is None


def test_a_session_is_not_named_by_a_provider_s_key() -> None:
    """The field that carries a credential is not recorded, whatever it is called."""
    (problem,) = refused({"providers.p.header": '"X-Key"', "trace.session_header": '"x-KEY"'})
    assert problem.startswith("trace.session_header: expected a header that carries no key")


def test_the_ledger_s_name_is_read_alone(tmp_path: Path) -> None:
    """Without its instance, and whatever else is wrong with the file."""
    path = tmp_path / "c.toml"
    path.write_text('nothing = 1\n[trace]\nledger = "/var/{instance}"\n')
    assert ledger_path(str(path)) == "/var/{instance}"
    path.write_text("")
    assert ledger_path(str(path)) is None
    for wrong, words in (("ledger = 1", "trace.ledger: expected"), ("[", "expected TOML")):
        path.write_text(f"[trace]\n{wrong}\n")
        with pytest.raises(ConfigError, match=words):
            ledger_path(str(path))


def test_a_whole_provider(vault: Path, tmp_path: Path) -> None:
    """Everything that a provider may say arrives in its struct."""
    ca = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(ca)
    config = accepted(
        with_credential(
            vault,
            **{
                "providers.p.header": '"API-Key"',
                "providers.p.format": '"Key {}!"',
                "providers.p.headers": '{ Anthropic-Version = "2023-06-01", x-a = "b c" }',
                "providers.p.ca": json.dumps(str(ca)),
                "providers.p.pool": "0",
                "providers.p.timeouts": '{ connect = "1s", total = "off", pool_idle = "2s" }',
            },
        )
    )
    assert config.providers["p"] == Provider(
        name="p",
        url=Url(scheme="http", host="127.0.0.1", port=1),
        dialect=Dialect.OPENAI,
        credential=Secret(SECRET),
        header="api-key",
        format="Key {}!",
        headers=(("anthropic-version", "2023-06-01"), ("x-a", "b c")),
        ca=str(ca),
        pool=0,
        timeouts={"connect": 1, "total": None, "pool_idle": 2},
    )


def test_a_whole_route() -> None:
    """Everything that a route may say arrives in its struct."""
    (route,) = accepted(
        {
            "routes[0].name": '"x/y"',
            "routes[0].hosts": '["Inference.Local", "[::1]"]',
            "routes[0].models": '["gpt-*", "-", "*"]',
            "routes[0].strip": "false",
            "routes[0].override": '{ p = { model = "big" } }',
            "routes[0].timeouts": '{ first_byte = "30s", client_stall = "off" }',
            "routes[0].accept_encoding": '"pass"',
            "routes[0].include_usage": '"inject"',
            "routes[0].error_event": "true",
        }
    ).routes
    assert (route.name, route.strip, route.error_event) == ("x/y", False, True)
    assert route.hosts == ("inference.local", "[::1]")
    assert route.models == ("gpt-*", "-", "*")
    assert route.override == {"p": Override(model="big")}
    assert route.timeouts == {"first_byte": 30, "client_stall": None}
    assert (route.accept_encoding, route.include_usage) == ("pass", "inject")


@pytest.mark.parametrize(
    ("path", "name"),
    [("/", "root"), ("/openai", "openai"), ("/openai/v1.1", "openai/v1.1"), ("/-x", None)],
)
def test_the_path_names_the_route(path: str, name: str | None) -> None:
    """A route's name is its path without the first slash, where that makes a name."""
    changes = {"routes[0].path": json.dumps(path)}
    if name is None:
        (problem,) = refused(changes)
        assert problem.startswith("routes[0].name: expected this key")
    else:
        assert accepted(changes).routes[0].name == name


def test_a_client() -> None:
    """A client's keys are digests as bytes; it may use every route and model by default."""
    config = accepted({"proxy.anonymous": None, "clients.team-a.keys": KEYS_LINE})
    client = config.clients["team-a"]
    assert client.keys == (bytes.fromhex(DIGEST),)
    assert (client.name, client.routes, client.models) == ("team-a", ("*",), ("*",))


def test_a_client_of_some_routes() -> None:
    """A client may be held to routes and models by name."""
    changes = {"routes": '["a"]', "models": '["gpt-*"]', "keys": KEYS_LINE}
    config = accepted({f"clients.c.{key}": value for key, value in changes.items()})
    assert (config.clients["c"].routes, config.clients["c"].models) == (("a",), ("gpt-*",))


def test_an_unused_provider_is_fine() -> None:
    """A provider that no route names does not stop a start."""
    changes = {"providers.q.url": '"https://q.example"', "providers.q.dialect": '"raw"'}
    assert set(accepted(changes).providers) == {"p", "q"}


def test_timeouts_for() -> None:
    """A route's own deadline wins over the provider's own, and that over [timeouts]."""
    config = accepted(
        {
            "timeouts.connect": '"1s"',
            "timeouts.idle": '"1s"',
            "timeouts.total": '"1s"',
            "providers.p.timeouts": '{ idle = "2s", total = "2s" }',
            "routes[0].timeouts": '{ total = "off" }',
        }
    )
    found = config.timeouts_for(config.routes[0], config.providers["p"])
    assert found == Timeouts(connect=1, idle=2, total=None)


# --- one mistake, one problem ---------------------------------------------------------------------

WRONG: list[tuple[str, str, str, str]] = [
    # key, what stands there, where the problem is (after the key), what it says
    ("proxy.listen", "[]", "", "an array with at least one item, got an empty one"),
    ("proxy.listen", '"tcp:1"', "", "an array with at least one item, got a string"),
    ("proxy.listen", '["tcp:1", "8080"]', "[1]", 'an endpoint such as "tcp:8080'),
    ("proxy.listen", '[""]', "[0]", "an endpoint"),
    ("proxy.listen", "[8080]", "[0]", "got 8080"),
    ("proxy.listen", '["localhost:8080"]', "[0]", 'got "localhost:8080"'),
    ("proxy.listen", '["tcp:"]', "[0]", "an endpoint"),
    ("proxy.listen", '["tcp:http"]', "[0]", "an endpoint"),
    ("proxy.listen", '["tcp:65536"]', "[0]", "an endpoint"),
    ("proxy.listen", '["haproxy:8080"]', "[0]", "an endpoint"),
    ("proxy.listen", '["unix:/a\\u0000"]', "[0]", "without control characters"),
    ("proxy.listen", '["unix:/{instnace}"]', "[0]", 'no braces but those of "{instance}"'),
    ("proxy.anonymous", '"yes"', "", 'expected true or false, got "yes"'),
    ("proxy.anonymous", "1", "", "expected true or false, got 1"),
    ("proxy.drain_timeout", '"off"', "", "cannot be off"),
    ("proxy.drain_timeout", "10", "", 'write "10s", got 10'),
    ("proxy.max_connections", "0", "", "a whole number from 1 to 10000000, got 0"),
    ("proxy.max_connections", "-1", "", "a whole number from 1"),
    ("proxy.max_connections", "10000001", "", "to 10000000, got 10000001"),
    ("proxy.max_connections", '"20000"', "", "a whole number"),
    ("proxy.max_connections", '"off"', "", "a whole number"),
    ("proxy.max_connections", "true", "", "a whole number"),
    ("proxy.via", '"a b"', "", "a token"),
    ("proxy.via", '""', "", "a token"),
    ("admin.listen", '["tcp:1"]', "", "an endpoint"),
    ("admin.metrics_listen", '"9100"', "", "an endpoint"),
    ("timeouts.idle", "10", "", 'write "10s"'),
    ("timeouts.idle", "1.5", "", 'write "1.5s"'),
    ("timeouts.idle", '"10"', "", 'write "10s"'),
    ("timeouts.idle", "true", "", 'a duration such as "250ms"'),
    ("timeouts.idle", '"10 s"', "", 'or "off", got "10 s"'),
    ("timeouts.idle", '"1w"', "", "a duration"),
    ("timeouts.idle", '"-1s"', "", "a duration"),
    ("timeouts.idle", '"1e3s"', "", "a duration"),
    ("timeouts.idle", '"١s"', "", "a duration"),
    ("timeouts.idle", '"0s"', "", "above zero"),
    ("timeouts.idle", '"366d"', "", 'up to "365d"'),
    ("timeouts.idle", "2020-01-01", "", "got a date or a time"),
    ("limits.request_body", "1024", "", 'write "32KiB"'),
    ("limits.request_body", '"1024"', "", "a size with its unit"),
    ("limits.request_body", '"1MB"', "", 'a size such as "512B"'),
    ("limits.request_body", '"1.5MiB"', "", "a size"),
    ("limits.request_body", '"off"', "", "a size"),
    ("limits.request_head", '"0"', "", "a size above zero"),
    ("limits.response_head", '"0B"', "", "a size above zero"),
    ("limits.connections_per_address", "-1", "", "a whole number from 0 to 10000000, got -1"),
    ("limits.connections_per_address", '"off"', "", "a whole number"),
    ("limits.connections_per_address", '"1KiB"', "", "a whole number"),
    ("trace.jsonl", '"trace.jsonl"', "", "an absolute path"),
    ("trace.jsonl", '"/var/log/"', "", "the absolute path of a file"),
    ("trace.ledger", '"ledger"', "", "an absolute path"),
    ("trace.keep", '"7d"', "", "expected `ledger` beside it"),
    ("trace.otlp", '"127.0.0.1:4318"', "", "an http:// or https:// URL"),
    ("trace.otlp", '"http://key@host"', "", "without a user or password"),
    ("trace.session_header", '"x session"', "", "a header's name"),
    ("trace.session_header", '"Authorization"', "", "a header that carries no key"),
    ("trace.session_header", '"cookie"', "", "a header that carries no key"),
    ("trace.session_header", '"x-llmproxy-key"', "", "a header that neither the proxy"),
    ("credentials.directory", '"credentials"', "", "an absolute path"),
    ("providers.p.url", '"ftp://x"', "", 'expected an http:// or https:// URL, got "ftp://x"'),
    ("providers.p.url", "1", "", "an http:// or https:// URL"),
    ("providers.p.url", '"https://"', "", "an http:// or https:// URL"),
    ("providers.p.url", '"https://:80"', "", "a host's name"),
    ("providers.p.url", '"https://a?k=v"', "", "without a query or fragment"),
    ("providers.p.url", '"https://a#f"', "", "without a query or fragment"),
    ("providers.p.url", '"https://u:p@a"', "", "without a user or password"),
    ("providers.p.url", '"https://a:0"', "", "the port from 1 to 65535"),
    ("providers.p.url", '"https://a:65536"', "", "the port from 1 to 65535"),
    ("providers.p.url", '"https://a:"', "", "HOST or HOST:PORT"),
    ("providers.p.url", '"https://a:1:2"', "", "HOST or HOST:PORT"),
    ("providers.p.url", '"https://::1"', "", "HOST or HOST:PORT"),
    ("providers.p.url", '"https://[::g]"', "", "a host's name"),
    ("providers.p.url", '"https://[fe80::1%eth0]"', "", "a host's name"),
    ("providers.p.url", '"https://127.1"', "", "a host's name"),
    ("providers.p.url", '"https://a..b"', "", "a host's name"),
    ("providers.p.url", '"https://a."', "", "a host's name"),
    ("providers.p.url", '"https://a b"', "", "a host's name"),
    ("providers.p.url", '"https://\\u2603.\\u0000"', "", "a host's name"),
    ("providers.p.url", '"https://a/b c"', "", "visible ASCII"),
    ("providers.p.url", '"https://a/ä"', "", "visible ASCII"),
    ("providers.p.url", '"https://a/%zz"', "", "visible ASCII"),
    ("providers.p.url", '"https://a/b/../c"', "", "segments"),
    ("providers.p.url", '"https://a/%2E/c"', "", "segments"),
    ("providers.p.url", '"https://a//b"', "", "segments"),
    ("providers.p.dialect", '"openia"', "", 'one of "openai", "anthropic", "ollama", "raw"'),
    ("providers.p.dialect", "1", "", "one of"),
    ("providers.p.header", '"Content-Length"', "", "neither the proxy nor HTTP's framing owns"),
    ("providers.p.header", '"Proxy-Authorization"', "", "framing owns"),
    ("providers.p.header", '"x-llmproxy-key"', "", "framing owns"),
    ("providers.p.header", '"Authorization: Bearer"', "", "a token"),
    ("providers.p.format", '"Bearer"', "", 'exactly one "{}"'),
    ("providers.p.format", '"{}{}"', "", 'exactly one "{}"'),
    ("providers.p.format", '"{x}"', "", 'exactly one "{}"'),
    ("providers.p.format", '"Bearer {}\\n"', "", "visible ASCII"),
    ("providers.p.format", '"Bearer {} "', "", "visible ASCII"),
    ("providers.p.format", '"é{}"', "", "visible ASCII"),
    ("providers.p.format", "1", "", "visible ASCII"),
    ("providers.p.headers", '"a: b"', "", "expected a table, got a string"),
    ("providers.p.headers", '{ Host = "a" }', ".Host", "framing owns"),
    ("providers.p.headers", '{ "a b" = "a" }', '."a b"', "a token"),
    ("providers.p.headers", '{ Api-Key = "a" }', ".Api-Key", "use `credential`"),
    ("providers.p.headers", '{ A = "a", a = "a" }', ".a", "each name once"),
    ("providers.p.headers", '{ a = "b\\r\\nc: d" }', ".a", "without control characters"),
    ("providers.p.headers", "{ a = 1 }", ".a", "a string"),
    ("providers.p.pass_credential", "0", "", "true or false"),
    ("providers.p.ca", '"ca.pem"', "", "an absolute path"),
    ("providers.p.ca", '"/no/such.pem"', "", "a PEM file of certificates (No such file"),
    ("providers.p.ca", '"/dev/null"', "", "a PEM file of certificates"),
    ("providers.p.pool", "-1", "", "a whole number from 0 to 1000000, got -1"),
    ("providers.p.pool", "true", "", "a whole number"),
    ("providers.p.pool", "1.0", "", "a whole number"),
    ("providers.p.pool", "0x" + "f" * 5000, "", "got a number"),
    ("providers.p.timeouts", '"1s"', "", "expected a table"),
    ("providers.p.timeouts", "{ idle = 1 }", ".idle", 'write "1s"'),
    ("providers.p.timeouts", '{ client_idle = "1s" }', ".client_idle", "only be set in [timeouts]"),
    ("providers.p.timeouts", '{ request_head = "1s" }', ".request_head", "only be set in"),
    ("routes[0].path", '"a"', "", 'begins with "/"'),
    ("routes[0].path", '""', "", 'begins with "/"'),
    ("routes[0].path", "1", "", 'begins with "/"'),
    ("routes[0].path", '"/a b"', "", "visible ASCII"),
    ("routes[0].path", '"/ä"', "", "visible ASCII"),
    ("routes[0].path", '"/a?b"', "", 'without "?" or "#"'),
    ("routes[0].path", '"/a#b"', "", 'without "?" or "#"'),
    ("routes[0].path", '"/a/"', "", 'without a trailing slash (write "/a"), got "/a/"'),
    ("routes[0].path", '"//"', "", 'write "/"'),
    ("routes[0].path", '"/a//b"', "", "segments"),
    ("routes[0].path", '"/a/./b"', "", "segments"),
    ("routes[0].path", '"/a/.%2e"', "", "segments"),
    ("routes[0].path", '"/-"', "", "the proxy's own pages"),
    ("routes[0].path", '"/-/pace"', "", "the proxy's own pages"),
    ("routes[0].name", '"a b"', "", "a name of up to 64"),
    ("routes[0].name", '"/a"', "", "a name of up to 64"),
    ("routes[0].name", f'"{"a" * 65}"', "", "a name of up to 64"),
    ("routes[0].providers", "[]", "", "at least one item"),
    ("routes[0].providers", '["q"]', "[0]", 'the name of a provider, got "q"'),
    ("routes[0].providers", '["pp"]', "[0]", 'did you mean "p"?'),
    ("routes[0].providers", "[1]", "[0]", "the name of a provider"),
    ("routes[0].providers", '["p", "p"]', "", "more than one candidate is not built yet"),
    ("routes[0].hosts", "[]", "", "at least one item"),
    ("routes[0].hosts", '["a b"]', "[0]", "a host's name"),
    ("routes[0].hosts", '["a:80"]', "[0]", "without a port"),
    ("routes[0].hosts", '["[::1]:80"]', "[0]", "without a port"),
    ("routes[0].hosts", "[1]", "[0]", "a host's name"),
    ("routes[0].models", '"gpt"', "", "an array"),
    ("routes[0].models", '["gpt", ""]', "[1]", 'a pattern such as "gpt-*"'),
    ("routes[0].strip", '"no"', "", "true or false"),
    ("routes[0].override", '{ q = { model = "m" } }', ".q", "one of the route's providers"),
    ("routes[0].override", '{ p = { model = "" } }', ".p.model", "a non-empty string"),
    ("routes[0].override", '{ p = "m" }', ".p", "expected a table, got a string"),
    ("routes[0].override", '"m"', "", "expected a table"),
    ("routes[0].timeouts", '{ pool_idle = "1s" }', ".pool_idle", "only be set in [timeouts]"),
    ("routes[0].timeouts", '{ first_byte = "x" }', ".first_byte", "a duration"),
    ("routes[0].capture", '"text"', "", 'one of "usage", "content", got "text"'),
    ("limits.event", '"0"', "", "above"),
    ("routes[0].accept_encoding", '"gzip"', "", 'one of "identity", "pass", got "gzip"'),
    ("routes[0].include_usage", "true", "", 'one of "as-asked", "inject", got true'),
    ("routes[0].error_event", '"on"', "", "true or false"),
    ("routes[0].request_body", "1", "", "a size with its unit"),
    ("clients.c", f'{{ keys = {KEYS_LINE}, routes = ["b"] }}', ".routes[0]", "the name of a route"),
    ("clients.c", f"{{ keys = {KEYS_LINE}, routes = [] }}", ".routes", "at least one item"),
    ("clients.c", f'{{ keys = {KEYS_LINE}, models = [""] }}', ".models[0]", "a model"),
    ("clients.c", "{ keys = [] }", ".keys", "at least one item"),
    ("clients.c", "{}", ".keys", "is missing; `llmproxy keys new c` makes a key"),
    ("clients.c", '"key"', "", "expected a table, got a string"),
    ("clients.anonymous", f"{{ keys = {KEYS_LINE} }}", "", "another name"),
    ('clients."a b"', f"{{ keys = {KEYS_LINE} }}", "", "a name of up to 64"),
    ("clients.-a", f"{{ keys = {KEYS_LINE} }}", "", "a name of up to 64"),
    ("clients", "1", "", "expected a table, got a number"),
    ("admin", "[]", "", "expected a table, got an array"),
    # unknown keys, with the nearest known one
    ("zzz", "1", "", "unknown key; expected one of proxy, admin, credentials"),
    ("route", "1", "", 'unknown key; did you mean "routes"?'),
    ("proxy.drain-timeout", '"1s"', "", 'unknown key; did you mean "drain_timeout"?'),
    ("providers.p.URL", '"x"', "", 'unknown key; did you mean "url"?'),
    ("providers.p.timeouts", '{ idel = "1s" }', ".idel", 'did you mean "idle"?'),
    ("routes[0].provider", '"p"', "", 'did you mean "providers"?'),
    ("routes[0].override", "{ p = { modle = 1 } }", ".p.modle", 'did you mean "model"?'),
    ("trace.zzz", "1", "", "unknown key; expected one of jsonl, ledger, keep, otlp"),
]


@pytest.mark.parametrize(("key", "value", "below", "words"), WRONG)
def test_one_mistake_is_one_problem(key: str, value: str, below: str, words: str) -> None:
    """A mistake is told once, with its key's path and what is expected."""
    problems = refused({key: value})
    (problem,) = [one for one in problems if not one.startswith("clients: expected at least")]
    assert problem.startswith(f"{key}{below}: ")
    assert words in problem
    assert "\n" not in problem
    assert len(problem) < 300


OWNED = [
    *("connection", "content-length", "expect", "forwarded", "host", "keep-alive", "te", "trailer"),
    *("transfer-encoding", "upgrade", "via", "Proxy-Authorization", "proxy-a", "X-Forwarded-For"),
    *("x-llmproxy-key", "x-llmproxy-a"),
]
CARRY_KEYS = ["Authorization", "x-api-key", "api-key", "X-Goog-Api-Key"]


@pytest.mark.parametrize("name", OWNED)
def test_headers_that_nobody_may_set(name: str) -> None:
    """The fields of the proxy and of the framing are written down here a second time."""
    words = "expected a header that neither the proxy nor HTTP's framing owns"
    changes = {
        "providers.p.header": f'"{name}"',
        "providers.p.headers": f'{{ {name} = "a" }}',
        "trace.session_header": f'"{name}"',
    }
    assert refused(changes) == (
        f'providers.p.header: {words}, got "{name}"',
        f"providers.p.headers.{name}: {words}",
        f'trace.session_header: {words}, got "{name}"',
    )


@pytest.mark.parametrize("name", CARRY_KEYS)
def test_headers_that_carry_a_key(name: str) -> None:
    """They are for a credential, and neither added as they stand nor recorded."""
    assert accepted({"providers.p.header": f'"{name}"'}).providers["p"].header == name.lower()
    changes = {"providers.p.dialect": '"raw"', "providers.p.header": '"x-other"'}
    added, recorded = refused(
        {
            **changes,
            "providers.p.headers": f'{{ {name} = "a" }}',
            "trace.session_header": f'"{name}"',
        }
    )
    assert added.startswith(f"providers.p.headers.{name}: expected no header that carries a key")
    assert recorded.startswith("trace.session_header: expected a header that carries no key")


@pytest.mark.parametrize("name", ["accept", "cookie", "user-agent", "x-session", "openai-beta"])
def test_other_headers_may_be_set(name: str) -> None:
    """Nothing else is taken from an operator."""
    assert accepted({"providers.p.header": f'"{name}"'}).providers["p"].header == name
    added = accepted({"providers.p.headers": f'{{ {name} = "a" }}'}).providers["p"].headers
    assert added == ((name, "a"),)


LATER = [
    (section, key)
    for section, keys in NOT_BUILT.items()
    for key in sorted(keys)
    if section != "routes.override.*"
]


@pytest.mark.parametrize(("section", "key"), [*LATER, ("routes.override.*", "weight")])
def test_what_is_not_built_is_refused(section: str, key: str) -> None:
    """A key of the design that does nothing yet is refused in just these words."""
    places = {
        "": key,
        "routes": f"routes[0].{key}",
        "providers.*": f"providers.p.{key}",
        "clients.*": f"clients.c.{key}",
    }
    place = places.get(section, f"{section}.{key}")
    changes: dict[str, str | None] = {place: "1"}
    if section == "clients.*":
        changes["clients.c.keys"] = KEYS_LINE
    if section == "routes.override.*":
        place = "routes[0].override.p.weight"
        changes = {"routes[0].override": "{ p = { weight = 1 } }"}
    assert refused(changes) == (f"{place}: is not built yet in this version",)


def test_the_keys_that_are_not_built_are_those_of_the_design() -> None:
    """The list of refused keys is written down a second time, so that none is dropped unseen."""
    assert {key for keys in NOT_BUILT.values() for key in keys} == {
        "intercept",
        "tunnel",
        "token",
        "max_streams",
        "balance",
        "retry_on",
        "heartbeat",
        "padding",
        "weight",
        "requests_per_minute",
        "tokens_per_minute",
        "tokens_per_day",
    }


@pytest.mark.parametrize(
    "key", ["providers.p.url", "providers.p.dialect", "routes[0].path", "routes[0].providers"]
)
def test_needed_keys(key: str) -> None:
    """A key without a default must be there."""
    assert refused({key: None}) == (f"{key}: expected this key, but it is missing",)


@pytest.mark.parametrize("name", ["-a", ".a", "a b", "a/b", "a" * 65, "ä", ""])
def test_names_of_providers(name: str) -> None:
    """A provider's name must do as a label."""
    key = f"providers.{json.dumps(name)}"
    problems = refused({f"{key}.url": '"https://a"', f"{key}.dialect": '"raw"'})
    assert len(problems) == 1
    assert problems[0].startswith("providers.")
    assert "a name of up to 64 letters" in problems[0]


# --- what only the whole file can tell ------------------------------------------------------------


def test_nothing_but_anonymous() -> None:
    """A file without providers and routes could serve nothing."""
    with pytest.raises(ConfigError) as caught:
        parse("proxy.anonymous = true", environ={})
    assert [one.split(",")[0] for one in caught.value.problems] == [
        "providers: expected at least one [providers.NAME]",
        "routes: expected at least one [[routes]]",
    ]


@pytest.mark.parametrize("anonymous", ["false", None])
def test_an_open_listener_is_asked_for(anonymous: str | None) -> None:
    """Without clients a start needs the operator's word that everybody may call."""
    (problem,) = refused({"proxy.anonymous": anonymous})
    assert problem.startswith("clients: expected at least one [clients.NAME]")
    assert "proxy.anonymous = true for an open listener without clients" in problem


def test_routes_as_a_table() -> None:
    """Routes that are no array of tables are told how they are written."""
    with pytest.raises(ConfigError, match=r"routes: expected \[\[routes\]\], an array of tables"):
        parse('[routes]\npath = "/"', environ={})


def test_one_path_twice_needs_names() -> None:
    """Of two routes with one path the second is asked for a name of its own."""
    changes = {"routes[1].path": '"/a"', "routes[1].providers": '["p"]'}
    (problem,) = refused(changes)
    assert problem.startswith("routes[1].name: expected a name of its own: set `name`")
    assert 'routes[0] is called "a" already' in problem
    named = accepted({**changes, "routes[1].name": '"b"', "routes[1].models": '["m"]'})
    assert [route.name for route in named.routes] == ["a", "b"]


def test_a_bad_route_does_not_make_a_client_wrong() -> None:
    """Where a route's name cannot be told, what clients say of routes is not judged."""
    problems = refused(
        {"routes[0].path": '"a"', "clients.c": f'{{ keys = {KEYS_LINE}, routes = ["a"] }}'}
    )
    assert [one.split(":")[0] for one in problems] == ["routes[0].path"]


def test_a_bad_provider_does_not_make_a_route_wrong() -> None:
    """A provider with a mistake is still there for the routes that name it."""
    problems = refused({"providers.p.dialect": "1"})
    assert [one.split(":")[0] for one in problems] == ["providers.p.dialect"]


@pytest.mark.parametrize("second", ["a", "b"])
def test_one_key_twice(second: str) -> None:
    """No key stands in two clients, nor twice in one."""
    both = f'["sha256:{DIGEST}", "sha256:{DIGEST}"]'
    changes = {"clients.a.keys": both if second == "a" else KEYS_LINE}
    if second == "b":
        changes["clients.b.keys"] = KEYS_LINE
    (problem,) = refused(changes)
    assert problem.startswith(f"clients.{second}.keys: expected a key of its own")
    assert "clients.a.keys already" in problem
    assert DIGEST not in problem


def test_all_mistakes_at_once() -> None:
    """A file with seven different mistakes reports all seven."""
    text = """
        [proxy]
        lisen = ["tcp:1"]
        drain_timeout = 10
        [limits]
        drains = "5"
        [providers.p]
        url = "ftp://x"
        dialect = "openai"
        [[routes]]
        path = "/a/"
        providers = ["q"]
        [clients.c]
        keys = ["raw"]
    """
    with pytest.raises(ConfigError) as caught:
        parse(text, environ={})
    assert [one.split(":")[0] for one in caught.value.problems] == [
        "proxy.lisen",
        "proxy.drain_timeout",
        "limits.drains",
        "providers.p.url",
        "routes[0].path",
        "routes[0].providers[0]",
        "clients.c.keys[0]",
    ]
    assert str(caught.value) == "\n".join(caught.value.problems)


# --- credentials ----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_one_line_end_is_cut(vault: Path, end: str) -> None:
    """A credential is the file's content without one trailing line end."""
    (vault / "key").write_bytes(b"a b" + end.encode())
    credential = accepted(with_credential(vault)).providers["p"].credential
    assert credential is not None
    assert credential.reveal() == "a b"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not empty"),
        (b"\n", "not empty"),
        (b"\r\n", "not empty"),
        (b"a\n\n", "one line"),
        (b"a\r", "one line"),
        (b" a", "white space"),
        (b"a \n", "white space"),
        (b"a\tb", "visible ASCII"),
        (b"a\0b", "visible ASCII"),
        ("ä".encode(), "visible ASCII"),
        (b"a" * (64 * 1024 + 1), "at most 64KiB"),
    ],
)
def test_content_of_a_credential_file(vault: Path, content: bytes, words: str) -> None:
    """What cannot be a header's value is no credential, and is not shown."""
    (vault / "key").write_bytes(content)
    (problem,) = refused(with_credential(vault))
    assert problem.startswith("providers.p.credential: expected a credential file")
    assert words in problem
    assert "got" not in problem


def test_the_largest_credential(vault: Path) -> None:
    """A credential of 64 KiB with its line end is just small enough."""
    (vault / "key").write_bytes(b"a" * 64 * 1024 + b"\r\n")
    accepted(with_credential(vault))


@pytest.mark.parametrize(
    "name", ['"../key"', '"/key"', '"a/b"', '".."', '"."', '""', '"\\u0000"', "1"]
)
def test_a_credential_is_a_bare_name(vault: Path, name: str) -> None:
    """A credential cannot be fetched from outside its directory."""
    (problem,) = refused(with_credential(vault, **{"providers.p.credential": name}))
    assert problem.startswith("providers.p.credential: expected the bare name of a file")


def test_a_missing_credential_file(vault: Path) -> None:
    """A name without a file is told without the name, which might be the key itself."""
    (problem,) = refused(with_credential(vault, **{"providers.p.credential": f'"{SECRET}"'}))
    assert problem.startswith("providers.p.credential: expected a file that can be read")
    assert "No such file" in problem
    assert SECRET not in problem


def test_a_credential_that_is_no_file(vault: Path) -> None:
    """A directory, or a pipe that would never end, is no credential file."""
    os.mkfifo(vault / "pipe")
    for name in (".hidden", "pipe"):
        (vault / ".hidden").mkdir(exist_ok=True)
        (problem,) = refused(with_credential(vault, **{"providers.p.credential": f'"{name}"'}))
        assert "a regular file" in problem


def test_credentials_from_systemd(vault: Path) -> None:
    """Without the key, credentials are read from $CREDENTIALS_DIRECTORY."""
    changes = {"providers.p.credential": '"key"'}
    found = accepted(changes, CREDENTIALS_DIRECTORY=str(vault)).providers["p"].credential
    assert found == Secret(SECRET)


def test_no_place_for_credentials() -> None:
    """Where nothing says where credentials are, that is said once for all providers."""
    changes = {
        "providers.p.credential": '"key"',
        "providers.q": '{ url = "https://q", dialect = "raw", credential = "key" }',
    }
    (problem,) = refused(changes)
    assert problem.startswith("credentials.directory: expected a directory")
    assert "$CREDENTIALS_DIRECTORY is not set either" in problem


@pytest.mark.parametrize("mode", [0o701, 0o702, 0o704, 0o755])
def test_a_directory_open_to_others(vault: Path, mode: int) -> None:
    """A directory that others may enter, read or change is refused, once."""
    vault.chmod(mode)
    (problem,) = refused(with_credential(vault, **{"providers.p.credential": '"missing"'}))
    assert problem.startswith("credentials.directory: expected a directory closed to others")
    assert str(vault) in problem


def test_a_directory_of_systemd_open_to_others(vault: Path) -> None:
    """$CREDENTIALS_DIRECTORY is held to the same."""
    vault.chmod(0o755)
    (problem,) = refused({"providers.p.credential": '"key"'}, CREDENTIALS_DIRECTORY=str(vault))
    assert problem.startswith("$CREDENTIALS_DIRECTORY: expected a directory closed to others")


def test_an_unused_directory_of_systemd_is_not_looked_at(vault: Path) -> None:
    """Where no provider names a credential, $CREDENTIALS_DIRECTORY may be anything."""
    vault.chmod(0o755)
    accepted({}, CREDENTIALS_DIRECTORY=str(vault))


def test_a_directory_open_to_a_group(vault: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group may enter only if the process is in it, and systemd's directory is its own affair."""
    vault.chmod(0o750)
    group = vault.stat().st_gid
    monkeypatch.setattr(os, "getegid", lambda: group + 1)
    monkeypatch.setattr(os, "getgroups", lambda: [group])
    accepted(with_credential(vault))
    monkeypatch.setattr(os, "getgroups", lambda: [group + 2])
    (problem,) = refused(with_credential(vault))
    assert problem.startswith("credentials.directory: expected a directory closed to a group")
    accepted({"providers.p.credential": '"key"'}, CREDENTIALS_DIRECTORY=str(vault))


@pytest.mark.parametrize(("name", "words"), [("missing", "No such file"), ("file", "a directory")])
def test_a_directory_that_is_none(tmp_path: Path, name: str, words: str) -> None:
    """A directory that is named is looked at although no provider has a credential."""
    (tmp_path / "file").touch()
    (problem,) = refused({"credentials.directory": json.dumps(str(tmp_path / name))})
    assert problem.startswith("credentials.directory: expected a directory")
    assert words in problem


def test_two_credentials(vault: Path) -> None:
    """A provider's own key and the caller's key cannot both be sent."""
    (problem,) = refused(with_credential(vault, **{"providers.p.pass_credential": "true"}))
    assert problem.startswith("providers.p.pass_credential: expected either this or `credential`")
    assert accepted({"providers.p.pass_credential": "true"}).providers["p"].pass_credential


# --- nothing secret is shown ----------------------------------------------------------------------


def test_nothing_secret_is_shown(vault: Path) -> None:
    """No secret and no digest is in repr, in the redacted form or in what msgspec encodes."""
    config = accepted(with_credential(vault, **{"clients.c.keys": KEYS_LINE}))
    digest = bytes.fromhex(DIGEST)
    redacted = config.redacted()
    for shown in (repr(config), str(config), json.dumps(redacted), f"{config.providers['p']}"):
        assert SECRET not in shown
        assert DIGEST not in shown
        assert repr(digest)[2:-1] not in shown
    assert "credential=***" in repr(config)
    assert redacted["clients"] == {"c": {"keys": 1, "routes": ["*"], "models": ["*"]}}
    with pytest.raises(TypeError, match="Secret"):
        msgspec.json.encode(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clients.c.keys", f'["{SECRET}"]'),
        ("clients.c.keys", f'"{SECRET}"'),
        ("clients.c.keys", f'["sha256:{DIGEST}0"]'),
        ("clients.c.keys", f'["sha256:{DIGEST.upper()}"]'),
        ("clients.c.keys", f'["{DIGEST}"]'),
        ("clients.c", f'"{SECRET}"'),
        ("clients.c.key", f'"{SECRET}"'),
        ("providers.p.credential", f'"{SECRET}"'),
        ("providers.p.credential", f'"Bearer/{SECRET}"'),
        ("providers.p.key", f'"{SECRET}"'),
        ("providers.p.url", f'"https://user:{SECRET}@a"'),
        ("providers.p.url", f'"user:{SECRET}@a"'),
        ("providers.p.url", f'"https://a/?key={SECRET}"'),
        ("providers.p.header", f'"Authorization: {SECRET}"'),
        ("providers.p.format", f'"Bearer {SECRET}"'),
        ("providers.p.headers", f'{{ authorization = "Bearer {SECRET}" }}'),
        ("providers.p.headers", f'{{ x-token = "{SECRET}\\n" }}'),
        ("providers.p.headers", f'"x-token: {SECRET}"'),
        ("credentials.key", f'"{SECRET}"'),
    ],
)
def test_a_secret_that_went_astray_is_not_shown(vault: Path, key: str, value: str) -> None:
    """Whoever writes a key where it does not belong finds it in no message."""
    changes: dict[str, str | None] = {"credentials.directory": json.dumps(str(vault)), key: value}
    shown = "\n".join(refused(changes)).lower()
    assert key.split(".", 1)[0] in shown
    assert SECRET not in shown
    assert DIGEST not in shown


def test_a_wrong_key_is_told_how_one_is_made() -> None:
    """An operator who wrote the key itself learns of the command that prints its line."""
    (problem,) = refused({"clients.team-a.keys": '["llmp_x"]'})
    assert problem.startswith('clients.team-a.keys[0]: expected "sha256:" and 64 lower-case')
    assert "`llmproxy keys new team-a`" in problem


def test_redacted(vault: Path) -> None:
    """The redacted form is the effective configuration, as readable as the file."""
    config = accepted(
        with_credential(
            vault,
            **{
                "providers.p.timeouts": '{ idle = "90s" }',
                "providers.p.headers": '{ x-a = "b" }',
                "proxy.via": '"v"',
                "routes[0].override": '{ p = { model = "m" } }',
                "routes[0].request_body": '"1KiB"',
                "routes[0].capture": '"content"',
                "limits.accumulate": '"0"',
                "trace.otlp": '"http://127.0.0.1:4318/"',
            },
        )
    )
    assert json.loads(json.dumps(config.redacted())) == {
        "proxy": {
            "listen": ["tcp:8080:interface=127.0.0.1"],
            "listen_tls": [],
            "reuse_port": False,
            "certificate": False,
            "key": False,
            "anonymous": True,
            "drain_timeout": "5m",
            "max_connections": 20000,
            "tuned_loop": True,
            "via": "v",
        },
        "admin": {"listen": "tcp:9080:interface=127.0.0.1", "metrics_listen": None},
        "timeouts": {
            "connect": "10s",
            "first_byte": "10m",
            "idle": "5m",
            "total": "off",
            "client_stall": "1m",
            "request_head": "10s",
            "request_body": "1m",
            "client_idle": "75s",
            "pool_idle": "1m",
        },
        "limits": {
            "request_head": "32KiB",
            "request_body": "32MiB",
            "request_memory": "256MiB",
            "response_head": "64KiB",
            "accumulate": "0",
            "event": "1MiB",
            "connections_per_address": 0,
            "drains": 100,
        },
        "providers": {
            "p": {
                "url": "http://127.0.0.1:1",
                "dialect": "openai",
                "credential": True,
                "header": "authorization",
                "format": "Bearer {}",
                "pass_credential": False,
                "headers": ["x-a"],
                "ca": None,
                "pool": 1000,
                "timeouts": {"idle": "90s"},
            }
        },
        "routes": [
            {
                "name": "a",
                "path": "/a",
                "providers": ["p"],
                "hosts": None,
                "models": None,
                "strip": True,
                "override": {"p": {"model": "m"}},
                "timeouts": {},
                "accept_encoding": "identity",
                "include_usage": "as-asked",
                "on_disconnect": "cancel",
                "drain_for": "30s",
                "error_event": False,
                "capture": "content",
                "request_body": "1KiB",
            }
        ],
        "clients": {},
        "trace": {
            "jsonl": None,
            "ledger": None,
            "keep": "30d",
            "otlp": "http://127.0.0.1:4318",
            "session_header": "x-session-id",
        },
    }


# --- the file itself ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a = 1\nb =\n", "line 2"),
        (b"[proxy\n", "expected TOML"),
        (b"\xff", "expected UTF-8"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b"a = " + b"9" * 5000, "expected TOML"),
    ],
)
def test_not_toml(tmp_path: Path, content: bytes, words: str) -> None:
    """A file that is not TOML is told with the line, and with the file's own name."""
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(str(path), environ={})
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: ")
    assert words in problem


def test_no_file(tmp_path: Path) -> None:
    """A file that is missing, or that is a directory, is told as such."""
    with pytest.raises(ConfigError, match=r"a\.toml: expected a file to read \(No such file"):
        load(str(tmp_path / "a.toml"), environ={})
    with pytest.raises(ConfigError, match=r"expected a file to read \(Is a directory"):
        load(str(tmp_path), environ={})


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that the process may not read is told as such (root may read all)."""

    def forbidden(*_: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(ConfigError, match=r"expected a file to read \(Permission denied"):
        load(str(tmp_path / "a.toml"), environ={})


@pytest.mark.parametrize("instance", ["", "a/b", "a b", "ä", "a\n", "a" * 65])
def test_instance_names(instance: str) -> None:
    """An instance's name must be fit for addresses and file names."""
    with pytest.raises(ConfigError) as caught:
        parse(toml({}), instance=instance, environ={})
    (problem,) = caught.value.problems
    assert problem.startswith("--instance: expected up to 64 letters, digits and ._-")


# --- the documentation ----------------------------------------------------------------------------


def test_the_sample_is_accepted(vault: Path) -> None:
    """The shipped sample is accepted once its credential files are there, and states defaults."""
    for name in ("openai-key", "anthropic-key"):
        (vault / name).write_text("sk-sample\n")
    text = (DOCS / "llmproxy.toml").read_text()
    there = "/etc/llmproxy/credentials"
    config = parse(text.replace(f'directory = "{there}"', f'directory = "{vault}"'), environ={})
    assert [route.name for route in config.routes] == ["openai", "anthropic"]
    default = accepted({})
    assert config.timeouts == default.timeouts
    assert config.limits == default.limits
    assert config.admin == default.admin
    assert config.proxy == msgspec.structs.replace(default.proxy, anonymous=False)


def test_the_sample_shows_every_key() -> None:
    """Each built key stands in the sample, in force or commented out."""
    text = (DOCS / "llmproxy.toml").read_text()
    missing = {
        key
        for section, keys in KEYS.items()
        if section and not section.endswith(".timeouts")
        for key in keys
        if not re.search(rf"\b{key} = ", text)
    }
    assert missing == set()


def documented() -> dict[str, tuple[str, ...]]:
    """Return the keys that docs/configuration.rst describes, by section."""
    sections: dict[str, tuple[str, ...]] = {}
    section = None
    for line in (DOCS / "configuration.rst").read_text().splitlines():
        heading = re.fullmatch(r"``\[+([^\]]+)\]+``", line)
        if heading:
            section = heading[1].replace("NAME", "*")
            sections[section] = ()
        elif line.startswith("``") and section is not None:
            term = re.sub(r" \(.*\)$", "", line)
            assert re.fullmatch(r"``\w+``(, ``\w+``)*", term), line
            sections[section] += tuple(re.findall(r"``(\w+)``", term))
    return sections


def test_every_key_is_documented() -> None:
    """The reference describes just the keys that the schema knows, and no other."""
    found = documented()
    assert {section: sorted(keys) for section, keys in found.items()} == {
        section: sorted(keys) for section, keys in KEYS.items() if section
    }
    top = {section.split(".")[0] for section in found}
    assert top == set(KEYS[""])


def test_documented_defaults() -> None:
    """The defaults that the reference states for durations and sizes are those in force."""
    redacted = accepted({}).redacted()
    stated = re.findall(
        r"^``(\w+)`` \((?:duration|size).*default ``\"([^\"]+)\"``\)$",
        (DOCS / "configuration.rst").read_text(),
        re.MULTILINE,
    )
    sizes = [key for key in KEYS["limits"] if key not in ("connections_per_address", "drains")]
    assert len(stated) == 1 + len(KEYS["timeouts"]) + len(sizes) + 2
    sections = {"timeouts": stated[1:10], "limits": stated[10:-2], "trace": stated[-1:]}
    (route,) = accepted({}).routes
    assert (stated[-2][0], duration_or_off(stated[-2][1])) == ("drain_for", route.drain_for)
    for section, keys in sections.items():
        shown = redacted[section]
        assert isinstance(shown, dict)
        for key, value in keys:
            read = size if section == "limits" else duration_or_off
            assert read(shown[key]) == read(value), (section, key)


def test_documented_counts() -> None:
    """So are those that it states for how many connections there may be."""
    config = accepted({})
    stated = re.findall(
        r"^``(\w*connections\w*|drains)`` \(whole number.*default ``(\d+)``\)$",
        (DOCS / "configuration.rst").read_text(),
        re.MULTILINE,
    )
    assert {key: int(value) for key, value in stated} == {
        "max_connections": config.proxy.max_connections,
        "connections_per_address": config.limits.connections_per_address,
        "drains": config.limits.drains,
    }
