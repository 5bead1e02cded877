"""Random lives of CONNECTs, interceptions, tunnels, forwarded requests and WebSockets.

Each life is drawn from a seed, and lived in a thread against a real daemon, which is reloaded now
and then.  Sides leave at any point, by a FIN or a reset; bytes come split, or before their time.
What is not broken on purpose must work.  In the end each life has its records, and every gauge,
place and descriptor is what it was.  A failure prints what lives it again::

    LLMPROXY_TEST_SEED=7 LLMPROXY_WAY_LIVES_ONLY=41 pytest tests/live/test_way_lives.py
"""

from __future__ import annotations

import json
import os
import random
import socket
import ssl
import threading
import time
import traceback
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.live_proxy import assert_settles, client_config, read_response, response, until
from tests.support.reloads import reload
from tests.support.sandbox import KEY, Sandbox, open_sandbox
from tests.support.scripts import DONE, LAST, OK, SSE, event
from tests.support.sockets import WAIT, Provider, Wire, chunked, connect, request
from tests.support.websocket import CLOSE, close, frame, handshake, read_frame, switch

SEED = int(os.environ["LLMPROXY_TEST_SEED"])  # tests/conftest.py
LIVES = int(os.environ.get("LLMPROXY_WAY_LIVES", "400"))
AT_ONCE, RELOADS = 12, 6
HANDSHAKES, TUNNELS, STREAMS = 40, 60, 30
"""More than the lives need at once, and so few that a place that is lost is missed."""

HOST, SECOND = "api.openai.com", "llmp_a-key-of-another-program"
MASK = b"\x05\x06\x07\x08"
MORE = f"""
[timeouts]
request_head = "700ms"
first_byte = "900ms"
[tunnel]
allow = ["127.0.0.1:*"]
allow_private = true
max_per_client = {TUNNELS}
[[routes]]
path = "/v1/realtime"
hosts = ["{HOST}"]
providers = ["p"]
strip = false
websocket = true
name = "realtime"
""" + client_config("second", SECOND, f"max_streams = {STREAMS}")

LEFT = {"client_gone", "complete"}
"""How something ends whose client leaves at some point: it may be through with it."""


# --- the other sides ------------------------------------------------------------------------------


def play_host(wire: Wire) -> None:
    """Be the host of a tunnel; the first byte says how."""
    kind = wire.read(1)
    if kind == b"e":
        while data := wire.buffer or wire.receive():
            wire.buffer = b""
            wire.send(data)
        with suppress(OSError):  # the other side has reset it
            wire.sock.shutdown(socket.SHUT_WR)
    elif kind == b"r":
        wire.send(b"some")
        wire.reset()
    elif kind == b"s":  # takes nothing for a while, and leaves it unread
        time.sleep(0.3)


def play_provider(wire: Wire) -> None:
    """Be the provider, or a host that speaks HTTP; a field of the request says how."""
    asked = wire.read_request()
    (kind,) = asked.values(b"x-play")
    if asked.values(b"upgrade"):
        play_socket(wire, asked, kind)
    elif kind == b"ok":
        wire.send(OK)
    elif kind == b"silent":
        wire.wait_closed()
    else:
        wire.send(SSE, chunked(event(0)))
        if kind == b"stream":
            wire.send(chunked(DONE), LAST)
        elif kind == b"hold":
            wire.wait_closed()
        else:
            wire.reset()


def play_socket(wire: Wire, asked: Any, kind: bytes) -> None:
    """Switch, and go on as is asked."""
    if kind == b"silent":
        wire.wait_closed()
        return
    if kind == b"refuse":
        wire.send(response(403, body=b"no"))
        return
    wire.send(switch(asked, behind=frame(b"hello")))
    if kind == b"reset":
        wire.reset()
    while kind == b"ok":
        got = read_frame(wire)
        if got.opcode == CLOSE:
            wire.send(close())
            return
        if b"response.create" in got.payload:
            wire.send(frame(b'{"type":"response.created","response":{"id":"r"}}'))
            wire.send(frame(b'{"type":"response.done","response":{"id":"r","status":"completed"}}'))
        else:
            wire.send(frame(got.payload, got.opcode, fin=got.fin))


# --- one life -------------------------------------------------------------------------------------


