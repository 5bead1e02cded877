"""CONNECT, as far as no byte goes through it: what is refused, how, and what is recorded."""

from __future__ import annotations

from base64 import b64encode
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs

from llmproxy.config import Intercept
from llmproxy.errors import EndReason, ProxyError
from llmproxy.gateway.connect import Connect, Ways
from llmproxy.gateway.repeats import Repeats
from llmproxy.record.trace import Trace
from llmproxy.server.handler import Router
from tests.gateway.played import PlayedGateway
from tests.support.fake_transport import FIN
from tests.support.sockets import request


def basic(pair: str) -> str:
    """Return a field with the credentials of a proxy's URL."""
    return "Proxy-Authorization: Basic " + b64encode(pair.encode()).decode()


class PlayedConnect(PlayedGateway):
    """A gateway with CONNECT, and one host that is intercepted.

    Attributes:
        leaves: the hosts for which TLS was asked for, each with what the test fires.
        kept: the hosts whose TLS is there at once.
    """

    def __init__(self, **more: Any) -> None:
        self.accessed: list[str] = []
        self.details: list[str | None] = []
        more.setdefault("more", '[tunnel]\nallow = ["listed.example:443"]\n')
        super().__init__(access=self.access, **more)
        self.ways = Ways(self.clock, self.clock.seconds)
        self.leaves: list[tuple[str, Deferred[Any]]] = []
        self.kept: set[str] = set()
        intercept = Intercept(
            hosts=("in.example", "*.in.example"), authority=cast("Any", None), handshakes=2
        )
        config = msgspec.structs.replace(self.config, intercept=intercept)
        self.ways_out: list[tuple[str, int, Deferred[Any]]] = []
        self.handler = Connect(
            config,
            self.recorder,
            self.metrics,
            self.ways,
            leaf=self.leaf,
            way_out=cast("Any", SimpleNamespace(open=self.open)),
        )
        self.site.serve(Router(self.gateway, methods={b"CONNECT": self.handler}))

    def access(self, trace: Trace, cause: str | None, detail: str | None) -> None:
        """Keep an access line."""
        self.accessed.append(trace.path)
        self.details.append(detail)

    def leaf(self, host: str) -> Deferred[Any]:
        """Take the question for TLS."""
        found: Deferred[Any] = Deferred()
        self.leaves.append((host, found))
        if host in self.kept:
            found.callback(None)
        return found

    def open(self, host: str, port: int, caller: str) -> Deferred[Any]:
        """Take the question for a connection."""
        found: Deferred[Any] = Deferred()
        self.ways_out.append((host, port, found))
        return found

    def ask(self, target: str, *fields: str, version: str = "1.1") -> None:
        """Ask for a tunnel."""
        self.send(request("CONNECT", target, *fields, version=version))

    def first_line(self) -> str:
        """Return the first line of what the client got."""
        return self.transport.take().partition(b"\r\n")[0].decode()


# --- who asks -------------------------------------------------------------------------------------


def test_a_tunnel_without_a_key_is_407_and_the_connection_stays() -> None:
    """Git shows its key only then, on the same connection."""
    played = PlayedConnect()
    played.ask("out.example:443")
    status, fields, body = played.got()
    assert status == 407
    assert fields[b"proxy-authenticate"] == b'Basic realm="llmproxy"'
    assert fields[b"x-llmproxy-error"] == b"no_key"
    assert b"HTTPS_PROXY" in body
    played.ask("out.example:443", basic("c:key"))
    assert played.first_line() == "HTTP/1.1 403 Host not on the tunnel list"
    played.ask("out.example:443", basic("c:key"))
    assert played.first_line() == "HTTP/1.1 403 Host not on the tunnel list"
    assert played.transport.calls == ["nodelay"]


