"""How each mistake of a configuration is reported, and that all are reported at once."""

from __future__ import annotations

import json
import re

import pytest

from llmproxy.config import ConfigError, parse
from llmproxy.config.schema import Section
from llmproxy.config.settings import ROOT, SECTIONS
from tests.support.configs import DIGEST, KEYS_LINE, accepted, problems_of

HASH = f'hash = "sha256:{DIGEST}"'


def ends(at: str) -> str:
    """Return a client's table with one key that expires then."""
    return f"{{ keys = [{{ {HASH}, expires = {at} }}] }}"


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
    ("proxy.listen", '["tcp:port=65536"]', "[0]", "a port from 0 to 65535"),
    ("proxy.listen", '["haproxy:8080"]', "[0]", "an endpoint"),
    ("proxy.listen", '["unix:/a\\u0000"]', "[0]", "without control characters"),
    ("proxy.listen", '["unix:/{instnace}"]', "[0]", 'no braces but those of "{instance}"'),
    ("proxy.anonymous", '"yes"', "", 'expected true or false, got "yes"'),
    ("proxy.anonymous", "1", "", "expected true or false, got 1"),
    ("proxy.drain_timeout", '"off"', "", "cannot be off"),
    ("proxy.drain_timeout", "10", "", 'write "10s", got 10'),
    ("proxy.max_connections", "0", "", "a whole number from 1 to 10000000, got 0"),
    ("proxy.max_connections", "10000001", "", "to 10000000, got 10000001"),
    ("proxy.max_connections", '"20000"', "", "a whole number"),
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
    ("routes[0].padding", '"2B"', "", '"0", or a size from "3B" to "64KiB"'),
    ("routes[0].heartbeat_bytes", '"65KiB"', "", '"0", or a size from "3B" to "64KiB"'),
    ("routes[0].heartbeat", '"0s"', "", "duration"),
    ("limits.connections_per_address", "-1", "", "a whole number from 0 to 10000000, got -1"),
    ("tunnel.allow", '"a.example:443"', "", "an array"),
    ("tunnel.allow", "[443]", "[0]", "HOST:PORT"),
    ("tunnel.allow", '["a.example"]', "[0]", 'a port, or "*" for every port'),
    ("tunnel.allow", '["a.example:"]', "[0]", "a port from 1 to 65535"),
    ("tunnel.allow", '["a.example:0"]', "[0]", "a port from 1 to 65535"),
    ("tunnel.allow", '["a.example:65536"]', "[0]", "a port from 1 to 65535"),
    ("tunnel.allow", '["a.example:https"]', "[0]", "a port from 1 to 65535"),
    ("tunnel.allow", '["a.example:**"]', "[0]", "a port from 1 to 65535"),
    ("tunnel.allow", '["https://a.example:443"]', "[0]", "without a scheme or a path"),
    ("tunnel.allow", '["a.example:443/x"]', "[0]", "without a scheme or a path"),
    ("tunnel.allow", '["*:443"]', "[0]", "no pattern stands for all hosts"),
    ("tunnel.allow", '["a.*.example:443"]', "[0]", "only at the beginning"),
    ("tunnel.allow", '[":443"]', "[0]", "as HOST a host's name"),
    ("tunnel.allow", '["[fd12::1]"]', "[0]", 'a port, or "*" for every port'),
    ("tunnel.allow", '["fd12::1:443"]', "[0]", "an IPv6 address stands in brackets"),
    ("tunnel.allow", '["[fd12::x]:443"]', "[0]", "as HOST a host's name"),
    ("tunnel.allow", '["a.example:443", "10.0.0.1:443"]', "", '"10.0.0.1:443" is not public (p'),
    ("tunnel.allow", '["[::ffff:127.0.0.1]:1"]', "", "is not public (loopback)"),
    ("tunnel.allow", '["localhost:11434"]', "", "or `allow_private = true` beside it"),
    ("tunnel.allow", '["*.localhost:80"]', "", "is not public (loopback)"),
    ("tunnel.allow_private", '"yes"', "", "true or false"),
    ("tunnel.observe", "1", "", "true or false"),
    ("tunnel.idle", "600", "", 'write "600s"'),
    ("tunnel.total", '"never"', "", 'or "off"'),
    ("tunnel.max_per_client", "-1", "", "a whole number from 0"),
    ("tunnel.hosts", '["a.example"]', "", "unknown key"),
    ("trace.jsonl", '"trace.jsonl"', "", "an absolute path"),
    ("trace.jsonl", '"/var/log/"', "", "the absolute path of a file"),
    ("trace.ledger", '"ledger"', "", "an absolute path"),
    ("trace.keep", '"7d"', "", "expected `ledger` beside it"),
    ("trace.postgres", "5432", "", "a URL such as"),
    ("trace.postgres", '"db.example"', "", "host=HOST dbname=DATABASE"),
    ("trace.postgres", '" "', "", "a URL such as"),
    ("trace.otlp", '"127.0.0.1:4318"', "", "an http:// or https:// URL"),
    ("trace.otlp", '"http://key@host"', "", "without a user or password"),
    ("trace.session_header", '"x session"', "", "a header's name"),
    ("trace.session_header", '"cookie"', "", "a header that carries no key"),
    ("trace.session_header", '["x-a", "cookie"]', "[1]", "a header that carries no key"),
    ("trace.session_header", "1", "", "expected an array"),
    ("credentials.directory", '"credentials"', "", "an absolute path"),
    ("routes[0].models_list", '"both"', "", 'one of "upstream", "configured", got "both"'),
    ("providers.p.credential", "1", "", "the bare name of a file"),
    ("providers.p.credential", "{}", ".command", "expected this key, but it is missing"),
    ("providers.p.credential", '{command = "/bin/x"}', ".command", "an array with at least one"),
    ("providers.p.credential", "{command = []}", ".command", "an array with at least one item"),
    ("providers.p.credential", '{command = ["token"]}', ".command", "a program's absolute path"),
    ("providers.p.credential", '{command = ["/t", 1]}', ".command[1]", "expected a string"),
    ("providers.p.credential", '{command = ["/t"], ttl = "off"}', ".ttl", "cannot be off"),
    ("providers.p.credential", '{command = ["/t"], ttl = "0.5s"}', ".ttl", 'at least "1s"'),
    ("providers.p.credential", '{command = ["/t"], tll = "5s"}', ".tll", 'did you mean "ttl"?'),
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
    (
        "providers.p.dialect",
        '"openia"',
        "",
        'one of "openai", "anthropic", "ollama", "gemini", "raw"',
    ),
    ("providers.p.dialect", "1", "", "one of"),
    ("providers.p.header", '"Authorization: Bearer"', "", "a token"),
    ("providers.p.format", '"Bearer"', "", 'exactly one "{}"'),
    ("providers.p.format", '"{}{}"', "", 'exactly one "{}"'),
    ("providers.p.format", '"{x}"', "", 'exactly one "{}"'),
    ("providers.p.format", '"Bearer {}\\n"', "", "visible ASCII"),
    ("providers.p.format", '"Bearer {} "', "", "visible ASCII"),
    ("providers.p.format", '"é{}"', "", "visible ASCII"),
    ("providers.p.format", "1", "", "visible ASCII"),
    ("providers.p.headers", '"a: b"', "", "expected a table, got a string"),
    ("providers.p.headers", '{ "a b" = "a" }', '."a b"', "a token"),
    ("providers.p.headers", '{ Api-Key = "a" }', ".Api-Key", "use `credential`"),
    ("providers.p.headers", '{ A = "a", a = "a" }', ".a", "each name once"),
    ("providers.p.headers", '{ a = "b\\r\\nc: d" }', ".a", "without control characters"),
    ("providers.p.headers", "{ a = 1 }", ".a", "a string"),
    ("providers.p.pass_credential", "0", "", "true or false"),
    ("providers.p.key_query", "1", "", "the name of a parameter"),
    ("providers.p.key_query", '"a&b"', "", "the name of a parameter"),
    ("providers.p.key_query", '""', "", "the name of a parameter"),
    ("providers.p.drop_headers", '"a"', "", "an array"),
    ("providers.p.drop_headers", '["a b"]', "[0]", "a token"),
    ("providers.p.drop_headers", '["via"]', "[0]", "a header that neither the proxy nor HTTP's"),
    ("providers.p.drop_headers", '["connection"]', "[0]", "a header that neither the proxy nor"),
    ("providers.p.query", '"a=b"', "", "expected a table, got a string"),
    ("providers.p.query", '{ "a b" = "a" }', '."a b"', "the name of a parameter"),
    ("providers.p.query", '{ Api-Key = "a" }', ".Api-Key", "no parameter that carries a key here"),
    ("providers.p.query", '{ key = "a" }', ".key", "use `credential`"),
    ("providers.p.query", '{ A = "a", a = "a" }', ".a", 'but "A" stands there already'),
    ("providers.p.query", '{ a = "b\\n" }', ".a", "a string without control characters"),
    ("providers.p.query", "{ a = 1 }", ".a", "a string without control characters"),
    ("providers.p.drop_query", '"a"', "", "an array"),
    ("providers.p.drop_query", '["a=b"]', "[0]", "the name of a parameter"),
    ("routes[0].query", '{ access_token = "a" }', ".access_token", "no parameter that carries"),
    ("routes[0].drop_query", '["a&b"]', "[0]", "the name of a parameter"),
    ("routes[0].headers", '{ X-Api-Key = "a" }', ".X-Api-Key", "no header that carries a key"),
    ("routes[0].headers", '{ Authorization = "a" }', ".Authorization", "no header that carries"),
    ("routes[0].headers", '{ via = "a" }', ".via", "neither the proxy nor HTTP's framing owns"),
    ("routes[0].drop_headers", '["host"]', "[0]", "neither the proxy nor HTTP's framing owns"),
    ("providers.p.ca", '"ca.pem"', "", "an absolute path"),
    ("providers.p.ca", '"/no/such.pem"', "", "a PEM file of certificates (No such file"),
    ("providers.p.ca", '"/dev/null"', "", "a PEM file of certificates"),
    ("providers.p.pool", "-1", "", "a whole number from 0 to 1000000, got -1"),
    ("providers.p.pool", "1.0", "", "a whole number"),
    ("providers.p.pool", "0x" + "f" * 5000, "", "got a number"),
    ("providers.p.timeouts", '"1s"', "", "expected a table"),
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
    ("routes[0].path", '"/a/..;x"', "", "segments"),
    ("routes[0].path", '"/-"', "", "the proxy's own pages"),
    ("routes[0].path", '"/-/pace"', "", "the proxy's own pages"),
    ("routes[0].name", '"a b"', "", "a name of up to 64"),
    ("routes[0].name", '"/a"', "", "a name of up to 64"),
    ("routes[0].name", f'"{"a" * 65}"', "", "a name of up to 64"),
    ("routes[0].providers", "[]", "", "at least one item"),
    ("routes[0].providers", '["q"]', "[0]", 'the name of a provider, got "q"'),
    ("routes[0].providers", '["pp"]', "[0]", 'did you mean "p"?'),
    ("routes[0].providers", "[1]", "[0]", "the name of a provider"),
    ("routes[0].providers", '["p", "p"]', "", "each provider once"),
    ("routes[0].override.p.weight", "0", "", "a whole number from 1"),
    ("providers.p.max_streams", "0", "", "a whole number from 1"),
    ("providers.p.queue", "{}", "", "`max_streams` beside it"),
    ("providers.p.health.failures", "-1", "", "a whole number from 0"),
    ("providers.p.health.open_for", '"off"', "", "cannot be off"),
    ("providers.p.health.window", "30", "", "with its unit"),
    ("routes[0].hosts", "[]", "", "at least one item"),
    ("routes[0].hosts", '["a b"]', "[0]", "a host's name"),
    ("routes[0].hosts", '["a:80"]', "[0]", "without a port"),
    ("routes[0].hosts", '["[::1]:80"]', "[0]", "without a port"),
    ("routes[0].hosts", "[1]", "[0]", "a host's name"),
    ("routes[0].models", '"gpt"', "", "an array"),
    ("routes[0].allowed_origins", '"*"', "", "an array"),
    *(
        ("routes[0].allowed_origins", f'["{odd}"]', "[0]", 'such as "https://app.example"')
        for odd in ("app.example", "https://a/", "https://a/b", "null", "https://*.a", "http://")
    ),
    ("routes[0].models", '["gpt", ""]', "[1]", 'a pattern such as "gpt-*"'),
    ("routes[0].strip", '"no"', "", "true or false"),
    ("routes[0].override", '{ q = { model = "m" } }', ".q", "one of the route's providers"),
    ("routes[0].override", '{ p = { model = "" } }', ".p.model", "a non-empty string"),
    ("routes[0].override", '{ p = "m" }', ".p", "expected a table, got a string"),
    ("routes[0].override", '"m"', "", "expected a table"),
    ("routes[0].timeouts", '{ pool_idle = "1s" }', ".pool_idle", "only be set in [timeouts]"),
    ("routes[0].timeouts", '{ first_byte = "x" }', ".first_byte", "a duration"),
    ("log.access", '"all"', "", 'true, false or "errors", got "all"'),
    ("log.access", "1", "", 'true, false or "errors", got 1'),
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
    ("clients.c", "{ keys = [{}] }", ".keys[0].hash", "expected this key, but it is missing"),
    ("clients.c", '{ keys = [{ hash = "x" }] }', ".keys[0].hash", "`llmproxy keys new c` makes"),
    ("clients.c", f"{{ keys = [{{ {HASH}, expired = 1 }}] }}", ".keys[0].expired", '"expires"?'),
    ("clients.c", ends("2027-01-31"), ".keys[0].expires", "a date with a time and an offset"),
    ("clients.c", ends("2027-01-31T00:00:00"), ".keys[0].expires", "a time with its offset"),
    ("clients.c", ends('"2027-01-31T00:00:00"'), ".keys[0].expires", "a time with its offset"),
    ("clients.c", ends('"2027-01-31"'), ".keys[0].expires", "a time with its offset"),
    ("clients.c", ends('"90d"'), ".keys[0].expires", 'such as "2027-01-31T00:00:00Z", got "90d"'),
    ("clients.c", ends("1800000000"), ".keys[0].expires", "a date with a time and an offset"),
    ("clients.c", "{}", ".keys", "is missing; `llmproxy keys new c` makes a key"),
    ("clients.c", '"key"', "", "expected a table, got a string"),
    (
        "clients.c",
        f"{{ keys = {KEYS_LINE}, max_streams = 0 }}",
        ".max_streams",
        "from 1 to 1000000",
    ),
    (
        "clients.c",
        f'{{ keys = {KEYS_LINE}, requests_per_minute = "6k" }}',
        ".requests_per_minute",
        "a whole number",
    ),
    (
        "clients.c",
        f"{{ keys = {KEYS_LINE}, tokens_per_minute = 0 }}",
        ".tokens_per_minute",
        "a whole number from 1",
    ),
    (
        "clients.c",
        f"{{ keys = {KEYS_LINE}, tokens_per_day = 1.5 }}",
        ".tokens_per_day",
        "a whole number",
    ),
    ("clients.anonymous", f"{{ keys = {KEYS_LINE} }}", "", "another name"),
    ('clients."a b"', f"{{ keys = {KEYS_LINE} }}", "", "a name of up to 64"),
    ("clients.-a", f"{{ keys = {KEYS_LINE} }}", "", "a name of up to 64"),
    ("clients", "1", "", "expected a table, got a number"),
    ("admin", "[]", "", "expected a table, got an array"),
    # unknown keys, with the nearest known one
    ("route", "1", "", 'unknown key; did you mean "routes"?'),
    ("proxy.drain-timeout", '"1s"', "", 'unknown key; did you mean "drain_timeout"?'),
    ("providers.p.URL", '"x"', "", 'unknown key; did you mean "url"?'),
    ("providers.p.timeouts", '{ idel = "1s" }', ".idel", 'did you mean "idle"?'),
    ("routes[0].provider", '"p"', "", 'did you mean "providers"?'),
    ("routes[0].override", "{ p = { modle = 1 } }", ".p.modle", 'did you mean "model"?'),
    ("trace.zzz", "1", "", "unknown key; expected one of jsonl, ledger, postgres, "),
]