class Lived:
    """One life: what is drawn for it, and the records that it must leave.

    Attributes:
        records: for each, its method, and how it may end; None among these lets it be missing.
    """

    def __init__(self, live: Sandbox, far: Provider, number: int) -> None:
        self.live = live
        self.far = far
        self.name = f"life/{number}"
        self.draw = random.Random(f"{SEED} {number}")
        self.records: list[tuple[str, set[str | None]]] = []

    @property
    def agent(self) -> str:
        """The field that marks its requests."""
        return f"User-Agent: {self.name}"

    def key(self) -> str:
        """Draw who calls, and how that is said."""
        name, key = self.draw.choice([("team", KEY), ("second", SECOND)])
        pair = self.draw.choice([f"{name}:{key}", f"{key}:", f"{name}:{key.replace('_', '%5F')}"])
        basic = "Basic " + b64encode(pair.encode()).decode()
        return "Proxy-Authorization: " + self.draw.choice([basic, f"Bearer {key}"])

    def connect_head(self, authority: str, *fields: str) -> bytes:
        """Draw a CONNECT as some program asks."""
        version = self.draw.choice(["1.0", "1.1"])
        more = self.draw.choice([[], ["Connection: close"], ["Proxy-Connection: keep-alive"]])
        host = self.draw.choice([authority, authority.rpartition(":")[0]])
        return request("CONNECT", authority, self.agent, *fields, *more, version=version, host=host)

    def expect(self, method: str, *ends: str | None) -> None:
        """Note a record that must be there, and how it may end."""
        self.records.append((method, set(ends)))

    def send(self, wire: Wire, data: bytes) -> None:
        """Send in pieces of any size."""
        while data:
            size = self.draw.choice([1, 7, 100, len(data)])
            wire.send(data[:size])
            data = data[size:]

    def leave(self, wire: Wire) -> None:
        """Leave, by a FIN or a reset."""
        self.draw.choice([wire.reset, wire.close])()

    def opened(self, wire: Wire) -> None:
        """Take the 200."""
        assert wire.read_until(b"\r\n\r\n") == b"HTTP/1.1 200 OK\r\n\r\n"

    # -- tunnels --------------------------------------------------------------------------------

    def tunnel(self) -> None:
        """Bytes go both ways until somebody ends it."""
        how = self.draw.choice(["echo"] * 3 + ["host resets", "leaves", "early", "stuck"])
        with connect(self.live.daemon.port) as wire:
            head = self.connect_head(f"127.0.0.1:{self.far.port}", self.key())
            if how == "early":
                self.expect("CONNECT", *LEFT, None)
                self.send(wire, head + b"e")
                self.leave(wire)
                return
            block = self.draw.randbytes(self.draw.choice([1, 1000, 300_000]))
            kind = {"host resets": b"r", "stuck": b"s"}.get(how, b"e")
            self.send(wire, head + kind)
            self.opened(wire)
            if how == "echo":
                self.expect("CONNECT", "complete")
                sending = threading.Thread(target=self._send_all, args=(wire, block))
                sending.start()
                assert wire.read(len(block)) == block
                sending.join(WAIT)
                assert wire.wait_closed() == "fin"
            elif how == "host resets":
                self.expect("CONNECT", "upstream_broken")
                assert wire.wait_closed() == "reset"
            else:
                self.expect("CONNECT", *LEFT, "upstream_broken")
                with suppress(BlockingIOError, ConnectionError):
                    wire.sock.setblocking(False)
                    for _ in range(20):
                        wire.sock.send(block)
                self.leave(wire)

    def _send_all(self, wire: Wire, block: bytes) -> None:
        wire.send(block)
        wire.sock.shutdown(socket.SHUT_WR)

    def refused(self) -> None:
        """One refusal after the other, on one connection; then a tunnel all the same."""
        wrong = "Proxy-Authorization: Basic " + b64encode(b"team:wrong").decode()
        with connect(self.live.daemon.port) as wire:
            for authority, key, status in self.draw.choices(
                [
                    ("out.example:443", "X-None: 1", 407),
                    (f"{HOST}:443", wrong, 407),
                    ("out.example:443", self.key(), 403),
                    (f"127.0.0.1:{self.live.daemon.admin_port}", self.key(), 403),
                    (HOST, self.key(), 400),
                ],
                k=3,
            ):
                self.expect("CONNECT", "rejected")
                self.send(wire, request("CONNECT", authority, self.agent, key, host="x"))
                assert read_response(wire).status == status
            self.expect("CONNECT", "complete")
            head = request("CONNECT", f"127.0.0.1:{self.far.port}", self.agent, self.key())
            self.send(wire, head + b"e!")
            self.opened(wire)
            assert wire.read(1) == b"!"
            wire.sock.shutdown(socket.SHUT_WR)
            assert wire.wait_closed() == "fin"

    # -- interceptions --------------------------------------------------------------------------

    def handshake(self) -> None:
        """A client stops somewhere between its CONNECT and the end of the handshake."""
        hello = hello_of(self.live.trust)
        said, ends = self.draw.choice(
            [
                (b"", LEFT),
                (hello[: self.draw.randrange(1, len(hello))], LEFT),
                (hello, LEFT),
                (b"SSH-2.0-x\r\n", {"complete"}),  # its first letter alone may be that of HTTP
                (hello[:3] + b"\x00\x05abcde", LEFT),
            ]
        )
        waits = self.draw.random() < 0.3
        with connect(self.live.daemon.port) as wire:
            head = self.connect_head(self.any_host(), self.key())
            comes_early = self.draw.random() < 0.5
            self.send(wire, head + said if comes_early else head)
            with suppress(ConnectionError):  # Twisted's transports drop the 200 with the connection
                self.opened(wire)
                if not comes_early:
                    self.send(wire, said)
            self.expect("CONNECT", *ends, "rejected", "client_gone")
            if waits:
                wire.wait_closed()
            else:
                self.leave(wire)

    def any_host(self) -> str:
        """Draw a host that is intercepted; some have no leaf yet."""
        below = f"{self.name.replace('/', '-')}.models.example"
        return self.draw.choice([HOST, HOST, below, below.upper() + "."]) + ":443"

    @contextmanager
    def inside(self) -> Iterator[Wire]:
        """Open an interception, by TLS or in the clear, for some requests."""
        is_plain = self.draw.random() < 0.2
        self.expect("CONNECT", "complete", *(LEFT if is_plain else ()))
        head = self.connect_head(f"{HOST}:{80 if is_plain else 443}", self.key())
        with connect(self.live.daemon.port) as wire:
            self.send(wire, head)
            self.opened(wire)
            if is_plain:
                yield wire
                return
            trust = self.live.trust
            with Wire(trust.wrap_socket(wire.sock, server_hostname=HOST)) as inner:
                yield inner

    def served(self) -> None:
        """Requests one after the other; the last one may be left, or broken by the provider."""
        with self.inside() as wire:
            for _ in range(self.draw.randrange(4)):
                self.whole(wire, self.draw.choice(["ok", "stream"]))
            kind = self.draw.choice(["ok", "hold", "silent", "reset", "none"])
            if kind == "none":
                self.leave(wire)
                return
            self.send(wire, self.call(kind))
            if kind == "reset":
                self.expect("POST", "upstream_broken")
                wire.wait_closed()
                return
            self.expect("POST", *LEFT, "upstream_timeout", None)
            if kind == "hold" and self.draw.random() < 0.7:
                wire.read_head()
            self.leave(wire)

    def call(self, kind: str, target: str = "/v1/chat/completions", host: str = HOST) -> bytes:
        """Return a call that is played so."""
        fields = ("Content-Type: application/json", self.agent, f"X-Play: {kind}")
        return request("POST", target, *fields, body=b'{"model":"m"}', host=host)

    def whole(self, wire: Wire, kind: str) -> None:
        """Make a call, and take its response."""
        self.expect("POST", "complete")
        self.send(wire, self.call(kind))
        got = read_response(wire)
        assert (got.status, got.body) == (200, b"ok" if kind == "ok" else event(0) + DONE)

    def early(self) -> None:
        """The first record of TLS comes with the CONNECT, and the rest by and by."""
        self.expect("CONNECT", "complete")
        with connect(self.live.daemon.port) as wire:
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = self.live.trust.wrap_bio(incoming, outgoing, server_hostname=HOST)
            with suppress(ssl.SSLWantReadError):
                tls.do_handshake()
            self.send(wire, self.connect_head(f"{HOST}:443", self.key()) + outgoing.read())
            self.opened(wire)

            def step(call: Callable[[], Any]) -> Any:
                while True:
                    try:
                        return call()
                    except ssl.SSLWantReadError:
                        self.send(wire, outgoing.read())
                        if not wire.buffer and not wire.receive():
                            raise EOFError from None
                        incoming.write(wire.buffer)
                        wire.buffer = b""

            step(tls.do_handshake)
            for _ in range(2):
                self.expect("POST", "complete")
                tls.write(self.call("ok"))
                got = b""
                while not got.endswith(b"\r\n\r\nok"):
                    got += step(lambda: tls.read(65536))
            self.leave(wire)

    # -- forwarded requests ---------------------------------------------------------------------

    def forward(self) -> None:
        """A whole URL; somebody may leave."""
        port = self.live.provider.port
        kind = self.draw.choice(["ok", "stream", "hold", "silent", "reset"])
        fields = (self.agent, f"X-Play: {kind}", self.key())
        with connect(self.live.daemon.port) as wire:
            self.send(wire, request("GET", f"http://127.0.0.1:{port}/x", *fields))
            if kind in ("ok", "stream"):
                self.expect("GET", "complete")
                assert read_response(wire).status == 200
            elif kind == "reset":
                self.expect("GET", "upstream_broken")
                wire.read_head()
                with suppress(EOFError, ConnectionError):
                    wire.read_chunks()
                    raise AssertionError("a broken body was whole")
            else:
                self.expect("GET", *LEFT, "upstream_timeout", None)
                if kind == "hold":
                    wire.read_head()
                self.leave(wire)

    # -- WebSockets -----------------------------------------------------------------------------

    def socket(self) -> None:
        """A WebSocket inside an interception; whatever way, it ends on both sides."""
        kind = self.draw.choice(["ok"] * 4 + ["silent", "refuse", "reset", "leave"])
        sent = handshake("/v1/realtime", self.agent, f"X-Play: {kind}")
        with self.inside() as wire:
            self.send(wire, sent.replace(b"Host: proxy", f"Host: {HOST}".encode()))
            if kind == "silent":
                self.expect("GET", *LEFT, "upstream_timeout", None)
                self.leave(wire)
                return
            first, fields = wire.read_head()
            if kind == "refuse":
                self.expect("GET", "upstream_refused")
                assert first.startswith(b"HTTP/1.1 403"), first
                assert wire.read_body(fields) == b"no"
                return
            if kind in ("reset", "leave"):
                self.expect("GET", "upstream_broken", "upstream_protocol")
                wire.wait_closed()
                return
            assert first.startswith(b"HTTP/1.1 101"), first
            assert read_frame(wire).payload == b"hello"
            self._talk(wire)
            if self.draw.random() < 0.5:
                self.expect("GET", "complete")
                self.send(wire, close(mask=MASK))
                assert read_frame(wire).opcode == CLOSE
            else:
                self.expect("GET", *LEFT)
                if self.draw.random() < 0.5:
                    self.send(wire, frame(b"x" * 1000, mask=MASK)[: self.draw.randrange(1, 900)])
                self.leave(wire)

    def _talk(self, wire: Wire) -> None:
        """Ask for responses, and send what comes back as it is; a ping does not wait."""
        for _ in range(self.draw.randrange(4)):
            if self.draw.random() < 0.5:
                self.send(wire, frame(b'{"type":"response.create"}', mask=MASK))
                for ends in ("created", "done"):
                    assert json.loads(read_frame(wire).payload)["type"] == f"response.{ends}"
                continue
            whole = json.dumps({"type": "other", "is": "x" * self.draw.choice([0, 70_000])})
            cut = self.draw.randrange(len(whole))
            first, rest = whole[:cut].encode(), whole[cut:].encode()
            self.send(wire, frame(first, fin=False, mask=MASK) + frame(b"p", 9, mask=MASK))
            self.send(wire, frame(rest, 0, mask=MASK))
            got = sorted((one.opcode, one.payload) for one in (read_frame(wire) for _ in "123"))
            assert got == [(0, rest), (1, first), (9, b"p")]