@pytest.mark.parametrize(
    "credentials",
    [basic("c:key"), basic("key:"), basic("c:k%65y"), "Proxy-Authorization: Bearer key"],
    ids=["name and key", "key alone", "percent-encoded", "bearer"],
)
def test_who_asks_is_known(credentials: str) -> None:
    """The record names the client."""
    played = PlayedConnect()
    played.ask("out.example:443", credentials)
    assert played.refusal() == (403, "tunnel_refused")
    trace = played.trace()
    assert (trace.client, trace.method, trace.path) == ("c", "CONNECT", "out.example:443")
    assert (trace.status, trace.end_reason, trace.tunnel) == (403, "rejected", "refused")
    assert played.value("connects_total", outcome="refused") == 1


@pytest.mark.parametrize(
    ("credentials", "reason"),
    [
        (basic("c:other"), "unknown_key"),
        (basic("other:key"), "keys_disagree"),
        (basic(":"), "unknown_key"),
        ("Proxy-Authorization: Basic ???", "no_key"),
        ("Proxy-Authorization: Digest key", "no_key"),
        ("Proxy-Authorization: Bearer", "unknown_key"),
    ],
)
@pytest.mark.parametrize("host", ["out.example", "in.example"])
def test_a_wrong_key_is_407(credentials: str, reason: str, host: str) -> None:
    """Also for a host that is intercepted, and never 403: clients ask again with another one."""
    played = PlayedConnect()
    played.ask(f"{host}:443", credentials)
    status, fields, _ = played.got()
    assert (status, fields[b"x-llmproxy-error"].decode()) == (407, reason)
    assert b"proxy-authenticate" in fields
    assert played.transport.calls == ["nodelay"]
    assert not played.leaves


# --- what is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    ["out.example", "out.example:", "out.example:0", "out.example:65536", "/p", ":443", "u@h:443",
     "out.example:443/", "[::1:443", "out.example:443:443", "*", "http://out.example/"],
)  # fmt: skip
def test_what_is_no_authority_is_refused(target: str) -> None:
    """The status line says what a target looks like."""
    played = PlayedConnect()
    played.ask(target, basic("c:key"))
    assert played.first_line() == "HTTP/1.1 400 Target must be HOST:PORT"
    assert played.trace().error == "bad_target"


@pytest.mark.parametrize("length", ["1", "5000000"])
def test_a_connect_with_a_body_is_refused(length: str) -> None:
    """What follows belongs to the tunnel; a length says something else (RFC 9110, 9.3.6)."""
    played = PlayedConnect()
    played.ask("in.example:443", f"Content-Length: {length}")
    assert played.refusal()[0] == 413
    assert not played.leaves


def test_a_connect_with_a_chunked_body_is_refused_at_once() -> None:
    """Nobody waits for the end of such a body, and nothing that follows is taken for a tunnel."""
    played = PlayedConnect()
    played.ask("in.example:443", "Transfer-Encoding: chunked")
    assert played.refusal()[0] == 400
    played.send(b"5\r\nhello\r\n0\r\n\r\n")
    assert not played.leaves


# --- interception ---------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["in.example", "IN.example", "in.example.", "a.b.in.example"])
def test_an_intercepted_host_needs_no_key_and_is_never_tunnelled(host: str) -> None:
    """The name is compared as names are."""
    played = PlayedConnect()
    played.ask(f"{host}:443")
    ((asked, _),) = played.leaves
    assert asked == host.lower().rstrip(".")
    assert played.ways.waiting == 1
    assert played.transport.value() == b""
    assert not played.sink.traces


def test_a_client_that_leaves_before_the_leaf_is_there() -> None:
    """Nothing is held for it any more."""
    played = PlayedConnect()
    played.ask("in.example:443")
    played.transport.end(FIN)
    assert played.ways.waiting == 0
    assert played.trace().end_reason == "client_gone"
    assert played.leaves[0][1].called


def test_as_many_handshakes_as_may_be() -> None:
    """One more is a 503; where a client has left there is room."""
    played = PlayedConnect()
    played.kept = {"in.example"}
    first = played.transport
    for _ in range(2):
        played.ask("in.example:443")
        assert played.first_line() == "HTTP/1.1 200 OK"
        played.connect()
    played.ask("in.example:443")
    status, fields, _ = played.got()
    assert (status, fields[b"retry-after"]) == (503, b"1")
    first.end(FIN)
    played.ask("in.example:443")
    assert played.first_line() == "HTTP/1.1 200 OK"
    assert (played.ways.handshakes, played.ways.waiting) == (2, 0)