@pytest.mark.parametrize(("key", "value", "below", "words"), WRONG)
def test_one_mistake_is_one_problem(key: str, value: str, below: str, words: str) -> None:
    """A mistake is reported once, with its key's path and what is expected."""
    problems = problems_of({key: value})
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
def test_headers_that_no_operator_may_set(name: str) -> None:
    """The fields of the proxy and of the framing are written down here a second time."""
    words = "expected a header that neither the proxy nor HTTP's framing owns"
    changes = {
        "providers.p.header": f'"{name}"',
        "providers.p.headers": f'{{ {name} = "a" }}',
        "trace.session_header": f'"{name}"',
    }
    assert problems_of(changes) == (
        f'providers.p.header: {words}, got "{name}"',
        f"providers.p.headers.{name}: {words}",
        f'trace.session_header: {words}, got "{name}"',
    )


@pytest.mark.parametrize("name", CARRY_KEYS)
def test_headers_that_carry_a_key(name: str) -> None:
    """Such a header is for a credential: it is neither added to requests nor recorded."""
    assert accepted({"providers.p.header": f'"{name}"'}).providers["p"].header == name.lower()
    changes = {"providers.p.dialect": '"raw"', "providers.p.header": '"x-other"'}
    added, recorded = problems_of(
        {
            **changes,
            "providers.p.headers": f'{{ {name} = "a" }}',
            "trace.session_header": f'"{name}"',
        }
    )
    assert added.startswith(f"providers.p.headers.{name}: expected no header that carries a key")
    assert recorded.startswith("trace.session_header: expected a header that carries no key")