def hello_of(trust: ssl.SSLContext) -> bytes:
    """Return how a client begins TLS."""
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        trust.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=HOST).do_handshake()
    return outgoing.read()


KINDS = (
    *("tunnel", "tunnel", "refused", "handshake", "handshake", "served", "served"),
    *("early", "forward", "socket", "socket"),
)


# --- all of them ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A daemon with every kind of way."""
    intercept = f"plain_http = true\nhandshakes = {HANDSHAKES}\n"
    with open_sandbox(tmp_path_factory.mktemp("ways"), more=MORE, intercept=intercept) as live:
        live.script = play_provider
        yield live


def live_all(live: Sandbox, far: Provider, numbers: list[int]) -> tuple[list[Lived], list[str]]:
    """Live them, some at once, with reloads between; return them, and what went wrong."""
    lives, failed = [Lived(live, far, number) for number in numbers], []
    left = iter(lives)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                life = next(left, None)
            if life is None:
                return
            kind = life.draw.choice(KINDS)
            try:
                getattr(life, kind)()
            except Exception:
                failed.append(f"{life.name}, {kind}: {traceback.format_exc(limit=-3)}")

    workers = [threading.Thread(target=work) for _ in range(AT_ONCE)]
    for worker in workers:
        worker.start()
    for _ in range(RELOADS):
        reload(live.daemon)
    for worker in workers:
        worker.join()
    return lives, failed