def test_who_asks_for_many_new_names_locks_out_nobody_else() -> None:
    """Those that wait for a leaf are counted apart; a host whose leaf is there takes no notice."""
    played = PlayedConnect()
    played.kept = {"in.example", "old.in.example"}
    for number in range(2):
        played.ask(f"{number}.in.example:443")
        played.connect()
    played.ask("2.in.example:443")
    assert played.refusal() == (503, "handshakes")
    assert played.leaves[-1][1].called  # nobody waits for it
    for host in played.kept:
        played.connect()
        played.ask(f"{host}:443")
        assert played.first_line() == "HTTP/1.1 200 OK"
    assert (played.ways.handshakes, played.ways.waiting) == (2, 2)


def test_a_leaf_that_comes_when_there_are_enough_handshakes() -> None:
    """Its client is refused as any other."""
    played = PlayedConnect()
    played.kept = {"in.example"}
    waiting = played.transport
    played.ask("new.in.example:443")
    for _ in range(2):
        played.connect()
        played.ask("in.example:443")
    played.leaves[0][1].callback(None)
    assert b" 503 " in waiting.take().partition(b"\r\n")[0]
    assert (played.ways.handshakes, played.ways.waiting) == (2, 0)


def test_a_leaf_that_cannot_be_made_is_an_error_of_ours() -> None:
    """The client's connection stays."""
    played = PlayedConnect()
    played.ask("in.example:443")
    played.leaves[0][1].errback(ValueError("it has expired"))
    assert played.refusal() == (503, "no_certificate")
    assert played.details == ["it has expired"]
    assert played.ways.waiting == 0
    assert played.transport.calls == ["nodelay"]


# --- the log --------------------------------------------------------------------------------------


def test_refusals_that_repeat_are_a_line_and_a_count() -> None:
    """A program that asks for the same host without end fills no log; its records stay."""
    played = PlayedConnect()
    for _ in range(5):
        played.ask("out.example:443", basic("c:key"))
    played.ask("other.example:443", basic("c:key"))
    assert played.accessed == ["out.example:443", "other.example:443"]
    assert len(played.sink.traces) == 6
    with capturedLogs() as lines:
        played.clock.advance(60)
    (line,) = lines
    assert line["log_level"] is LogLevel.warn
    assert (line["host"], line["count"], line["client"]) == ("out.example:443", 4, "c")
    played.ask("out.example:443", basic("c:key"))
    assert len(played.accessed) == 3


@pytest.mark.parametrize(
    ("host", "phrase"),
    [
        ("out.example:443", "Host not on the tunnel list"),
        ("listed.example:80", "Port not on the tunnel list for this host"),
        ("localhost:443", "localhost is the caller's own machine: put localhost,127.0.0.1 into"),
        ("127.1:443", "localhost is the caller's own machine: put localhost,127.0.0.1 into"),
    ],
)
def test_the_reason_stands_in_the_status_line(host: str, phrase: str) -> None:
    """Most programs show that, and few the body."""
    played = PlayedConnect()
    played.ask(host, basic("c:key"))
    assert played.first_line().startswith(f"HTTP/1.1 403 {phrase}")


# --- tunnels --------------------------------------------------------------------------------------


def test_a_client_that_leaves_before_its_tunnel_is_open() -> None:
    """The attempt is cancelled, and the tunnel does not count any more."""
    played = PlayedConnect()
    played.ask("listed.example:443", basic("c:key"))
    ((host, port, opening),) = played.ways_out
    assert (host, port, len(played.ways.tunnels)) == ("listed.example", 443, 1)
    played.transport.end(FIN)
    assert opening.called
    assert len(played.ways.tunnels) == 0
    trace = played.trace()
    assert (trace.end_reason, trace.tunnel, trace.status) == ("client_gone", "tunnelled", None)