def test_a_route_does_not_set_a_providers_credential() -> None:
    """The field in which its provider gets the credential is the credential's alone."""
    changes = {"providers.p.header": '"X-Custom"', "routes[0].headers": '{ x-custom = "a" }'}
    (problem,) = problems_of(changes)
    assert problem.startswith("routes[0].headers.x-custom: expected no header that carries a key")


@pytest.mark.parametrize("name", ["accept", "cookie", "user-agent", "x-session", "openai-beta"])
def test_other_headers_may_be_set(name: str) -> None:
    """Every other header is free for the operator."""
    assert accepted({"providers.p.header": f'"{name}"'}).providers["p"].header == name
    added = accepted({"providers.p.headers": f'{{ {name} = "a" }}'}).providers["p"].headers
    assert added == ((name, "a"),)


TWO = {
    "providers.q.url": '"http://q"',
    "providers.q.dialect": '"openai"',
    "routes[0].providers": '["p", "q"]',
}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"routes[0].retry_on": '["sometimes"]'}, "routes[0].retry_on[0]: expected one of"),
        ({"routes[0].retry_on": "[200]"}, "a status from 400 to 599, got 200"),
        ({"routes[0].retry_on": "[true]"}, "a status from 400 to 599, got true"),
        ({"routes[0].balance": '"random"'}, 'one of "ordered", "least_busy", "weighted"'),
        (
            {"routes[0].override.q.weight": "2"},
            'routes[0].override: expected balance = "weighted" beside the weight of "q"',
        ),
        (
            {"providers.q.dialect": '"anthropic"'},
            'providers of the same `dialect`, but "p" and "q" differ',
        ),
        ({"providers.q.pass_credential": "true"}, "providers of the same `pass_credential`"),
        ({"providers.q.key_query": "true"}, "providers of the same `key_query`"),
        (
            {"providers.p.queue.size": "5", "providers.q.max_streams": "1"},
            "providers.p.queue: expected `max_streams` beside it",
        ),
    ],
)
def test_what_several_providers_must_have_in_common(changes: dict[str, str], problem: str) -> None:
    """One and the same request must fit all of them."""
    (found,) = problems_of({**TWO, **changes})
    assert problem in found


