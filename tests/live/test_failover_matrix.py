"""Every way in which a provider fails, with one, two and three candidates, streamed or not.

The table of ``docs/failover.rst`` is what this module saw: ``WRITE_TABLE=1`` lets it write it.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.daemon import Daemon, provider_table
from tests.support.live_proxy import (
    Response,
    assert_settles,
    chunked_response,
    post,
    read_response,
    response,
    trace_of,
    write_credential,
)
from tests.support.sockets import Provider, Wire, connect
from tests.support.tls import Authority

PAGE = Path(__file__).parents[2] / "docs" / "failover.rst"
BEGIN, END = ".. what the matrix saw", ".. end of the matrix"

WELL = "well"
STREAM = chunked_response(b'data: {"choices":[]}\n\n', b"data: [DONE]\n\n")
WHOLE = response(200, "Content-Type: application/json", body=b'{"id":"1"}')
BODIES = {True: b'{"model":"m","stream":true}', False: b'{"model":"m"}'}


class Fault(NamedTuple):
    """One way to fail.

    Attributes:
        text: what the page calls it.
        raw: what the provider sends, or None where it is no HTTP provider that fails.
        status, end: what the client and the record get where nobody else responds.
        passed_over: whether the next candidate is asked.
        retry_on: what the route says, where that is not the default.
    """

    text: str
    raw: bytes | None
    status: int
    end: str
    passed_over: bool = True
    retry_on: str = ""


def refusal(status: int, *fields: str) -> bytes:
    return response(status, *fields, body=b'{"error":{"message":"no"}}')


REFUSED, MORE = "upstream_refused", 'retry_on = ["connect", "reset", "timeout"]'
FAULTS = {
    "refused": Fault("nobody listens", None, 502, "upstream_unreachable"),
    "name": Fault("its name is unknown", None, 502, "upstream_unreachable"),
    "tls": Fault("its certificate is not trusted", None, 502, "upstream_tls"),
    "silent": Fault("no TLS handshake within ``connect``", None, 504, "upstream_timeout"),
    "reset": Fault("a reset before the head", b"", 502, "upstream_broken", passed_over=False),
    "reset-on": Fault(
        'the same, with ``"reset"`` in ``retry_on``', b"", 502, "upstream_broken", True, MORE
    ),
    "slow": Fault("no head within ``first_byte``", None, 504, "upstream_timeout", False),
    "slow-on": Fault(
        'the same, with ``"timeout"`` in ``retry_on``', None, 504, "upstream_timeout", True, MORE
    ),
    "401": Fault("401", refusal(401), 401, REFUSED),
    "403": Fault("403", refusal(403), 403, REFUSED),
    "404": Fault("404", refusal(404), 404, REFUSED, passed_over=False),
    "429": Fault("429", refusal(429), 429, REFUSED),
    "429-s": Fault("429, ``retry-after: 7``", refusal(429, "Retry-After: 7"), 429, REFUSED),
    "429-ms": Fault(
        "429, ``retry-after-ms: 900``", refusal(429, "Retry-After-Ms: 900"), 429, REFUSED
    ),
    "429-date": Fault(
        "429, ``retry-after`` with a date",
        refusal(429, "Retry-After: Fri, 31 Dec 2100 23:59:59 GMT"),
        429,
        REFUSED,
    ),
    "429-reset": Fault(
        "429, ``x-ratelimit-reset-requests: 1m30s``",
        refusal(429, "x-ratelimit-reset-requests: 1m30s"),
        429,
        REFUSED,
    ),
    "500": Fault("500", refusal(500), 500, REFUSED),
    "503": Fault("503", refusal(503), 503, REFUSED),
    "529": Fault("529", refusal(529), 529, REFUSED),
}
COOLDOWNS = {"429-s": 7, "429-ms": 0.9, "429-date": 3600, "429-reset": 90}

HEAD = """\
.. list-table::
   :header-rows: 1

   * - the first candidates
     - one candidate: the client gets
     - is the next one asked?
     - two or three, the last one well
     - asked"""
COUNTS = (1, 2, 3)


class Case(NamedTuple):
    """One cell: a fault, so many candidates, streamed or not, and whether the last one is well."""

    fault: str
    candidates: int
    streams: bool
    saved: bool

    @property
    def path(self) -> str:
        """The route's path, and the beginning of its providers' names."""
        kind, last = "s" if self.streams else "w", "saved" if self.saved else "lost"
        return f"{self.fault}-{self.candidates}-{kind}-{last}"

    @property
    def providers(self) -> list[str]:
        """The candidates."""
        names = [f"{self.path}-{place}" for place in range(self.candidates)]
        return [*names[:-1], f"{names[-1]}-{WELL}"] if self.saved else names


CASES = [
    Case(fault, count, streams, saved)
    for fault in FAULTS
    for count in COUNTS
    for streams in (True, False)
    for saved in (False, True)
    if count > 1 or not saved
]


class Matrix:
    """A daemon with a route for each case, and the providers behind it.

    Attributes:
        asked: how many requests each provider that speaks HTTP has read.
        rows: the lines of the table.
    """

    def __init__(self, folder: Path, authority: Authority) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.rows: dict[str, str] = {}
        self._http = Provider(self._play)
        self._silent = Provider(_read_on)
        self._tls = Provider(_read_on, tls=authority.server())
        self._dead = socket.socket()
        self._dead.bind(("127.0.0.1", 0))

    @contextmanager
    def running(self) -> Iterator[Matrix]:
        """Run all of it."""
        tables = "".join(map(self._tables, CASES))
        secret = write_credential(self._folder, "secret", "sk-secret")
        with self._dead, self._http, self._silent, Daemon(self._folder, tables + secret) as daemon:
            self.daemon = daemon
            with suppress(ssl.SSLError), self._tls:
                yield self

    def _tables(self, case: Case) -> str:
        quoted = ", ".join(f'"{name}"' for name in case.providers)
        retry_on = FAULTS[case.fault].retry_on if case.candidates > 1 else ""
        route = f'[[routes]]\npath = "/{case.path}"\nproviders = [{quoted}]\n{retry_on}\n'
        return "".join(self._provider(name, case) for name in case.providers) + route

    def _provider(self, name: str, case: Case) -> str:
        dead = f"http://127.0.0.1:{self._dead.getsockname()[1]}"
        url, more = f"{self._http.url}/{case.fault}/{name}", ""
        if not name.endswith(WELL):
            url, more = {
                "refused": (dead, ""),
                "name": ("http://nowhere.invalid", ""),
                "tls": (self._tls.url, ""),
                "silent": (self._silent.url.replace("http:", "https:"), "connect"),
                "slow": (url, "first_byte"),
                "slow-on": (url, "first_byte"),
            }.get(case.fault, (url, ""))
        short = f'timeouts = {{ {more} = "400ms" }}' if more else ""
        return provider_table(name, 'credential = "secret"', short, url=url)

    def _play(self, wire: Wire) -> None:
        """Play the provider that the path names."""
        received = wire.read_request()
        _, fault, name, _ = received.target.decode().split("/", 3)
        with self._lock:
            self.asked[name] += 1
        if name.endswith(WELL):
            wire.send(STREAM if b"stream" in received.body else WHOLE)
        elif (raw := FAULTS[fault].raw) is None:
            wire.wait_closed()
        elif raw:
            wire.send(raw)
        else:
            wire.reset()

    def ask(self, case: Case) -> tuple[Response, dict[str, Any]]:
        """Call a case's route; return what the client got, and the record."""
        with connect(self.daemon.port) as client:
            client.send(post(f"/{case.path}/v1/chat/completions", BODIES[case.streams]))
            got = read_response(client)
        (name,) = got.values(b"x-llmproxy-request-id")
        return got, trace_of(self.daemon, id=name.decode())


