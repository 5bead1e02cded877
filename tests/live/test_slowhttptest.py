"""slowhttptest against the daemon: its four attacks end in time, and nobody else notices them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

import pytest

from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    assert_settles,
    live_fixture,
    post,
    response,
    until,
)
from tests.support.scripts import LAST, SSE, event
from tests.support.sockets import WAIT, Wire, chunked

_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
SLOWHTTPTEST = shutil.which("slowhttptest", path=_PATH)
pytestmark = pytest.mark.skipif(SLOWHTTPTEST is None, reason="slowhttptest is not installed")

COUNT = 150
"""Connections of one attack."""

PATIENCE = 5.0
"""Seconds that a calm client may wait for a response, or for the next event of its stream."""

TIMEOUTS = """
[timeouts]
request_head = "2s"
request_body = "2s"
client_idle = "2s"
client_stall = "2s"
"""
IN_TIME = 2.0 + 18.0
"""Seconds after which the last attacker is cut: the deadlines above; the rest is for connecting,
for what the kernel takes before a reader stalls, and for a machine that has other work."""


class Attack(NamedTuple):
    """One of the program's modes.

    Attributes:
        options: what selects it, and shapes it.
        target: what it asks for.
        end: what is on record of each of its connections: method, end reason, error, status.
        notices: the program sees that it is cut off, and ends by itself.
    """

    options: str
    target: str
    end: tuple[str, str, str | None, int]
    notices: bool = True


SLOW = ("rejected", "slow_request", 408)
ATTACKS = {
    "slow headers": Attack("-H -i 1", "/p/x", ("", *SLOW)),
    "slow body, streamed": Attack("-B -i 1 -s 4096", "/p/x", ("POST", *SLOW)),
    "slow body, held": Attack("-B -i 1 -s 4096 -f application/json", "/p/x", ("POST", *SLOW)),
    "ranges": Attack("-R -a 1 -b 2000", "/p/x", ("HEAD", "complete", None, 200)),
    # It takes five bytes a second, and would find its reset behind all that its kernel holds.
    "slow read": Attack(
        "-X -w 512 -y 1024 -n 1 -z 5",
        "/p/flood",
        ("GET", "client_stalled", None, 200),
        notices=False,
    ),
}


class Calm:
    """Clients that go about their work; leaving the context checks that nothing disturbed them.

    Three ask for short responses, one after the other, each on a connection of its own; a fourth
    reads one stream all the while.  Their provider is also the attackers'.

    Attributes:
        asked: short responses so far.
        slowest: the longest that any of them waited, in seconds.
    """

    COUNT = 4

    def __init__(self, live: LiveProxy) -> None:
        self._stage = live
        self._over = threading.Event()
        self._errors: list[BaseException] = []
        works = [self._ask] * (self.COUNT - 1) + [self._listen]
        self._threads = [
            threading.Thread(target=self._run, args=(work,), daemon=True) for work in works
        ]
        self._sent = self._heard = b""
        self.asked = 0
        self.slowest = 0.0

    def __enter__(self) -> Self:
        self._stage.script = self._provide
        for thread in self._threads:
            thread.start()
        until(lambda: self.asked and self._heard, "they are at work")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(2 * WAIT)
        if kind is None:
            if self._errors:
                raise self._errors[0]
            assert not any(thread.is_alive() for thread in self._threads)
            assert self._heard == self._sent
            assert self.slowest < PATIENCE

    def _provide(self, wire: Wire) -> None:
        received = wire.read_request()
        if received.target == b"/long":
            wire.send(SSE)
            while not self._over.wait(0.05):
                piece = event(self._sent.count(b"\n\n"))
                self._sent += piece
                wire.send(chunked(piece))
            wire.send(LAST)
        elif received.target == b"/flood":
            wire.send(SSE)
            while True:
                wire.send(chunked(b"x" * 100_000))
        else:
            wire.send(response(200, body=received.body))

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._errors.append(error)

    def _waited(self, since: float) -> None:
        self.slowest = max(self.slowest, time.monotonic() - since)

    def _ask(self) -> None:
        while not self._over.wait(0.02):
            body = b'{"model":"m","n":%d}' % self.asked
            began = time.monotonic()
            got = self._stage.get(post("/p/short", body))
            self._waited(began)
            assert (got.status, got.body) == (200, body)
            self.asked += 1

    def _listen(self) -> None:
        with self._stage.connect() as client:
            client.send(post("/p/long"))
            client.read_head()
            while True:
                began = time.monotonic()
                chunk = client.read_chunk()
                self._waited(began)
                if not chunk:
                    break
                self._heard += chunk


live = live_fixture(ONE_ROUTE + TIMEOUTS)


@contextmanager
def attacked(live: LiveProxy, attack: Attack) -> Iterator[subprocess.Popen[str]]:
    """Run an attack; it lasts no longer than the context."""
    assert SLOWHTTPTEST is not None
    url = f"http://127.0.0.1:{live.daemon.port}{attack.target}"
    command = [SLOWHTTPTEST, *attack.options.split(), "-u", url, "-p", f"{PATIENCE:.0f}"]
    command += ["-c", f"{COUNT}", "-r", f"{COUNT}", "-l", f"{2 * IN_TIME:.0f}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def cut(live: LiveProxy, attack: Attack) -> tuple[int, float]:
    """Return how many requests have ended as the attack's do: by the trace, and by the metric."""
    method, reason, error, status = attack.end
    # The attacks stand in the trace without end, but the last line may be half written.
    lines = live.daemon.trace_path.read_text().rpartition("\n")[0].splitlines()
    wanted = {"method": method, "end_reason": reason, "error": error, "status": status}
    traced = sum(wanted.items() <= json.loads(line).items() for line in lines)
    metrics = live.daemon.metrics()
    return traced, metrics.get(f'llmproxy_ended_total{{reason="{reason}"}}', 0)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_and_nobody_else_notices_it(live: LiveProxy, name: str) -> None:
    """Its connections are cut on time and on record, and calm clients are served as ever."""
    attack = ATTACKS[name]
    traced, counted = cut(live, attack)

    def all_cut() -> bool:
        now_traced, now_counted = cut(live, attack)
        return now_traced - traced >= COUNT and now_counted - counted >= COUNT

    def only_calm() -> bool:
        return live.gauge("client_connections") <= Calm.COUNT

    with Calm(live) as calm, attacked(live, attack) as process:
        until(all_cut, "each attacker is cut, and on record", seconds=IN_TIME)
        until(only_calm, "the calm ones' connections are left", seconds=PATIENCE)
        if attack.notices:
            said, _ = process.communicate(timeout=WAIT)
            assert "No open connections left" in said
            probes = re.findall(r"service available:.*?(YES|NO)", said)
            assert set(probes) == {"YES"}
        asked = calm.asked
        until(lambda: calm.asked > asked, "the calm ones go on")
    assert_settles(live.daemon)