def test_several_providers_are_accepted() -> None:
    """With every key that is for them."""
    config = accepted(
        {
            **TWO,
            "providers.q.max_streams": "5",
            "providers.q.queue": '{ size = 7, timeout = "3s" }',
            "providers.q.health": "{ failures = 0 }",
            "routes[0].balance": '"weighted"',
            "routes[0].retry_on": '["connect", "reset", "timeout", 418]',
            "routes[0].sticky": '"session"',
            "routes[0].sticky_for": '"5m"',
            "routes[0].override.q.weight": "3",
        }
    )
    (route,), q = config.routes, config.providers["q"]
    assert route.providers == ("p", "q")
    assert (route.balance, route.sticky, route.sticky_for) == ("weighted", "session", 300)
    assert route.retry_on == ("connect", "reset", "timeout", 418)
    assert route.override["q"].weight == 3
    assert q.queue is not None
    assert (q.max_streams, q.queue.size, q.queue.timeout, q.health.failures) == (5, 7, 3, 0)
    assert config.providers["p"].health.failures == 5


@pytest.mark.parametrize(
    "key", ["providers.p.url", "providers.p.dialect", "routes[0].path", "routes[0].providers"]
)
def test_needed_keys(key: str) -> None:
    """A key without a default must be there."""
    assert problems_of({key: None}) == (f"{key}: expected this key, but it is missing",)