def _read_on(wire: Wire) -> None:
    wire.wait_closed()


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    folder = tmp_path_factory.mktemp("matrix")
    with Matrix(folder, Authority(folder)).running() as running:
        yield running


@pytest.mark.parametrize("fault", FAULTS)
def test_a_provider_fails(matrix: Matrix, fault: str) -> None:
    """Response, record and counts are those of the fault, or of the candidate that is well."""
    how = FAULTS[fault]
    cases = [one for one in CASES if one.fault == fault]
    with ThreadPoolExecutor(len(cases)) as pool:  # each has providers of its own
        seen = list(pool.map(matrix.ask, cases))
    for case, (got, record) in zip(cases, seen, strict=True):
        asked = case.candidates if how.passed_over else 1
        is_saved = case.saved and how.passed_over
        outcomes = [how.end] * asked
        if is_saved:
            outcomes[-1] = "ok"
            expected = STREAM if case.streams else WHOLE
            assert got.status == 200
            assert got.body == _body_of(expected), "byte for byte what the last candidate sent"
            assert record["end_reason"] == "complete"
            assert record["provider"] == case.providers[-1]
        else:
            assert (got.status, record["end_reason"]) == (how.status, how.end), case
        assert [one["outcome"] for one in record["attempts"]] == outcomes, case
        tried = [one["provider"] for one in record["attempts"]]
        assert tried == case.providers[:asked]
        if got.error is None:
            assert got.values(b"x-llmproxy-attempts") == [b"%d" % asked]
            assert got.values(b"x-llmproxy-provider") == [tried[-1].encode()]
        reached = Counter({name: matrix.asked[name] for name in case.providers})
        reading = [name for name in tried if _reads_requests(name, fault)]
        assert reached == Counter(reading), "nobody is asked twice"
    matrix.rows[fault] = _row(how)