def test_a_host_that_cannot_be_reached_is_said_in_the_status_line() -> None:
    """It was not refused: the record says so."""
    played = PlayedConnect()
    played.ask("listed.example:443", basic("c:key"))
    error = ProxyError(
        502,
        "upstream_unreachable",
        "The host cannot be reached.",
        end=EndReason.UPSTREAM_UNREACHABLE,
    )
    played.ways_out[0][2].errback(error)
    assert played.first_line() == "HTTP/1.1 502 The host cannot be reached"
    trace = played.trace()
    assert (trace.end_reason, trace.tunnel) == ("upstream_unreachable", "tunnelled")


def test_as_many_tunnels_as_a_client_may_have() -> None:
    """One more is a 429 before anything is looked up."""
    played = PlayedConnect(more='[tunnel]\nallow = ["listed.example:443"]\nmax_per_client = 1\n')
    played.ask("listed.example:443", basic("c:key"))
    played.connect()
    played.ask("listed.example:443", basic("c:key"))
    status, fields, _ = played.got()
    assert (status, fields[b"x-llmproxy-limit"]) == (429, b"max_per_client")
    assert len(played.ways_out) == 1


def test_what_the_list_would_refuse_passes_where_it_is_observed() -> None:
    """The record says what would have been refused; a host that is intercepted still is."""
    played = PlayedConnect(more="[tunnel]\nobserve = true\n")
    played.ask("out.example:22", basic("c:key"))
    assert played.ways_out[0][:2] == ("out.example", 22)
    played.transport.end(FIN)
    assert played.trace().tunnel == "would_refuse"
    played.connect()
    played.ask("in.example:443", basic("c:key"))
    assert len(played.ways_out) == 1


@pytest.mark.parametrize("host", ["in.example", "a.in.example"])
def test_a_host_in_both_lists_is_intercepted_or_fails(host: str) -> None:
    """It never falls back to a tunnel, whichever of the lists has it by a wildcard."""
    more = '[tunnel]\nallow = ["in.example:443", "*.in.example:*", "*.example:443"]\n'
    played = PlayedConnect(more=more)
    played.ask(f"{host}:443", basic("c:key"))
    played.leaves[0][1].errback(ValueError("the authority has expired"))
    assert played.refusal() == (503, "no_certificate")
    assert not played.ways_out


def test_a_key_in_the_place_of_the_host_is_in_no_record() -> None:
    """Somebody's variable was put together wrongly."""
    played = PlayedConnect()
    played.ask("llmp_" + "a" * 43 + ":443", basic("c:key"))
    assert played.refusal() == (403, "tunnel_refused")
    assert played.trace().path == ""


def test_refusals_of_many_hosts_are_counted_together() -> None:
    """A program that invents hosts fills neither the log nor the memory; nothing goes untold."""
    clock = Clock()
    repeats = Repeats(clock)
    told = [repeats.is_first(f"h{number}.example:443", "c", "no_key") for number in range(1030)]
    assert told == [True] * 1024 + [False] * 6
    with capturedLogs() as lines:
        clock.advance(60)
    assert [line["count"] for line in lines] == [6]
    assert repeats.is_first("h1029.example:443", "c", "no_key")


def test_another_reason_is_another_line() -> None:
    """Who mends one mistake sees the next one, and not a count of the first."""
    clock = Clock()
    repeats = Repeats(clock)
    reasons = ["no_key", "unknown_key", "tls_handshake", "unknown_key"]
    told = [repeats.is_first("h.example:443", "c", reason) for reason in reasons]
    assert told == [True, True, True, False]
    with capturedLogs() as lines:
        clock.advance(60)
    assert [(line["count"], line["error"]) for line in lines] == [(1, "unknown_key")]


def test_what_was_counted_is_told_at_the_end_of_the_process() -> None:
    """No timer stays behind."""
    clock = Clock()
    repeats = Repeats(clock)
    repeats.close()
    for _ in range(3):
        repeats.is_first("h.example:443", "c", "no_key")
    with capturedLogs() as lines:
        repeats.close()
        repeats.close()
    assert [line["count"] for line in lines] == [2]
    assert not clock.getDelayedCalls()