def complaints(life: Lived, records: list[dict[str, Any]]) -> list[str]:
    """Return what is wrong with the records of a life."""
    left = [one for one in records if "-" not in one["id"]]  # those of responses are parts
    found = []
    for method, ends in life.records:
        fits = [one for one in left if one["method"] == method and one["end_reason"] in ends]
        if fits:
            left.remove(fits[0])
        elif None not in ends:
            found.append(f"{life.name} lacks a {method} that ended as one of {ends}")
    found += [f"{life.name} has one more record: {one}" for one in left]
    return found


def wrong(live: Sandbox, lives: list[Lived]) -> list[str]:
    """Return what is wrong with the records of all lives."""
    by_life: dict[str, list[dict[str, Any]]] = {life.name: [] for life in lives}
    for record in live.daemon.traces():
        if record.get("user_agent") in by_life:
            by_life[record["user_agent"]].append(record)
    return [text for life in lives for text in complaints(life, by_life[life.name])]


@pytest.mark.timeout(300)
def test_no_life_leaves_anything_behind(live: Sandbox) -> None:
    """Each has its records; all gauges, places and descriptors are as before."""
    only = os.environ.get("LLMPROXY_WAY_LIVES_ONLY", "")
    numbers = [int(number) for number in only.split(",")] if only else [*range(LIVES)]
    with Provider(play_host) as far:
        live_all(live, far, [-1, -2])  # so that what is made once is there
        assert_settles(live.daemon)
        before = len(live.daemon.descriptors())
        lives, failed = live_all(live, far, numbers)
        again = f"LLMPROXY_TEST_SEED={SEED}"
        assert not failed, "\n".join([again, *failed[:5]])
        assert_settles(live.daemon)
        gauges = ("tunnels", "intercepted_connections", "websocket_connections", "active_streams")
        until(lambda: not any(map(live.gauge, gauges)), "every gauge is zero")
        until(lambda: len(live.daemon.descriptors()) <= before, "every descriptor is closed")
        with suppress(TimeoutError):  # records are written a little later
            until(lambda: not wrong(live, lives), "every record is there")
        assert not wrong(live, lives), "\n".join([again, *wrong(live, lives)[:10]])
        assert_every_place_is_free(live, far)
    assert Counter(live.daemon.metrics())  # it is alive


