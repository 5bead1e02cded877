"""The configuration: what is accepted, and what becomes of it."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.config import (
    ClientKey,
    ConfigError,
    Override,
    Provider,
    Secret,
    Timeouts,
    Trace,
    Url,
    ledger_path,
    ledger_server,
    load,
    parse,
)
from llmproxy.config.readers import web_origin
from llmproxy.config.settings import SECTIONS
from llmproxy.config.values import duration_or_off, show_duration, show_size, size
from llmproxy.dialects.dialect import Dialect
from llmproxy.http1.headers import ROUTING_FIELDS
from tests.support.configs import (
    DIGEST,
    KEYS_LINE,
    SECRET,
    accepted,
    problems_of,
    toml,
    with_credential,
)

# --- what is left out -----------------------------------------------------------------------------


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest file gives every default of the design, shown as a file would say it."""
    monkeypatch.setattr(socket, "gethostname", lambda: "höst one")
    expected = {
        "proxy": {
            "listen": ["tcp:8080:interface=127.0.0.1"],
            "listen_tls": [],
            "reuse_port": False,
            "certificate": False,
            "key": False,
            "anonymous": True,
            "drain_timeout": "5m",
            "max_connections": 20000,
            "tell_provider": True,
            "tuned_loop": True,
            "watch_turns": False,
            "parent_proxy": None,
            "parent_proxy_credential": False,
            "no_parent_proxy": ["localhost", "*.localhost", "127.0.0.0/8", "::1"],
            "via": "llmproxy-h-st-one",
        },
        "admin": {
            "listen": "tcp:9080:interface=127.0.0.1",
            "hosts": [],
            "token": False,
            "metrics_listen": None,
        },
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
            "accumulate": "1MiB",
            "event": "1MiB",
            "connections_per_address": 0,
            "drains": 100,
        },
        "providers": {
            "p": {
                "url": "http://127.0.0.1:1",
                "dialect": "openai",
                "credential": False,
                "header": "authorization",
                "format": "Bearer {}",
                "pass_credential": False,
                "key_query": False,
                "headers": [],
                "drop_headers": list(ROUTING_FIELDS),
                "query": [],
                "drop_query": [],
                "ca": None,
                "parent_proxy": None,
                "parent_proxy_credential": False,
                "pool": 1000,
                "max_streams": None,
                "queue": None,
                "health": {"failures": 5, "window": "30s", "open_for": "15s"},
                "timeouts": {},
            }
        },
        "routes": [
            {
                "name": "a",
                "path": "/a",
                "providers": ["p"],
                "balance": "ordered",
                "retry_on": ["connect", 429, 500, 502, 503, 529],
                "sticky": "off",
                "sticky_for": "1h",
                "hosts": None,
                "models": None,
                "models_list": "upstream",
                "allowed_origins": [],
                "websocket": False,
                "strip": True,
                "override": {},
                "timeouts": {},
                "headers": [],
                "drop_headers": [],
                "query": [],
                "drop_query": [],
                "accept_encoding": "identity",
                "include_usage": "as-asked",
                "on_disconnect": "cancel",
                "drain_for": "30s",
                "error_event": False,
                "heartbeat": "off",
                "heartbeat_bytes": "0",
                "padding": "0",
                "capture": "usage",
                "request_body": None,
            }
        ],
        "clients": {},
        "intercept": None,
        "tunnel": {
            "allow": [],
            "allow_private": False,
            "observe": False,
            "idle": "10m",
            "total": "off",
            "max_per_client": 100,
        },
        "trace": {
            "jsonl": None,
            "ledger": None,
            "postgres": None,
            "postgres_credential": False,
            "keep": "30d",
            "otlp": None,
            "session_header": [
                *("x-session-id", "x-claude-code-session-id", "session_id", "session-id"),
            ],
        },
        "shared": {
            "url": None,
            "user": None,
            "credential": False,
            "ca": None,
            "prefix": "llmproxy:",
            "timeout": "50ms",
            "strict": False,
        },
        "log": {"access": True},
    }
    config = accepted({})
    assert json.dumps(config.redacted()) == json.dumps(expected)
    assert config.proxy.keypair is None