@pytest.mark.parametrize("name", ["-a", ".a", "a b", "a/b", "a" * 65, "ä", ""])
def test_names_of_providers(name: str) -> None:
    """A provider's name must do as a label."""
    key = f"providers.{json.dumps(name)}"
    problems = problems_of({f"{key}.url": '"https://a"', f"{key}.dialect": '"raw"'})
    assert len(problems) == 1
    assert problems[0].startswith("providers.")
    assert "a name of up to 64 letters" in problems[0]


# --- what only the whole file shows ---------------------------------------------------------------


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
    (problem,) = problems_of({"proxy.anonymous": anonymous})
    assert problem.startswith("clients: expected at least one [clients.NAME]")
    assert "proxy.anonymous = true for an open listener without clients" in problem


def test_routes_as_a_table() -> None:
    """Where routes are no array of tables, the problem shows how they are written."""
    with pytest.raises(ConfigError, match=r"routes: expected \[\[routes\]\], an array of tables"):
        parse('[routes]\npath = "/"', environ={})


def test_one_path_twice_needs_names() -> None:
    """Of two routes with one path the second is asked for a name of its own."""
    changes = {"routes[1].path": '"/a"', "routes[1].providers": '["p"]'}
    (problem,) = problems_of(changes)
    assert problem.startswith("routes[1].name: expected a name of its own: set `name`")
    assert 'routes[0] is called "a" already' in problem
    named = accepted({**changes, "routes[1].name": '"b"', "routes[1].models": '["m"]'})
    assert [route.name for route in named.routes] == ["a", "b"]