def assert_every_place_is_free(live: Sandbox, far: Provider) -> None:
    """As many handshakes and tunnels as may be are to be had, and not one more."""
    for authority, most, status in (
        (f"{HOST}:443", HANDSHAKES, 503),
        (f"127.0.0.1:{far.port}", TUNNELS, 429),
    ):
        head = request("CONNECT", authority, f"Proxy-Authorization: Bearer {KEY}")
        with ExitStack() as opened:
            for number in range(most + 1):
                wire = opened.enter_context(connect(live.daemon.port))
                wire.send(head)
                got = wire.read_until(b"\r\n")
                assert got.startswith(b"HTTP/1.1 200" if number < most else b"HTTP/1.1 %d" % status)
    assert_settles(live.daemon)


def test_a_shutdown_ends_every_life(tmp_path: Path) -> None:
    """Whatever is open is ended with the process, and has its record."""
    with (
        Provider(play_host) as far,
        open_sandbox(tmp_path, more=MORE, intercept="plain_http = true\n") as live,
        ExitStack() as opened,
    ):
        live.script = play_provider
        count = 0
        for number in range(30):
            life = Lived(live, far, 10_000 + number)
            wire = opened.enter_context(connect(live.daemon.port))
            way = ("tunnel", "silent", "half a hello", "stream", "socket")[number % 5]
            authority = f"127.0.0.1:{far.port}" if way == "tunnel" else f"{HOST}:443"
            wire.send(life.connect_head(authority, life.key()))
            life.opened(wire)
            count += 1
            if way == "tunnel":
                wire.send(b"ex")
                assert wire.read(1) == b"x"
            elif way == "half a hello":
                wire.send(hello_of(live.trust)[:50])
            elif way in ("stream", "socket"):
                inner = Wire(live.trust.wrap_socket(wire.sock, server_hostname=HOST))
                opened.enter_context(inner)
                sent = handshake("/v1/realtime", life.agent, "X-Play: ok")
                if way == "stream":
                    sent = life.call("hold")
                inner.send(sent.replace(b"Host: proxy", f"Host: {HOST}".encode()))
                inner.read_head()
                count += 1
        live.daemon.terminate()
        live.daemon.process.wait(WAIT)
        records = [one for one in live.daemon.traces() if "life/" in str(one.get("user_agent"))]
        assert len(records) == count, Counter(one["end_reason"] for one in records)