@pytest.mark.parametrize(
    ("dialect", "header", "format_"),
    [
        ("openai", "authorization", "Bearer {}"),
        ("anthropic", "x-api-key", "{}"),
        ("gemini", "x-goog-api-key", "{}"),
        ("ollama", "authorization", "Bearer {}"),
        ("raw", "authorization", "Bearer {}"),
    ],
)
def test_header_and_format_follow_the_dialect(dialect: str, header: str, format_: str) -> None:
    """A provider's credential goes where its dialect wants it."""
    provider = accepted({"providers.p.dialect": f'"{dialect}"'}).providers["p"]
    assert provider.dialect is Dialect(dialect)
    assert (provider.header, provider.format) == (header, format_)


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


@pytest.mark.parametrize("key", SECTIONS["timeouts"].names)
def test_every_timeout_can_be_off(key: str) -> None:
    """Each deadline of [timeouts] can be switched off, and is shown so."""
    config = accepted({f"timeouts.{key}": '"off"'})
    assert getattr(config.timeouts, key) is None
    assert msgspec.to_builtins(config.redacted())["timeouts"][key] == "off"


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
        session_header=("x-conversation",),
    )
    kept = accepted({"trace.ledger": '"/var/ledger"', "trace.keep": '"off"'})
    assert kept.trace.keep is None


def test_a_session_is_not_named_by_the_key_of_a_provider() -> None:
    """The field that carries a credential is not recorded, whatever it is called."""
    (problem,) = problems_of({"providers.p.header": '"X-Key"', "trace.session_header": '"x-KEY"'})
    assert problem.startswith("trace.session_header: expected a header that carries no key")


def test_sessions_may_be_named_in_several_fields() -> None:
    """Their order is kept; no field names no session."""
    for written, read in (('["X-B", "x-a"]', ("x-b", "x-a")), ("[]", ())):
        assert accepted({"trace.session_header": written}).trace.session_header == read
    carrier = {"providers.p.header": '"x-key"', "trace.session_header": '["x-a", "X-Key"]'}
    (problem,) = problems_of(carrier)
    assert problem.startswith("trace.session_header: expected a header that carries no key")


def test_the_name_of_the_ledger_is_read_alone(tmp_path: Path) -> None:
    """The instance is not filled in, and other mistakes of the file do not matter."""
    path = tmp_path / "c.toml"
    path.write_text('nothing = 1\n[trace]\nledger = "/var/{instance}"\n')
    assert ledger_path(str(path)) == "/var/{instance}"
    path.write_text("")
    assert ledger_path(str(path)) is None
    for wrong, words in (("ledger = 1", "trace.ledger: expected"), ("[", "expected TOML")):
        path.write_text(f"[trace]\n{wrong}\n")
        with pytest.raises(ConfigError, match=words):
            ledger_path(str(path))


def test_the_server_of_the_ledger_is_read_alone(directory: Path, tmp_path: Path) -> None:
    """A password that cannot be read is none, and the reason is there."""
    path = tmp_path / "c.toml"
    where = f'[credentials]\ndirectory = "{directory}"\n'
    server = f'nothing = 1\n{where}[trace]\npostgres = "postgresql://u@h/d"\n'
    path.write_text(server)
    assert ledger_server(str(path), {}) == ("postgresql://u@h/d", None, [])
    (directory / "db").write_text("needle\n")
    path.write_text(f'{server}postgres_credential = "db"\n')
    assert ledger_server(str(path), {}) == ("postgresql://u@h/d", Secret("needle"), [])
    path.write_text(f'{server}postgres_credential = "gone"\n')
    found = ledger_server(str(path), {})
    assert found is not None
    assert found[:2] == ("postgresql://u@h/d", None)
    assert "trace.postgres_credential: expected a file" in found[2][0]
    path.write_text(where)
    assert ledger_server(str(path), {}) is None
    path.write_text('[trace]\npostgres = "postgresql://u:needle@h/d"\n')
    with pytest.raises(ConfigError, match=r"trace\.postgres: .*without a password") as caught:
        ledger_server(str(path), {})
    assert "needle" not in str(caught.value)


@pytest.mark.parametrize(
    "written",
    [
        "postgresql://u@h/d",
        "postgresql://h1:5432,[::1]:5433/d?sslmode=verify-full&sslrootcert=/etc/ssl/ca.pem",
        "postgres://",
        "postgresql://u@[::1]:5432/d",
        "postgresql:///d?host=/run/postgresql&passfile=/etc/llmproxy/pgpass",
        "host=/run/postgresql dbname = d",
        r"user='o\'neil' dbname=d\ b ",
        "service=ledger",
    ],
)
def test_a_server_without_a_password_is_as_libpq_has_it(written: str) -> None:
    """A URL or a connection string is kept and shown as it is written."""
    config = accepted({"trace.postgres": json.dumps(written), "trace.keep": '"1d"'})
    assert config.trace.postgres == written
    shown: Any = config.redacted()
    assert shown["trace"]["postgres"] == written