def test_a_bad_route_does_not_make_a_client_wrong() -> None:
    """Where the name of a route is not known, the routes of clients are not judged."""
    problems = problems_of(
        {"routes[0].path": '"a"', "clients.c": f'{{ keys = {KEYS_LINE}, routes = ["a"] }}'}
    )
    assert [one.split(":")[0] for one in problems] == ["routes[0].path"]


def test_a_bad_provider_does_not_make_a_route_wrong() -> None:
    """A provider with a mistake is still there for the routes that name it."""
    problems = problems_of({"providers.p.dialect": "1"})
    assert [one.split(":")[0] for one in problems] == ["providers.p.dialect"]


@pytest.mark.parametrize("second", ["a", "b"])
def test_one_key_twice(second: str) -> None:
    """No key stands in two clients, nor twice in one."""
    both = f'["sha256:{DIGEST}", "sha256:{DIGEST}"]'
    changes = {"clients.a.keys": both if second == "a" else KEYS_LINE}
    if second == "b":
        changes["clients.b.keys"] = KEYS_LINE
    (problem,) = problems_of(changes)
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


ORDER = """
    proxy listen, listen_tls, reuse_port, certificate, key, anonymous, drain_timeout,
        max_connections, tell_provider, tuned_loop, via
    admin listen, hosts, metrics_listen
    timeouts connect, first_byte, idle, total, client_stall, request_head, request_body,
        client_idle, pool_idle
    limits request_head, request_body, request_memory, response_head, accumulate, event,
        connections_per_address, drains
    providers.q dialect, pass_credential, key_query, header, url, credential, format, headers,
        drop_headers, query, drop_query, ca, pool, max_streams, queue, health, timeouts
    routes[1] path, providers, name, balance, retry_on, sticky, sticky_for, hosts, models,
        allowed_origins, strip, override, timeouts,
        headers, drop_headers, query, drop_query, accept_encoding, include_usage, on_disconnect,
        drain_for, error_event, capture, request_body
    trace jsonl, ledger, postgres, postgres_credential, keep, otlp, session_header
    clients.c keys, routes, models, weight, max_streams, requests_per_minute, tokens_per_minute,
        tokens_per_day
"""