def _body_of(raw: bytes) -> bytes:
    """Return the body of a whole response, without its framing."""
    body = raw.partition(b"\r\n\r\n")[2]
    if b"chunked" not in raw:
        return body
    pieces = []
    while body:
        size, _, body = body.partition(b"\r\n")
        pieces.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return b"".join(pieces)


def _reads_requests(name: str, fault: str) -> bool:
    return name.endswith(WELL) or FAULTS[fault].raw is not None or fault.startswith("slow")


@pytest.mark.parametrize(("fault", "seconds"), COOLDOWNS.items())
def test_a_refusal_says_for_how_long(matrix: Matrix, fault: str, seconds: float) -> None:
    """All candidates are left alone, and the client is told how long."""
    case = Case(fault, 2, True, False)
    matrix.ask(case)
    before = dict(matrix.asked)
    got, record = matrix.ask(case)
    if fault == "429-ms" and got.error is None:
        return  # the machine took longer than the cooldown
    assert (got.status, got.error) == (429, "all_cooling")
    (told,) = got.values(b"retry-after")
    assert seconds - 60 < int(told) <= seconds + 1
    assert dict(matrix.asked) == before, "nobody was asked"
    assert [one["outcome"] for one in record["attempts"]] == ["skipped", "skipped"]
    assert record["end_reason"] == "rejected"
    metrics = matrix.daemon.metrics()
    gauge = f'llmproxy_provider_cooldown_seconds{{provider="{case.providers[0]}"}}'
    assert seconds - 60 < metrics[gauge] <= seconds


def test_nothing_is_left(matrix: Matrix) -> None:
    """Neither a request nor a place nor a connection."""
    assert_settles(matrix.daemon)


def _row(fault: Fault) -> str:
    alone = f"{fault.status}, ``{fault.end}``"
    if not fault.passed_over:
        return f"   * - {fault.text}\n     - {alone}\n     - no\n     - {alone}\n     - 1"
    return (
        f"   * - {fault.text}\n     - {alone}\n     - yes\n     - 200, ``complete``\n     - 2 or 3"
    )


def test_the_page_says_what_was_seen(matrix: Matrix) -> None:
    """The table of docs/failover.rst is this module's."""
    if matrix.rows.keys() != FAULTS.keys():
        pytest.skip("only a part of the matrix was run")
    rows = "\n".join(matrix.rows.values())
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(f"{BEGIN}\n")
    _, _, after = rest.partition(f"\n{END}")
    written = f"{before}{BEGIN}\n\n{HEAD}\n{rows}\n\n{END}{after}"
    if os.environ.get("WRITE_TABLE"):
        PAGE.write_text(written, encoding="utf-8")
    assert page == written