@pytest.mark.parametrize(
    "written",
    [
        "postgresql://u:needle@h/d",
        "postgres://:needle@h",
        "postgresql://u:nee/dle@h/d",
        "postgresql://u:nee?dle@h/d",
        "postgresql://u@h/d?password=needle",
        "postgresql://u@h/d?sslmode=prefer&%70assword=needle",
        "postgresql://u@h/d?sslpassword=needle",
        "host=h password=needle",
        "host=h password = 'nee dle'",
    ],
)
def test_a_password_does_not_stand_with_the_server(written: str) -> None:
    """Wherever libpq or a slip of the pen has it, it is refused and not shown."""
    (problem,) = problems_of({"trace.postgres": json.dumps(written)})
    assert problem.startswith("trace.postgres: expected a URL without a password")
    assert "`postgres_credential`" in problem
    assert "nee" not in problem


def test_a_password_without_a_server_is_for_nothing(directory: Path) -> None:
    """``postgres_credential`` says which key it is for."""
    (directory / "key").write_text("needle\n")
    problems = problems_of(with_credential(directory, **{"trace.postgres_credential": '"key"'}))
    assert problems == (
        "trace.postgres_credential: expected `postgres` beside it, which it is for",
    )


def test_a_whole_provider(directory: Path, tmp_path: Path) -> None:
    """Everything that a provider may say arrives in its struct."""
    ca = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(ca)
    config = accepted(
        with_credential(
            directory,
            **{
                "providers.p.header": '"API-Key"',
                "providers.p.format": '"Key {}!"',
                "providers.p.headers": '{ Anthropic-Version = "2023-06-01", x-a = "b c" }',
                "providers.p.key_query": '"k"',
                "providers.p.drop_headers": '["X-B", "x-real-ip"]',
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
        key_query="k",
        headers=(("anthropic-version", "2023-06-01"), ("x-a", "b c")),
        drop_headers=("x-b", "x-real-ip"),
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
        (problem,) = problems_of(changes)
        assert problem.startswith("routes[0].name: expected this key")
    else:
        assert accepted(changes).routes[0].name == name


@pytest.mark.parametrize(
    ("named", "routes", "models"),
    [({}, ("*",), ("*",)), ({"routes": '["a"]', "models": '["gpt-*"]'}, ("a",), ("gpt-*",))],
    ids=["any", "some"],
)
def test_a_client(named: dict[str, str], routes: tuple[str], models: tuple[str]) -> None:
    """Keys are digests as bytes; a client may use every route and model, unless some are named."""
    changes = {f"clients.c.{key}": value for key, value in {"keys": KEYS_LINE, **named}.items()}
    client = accepted({"proxy.anonymous": None, **changes}).clients["c"]
    assert (client.name, client.keys) == ("c", (ClientKey(hash=bytes.fromhex(DIGEST)),))
    assert (client.routes, client.models) == (routes, models)


def test_limits_of_a_client() -> None:
    """Each is a whole number, and none is there without its key."""
    names = ("max_streams", "requests_per_minute", "tokens_per_minute", "tokens_per_day")
    keys = {"clients.c.keys": KEYS_LINE}
    free = accepted(keys).clients["c"]
    assert [getattr(free, name) for name in names] == [None] * 4
    changes = {f"clients.c.{name}": str(at) for at, name in enumerate(names, 1)}
    config = accepted({**keys, **changes})
    assert [getattr(config.clients["c"], name) for name in names] == [1, 2, 3, 4]
    shown: Any = config.redacted()["clients"]
    assert [shown["c"][name] for name in names] == [1, 2, 3, 4]


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


# --- how it is shown ------------------------------------------------------------------------------


def test_what_a_file_sets_is_shown(directory: Path) -> None:
    """The redacted form has each value as the file says it; of a header it has the name only."""
    changes = {
        "providers.p.timeouts": '{ idle = "90s" }',
        "providers.p.headers": '{ x-a = "b" }',
        "routes[0].override": '{ p = { model = "m" } }',
        "routes[0].request_body": '"1KiB"',
        "limits.accumulate": '"0"',
        "trace.otlp": '"http://127.0.0.1:4318/"',
    }
    shown = json.loads(json.dumps(accepted(with_credential(directory, **changes)).redacted()))
    provider, (route,) = shown["providers"]["p"], shown["routes"]
    assert (provider["credential"], provider["headers"]) == (True, ["x-a"])
    assert provider["timeouts"] == {"idle": "90s"}
    assert (route["override"], route["request_body"]) == (
        {"p": {"model": "m", "weight": 1}},
        "1KiB",
    )
    assert (shown["limits"]["accumulate"], shown["trace"]["otlp"]) == ("0", "http://127.0.0.1:4318")


# --- the file itself ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a = 1\nb =\n", "line 2"),
        (b"[proxy\n", "expected TOML"),
        (b"\xff", "expected UTF-8"),
        (b"\xef\xbb\xbf[proxy]\n", "expected TOML without the byte order mark"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b"a = " + b"9" * 5000, "expected TOML"),
    ],
)
def test_not_toml(tmp_path: Path, content: bytes, words: str) -> None:
    """The problem of a file that is not TOML has the line, and the file's own name."""
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(str(path), environ={})
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: ")
    assert words in problem


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The problem says why: no file, a directory, or no permission (root may read all)."""

    def forbidden(*_: object) -> object:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(ConfigError, match=r"a\.toml: expected a file to read \(No such file"):
        load(str(tmp_path / "a.toml"), environ={})
    with pytest.raises(ConfigError, match=r"expected a file to read \(Is a directory"):
        load(str(tmp_path), environ={})
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


@pytest.mark.parametrize(
    ("value", "name"),
    [("true", "key"), ("false", None), ('"key"', "key"), ('"api.key"', "api.key")],
)
def test_the_parameter_of_a_query_that_holds_a_key(value: str, name: str | None) -> None:
    """``true`` is the name that Google's clients use."""
    assert accepted({"providers.p.key_query": value}).providers["p"].key_query == name


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("*", "*"),
        ("HTTPS://App.Example", "https://app.example"),
        ("https://app.example:443", "https://app.example"),
        ("http://app.example:80", "http://app.example"),
        ("http://[::1]:5173", "http://[::1]:5173"),
        ("tauri://localhost", "tauri://localhost"),
    ],
)
def test_origins_are_as_browsers_write_them(written: str, read: str) -> None:
    """In lower case, and without the port that the scheme has anyway."""
    assert web_origin(written) == read