def test_the_order_of_problems() -> None:
    """Problems are in the order of the sections, and of the keys as they are read."""
    sections = re.findall(r"^    (\S+) ((?:.+\n)(?: {8}.+\n)*)", ORDER, re.MULTILINE)
    keys = [f"{path}.{key}" for path, names in sections for key in re.findall(r"\w+", names)]
    problems = problems_of(dict.fromkeys(keys, "2020-01-01"))
    assert [one.split(":")[0] for one in problems] == keys


@pytest.mark.parametrize(
    ("place", "section"),
    [
        ("", ROOT),
        ("providers.p.", SECTIONS["providers.*"]),
        ("providers.p.timeouts.", SECTIONS["providers.*.timeouts"]),
        ("routes[0].", SECTIONS["routes"]),
        ("routes[0].timeouts.", SECTIONS["routes.timeouts"]),
        ("clients.c.", SECTIONS["clients.*"]),
    ],
)
def test_the_keys_of_a_section_are_listed(place: str, section: Section) -> None:
    """A key that is like none of its section gets the list of them all."""
    names = ", ".join(section.names)
    assert f"{place}zzz: unknown key; expected one of {names}" in problems_of({f"{place}zzz": "1"})


def test_a_list_of_models_is_not_made_for_gemini() -> None:
    """Its shape is another one, and a list in a wrong shape is worse than the provider's."""
    changes = {"providers.p.dialect": '"gemini"', "routes[0].models_list": '"configured"'}
    (problem,) = problems_of(changes)
    assert problem.startswith('routes[0].models_list: expected "upstream", as a provider')


def test_a_websocket_has_no_model_of_the_operators() -> None:
    """Frames cross as they are, so that nothing could put it there."""
    changes = {"routes[0].websocket": "true", "routes[0].override.p": '{ model = "m" }'}
    (problem,) = problems_of(changes)
    assert problem.startswith("routes[0].websocket: expected no `model` in `override` beside it")
    accepted({"routes[0].websocket": "true", "routes[0].override": "{}"})