@pytest.mark.parametrize(
    "at",
    [
        "2027-01-31T00:00:00Z",
        '"2027-01-31T00:00:00Z"',
        "2027-01-31 01:00:00+01:00",
        '"2027-01-30T19:00:00-05:00"',
    ],
)
def test_a_key_may_expire(at: str) -> None:
    """Beside it stands one that does not; the time is TOML's own, or a string."""
    hash_of = f'hash = "sha256:{DIGEST}"'
    keys = (
        f'["sha256:{"1" * 64}", {{ {hash_of}, expires = {at} }}, {{ hash = "sha256:{"2" * 64}" }}]'
    )
    config = accepted({"clients.c.keys": keys})
    assert config.clients["c"].keys == (
        ClientKey(hash=b"\x11" * 32),
        ClientKey(hash=bytes.fromhex(DIGEST), expires=1801353600.0),
        ClientKey(hash=b"\x22" * 32),
    )
    shown = config.redacted()["clients"]
    assert isinstance(shown, dict)
    assert shown["c"]["keys"] == 3


# --- tunnels --------------------------------------------------------------------------------------


def test_where_tunnels_may_lead_is_read_and_shown() -> None:
    """One spelling of each; what is shown can be written into a file again."""
    allow = ["A.Example:443", "*.b.example:*", "[2606:4700:0::1]:443", "1.1.1.1:853"]
    config = accepted({"tunnel.allow": json.dumps(allow), "tunnel.total": '"1h"'})
    shown = ["a.example:443", "*.b.example:*", "[2606:4700::1]:443", "1.1.1.1:853"]
    tunnel = config.redacted()["tunnel"]
    assert isinstance(tunnel, dict)
    assert (tunnel["allow"], tunnel["total"]) == (shown, "1h")
    assert accepted({"tunnel.allow": json.dumps(shown)}).tunnel.allow == config.tunnel.allow
    assert config.tunnel.allow[1].port is None


@pytest.mark.parametrize("host", ["10.0.0.1:443", "[fd12::1]:443", "localhost:11434"])
def test_private_hosts_may_be_listed_where_private_addresses_are_allowed(host: str) -> None:
    """Without that, the list could not mean what it says."""
    changes = {"tunnel.allow": json.dumps([host]), "tunnel.allow_private": "true"}
    assert str(accepted(changes).tunnel.allow[0]) == host
