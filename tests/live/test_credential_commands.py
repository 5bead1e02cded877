"""A provider's credential that a command prints, at a running daemon (ADR-0029)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.commands import COUNTED, runs, script
from tests.support.daemon import Daemon, provider_config
from tests.support.live_proxy import LiveProxy, response, until
from tests.support.reloads import reload
from tests.support.scripts import KEPT, Notes
from tests.support.sockets import Received, Wire, request

GET = request("GET", "/p/x")
PRINTS = COUNTED + 'echo "tok-SECRET-$n"\n'
AGE = 'llmproxy_credential_age_seconds{provider="p"}'
FAILURES = 'llmproxy_credential_failures_total{provider="p"}'


class Renewing(LiveProxy):
    """A daemon whose provider's credential is what ``FOLDER/token`` prints.

    Attributes:
        seen: what the provider received.
        refuse: the credentials that the provider refuses.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.seen = Notes()
        self.refuse: set[bytes] = set()
        self.script = self._play

    def _play(self, wire: Wire) -> None:
        while True:
            received = wire.read_request()
            self.seen.put(received)
            if set(received.values(b"authorization")) & self.refuse:
                wire.send(response(401, body=b"{}").replace(b"Connection: close\r\n", b""))
            else:
                wire.send(KEPT)

    def status(self) -> int:
        """Return the status of one request."""
        return self.get(GET).status

    def sent(self) -> str:
        """Send a request, and return the number of the credential that the provider got."""
        assert self.status() in (200, 401)
        received: Received = self.seen.read()
        (value,) = received.values(b"authorization")
        assert value.startswith(b"Bearer tok-SECRET-")
        return value.rpartition(b"-")[2].decode()

    def number(self) -> int:
        """Send a request, and return the number of the run whose output the provider got."""
        return int(self.sent())


@contextmanager
def run(folder: Path, *, ttl: str = "1h", body: str = PRINTS) -> Iterator[Renewing]:
    """Run a daemon with the script; nothing that it printed may be shown anywhere."""
    path = script(folder, body)
    live = Renewing(folder)
    keys = f'credential = {{ command = ["{path}"], ttl = "{ttl}" }}'
    config = provider_config(live.provider.url, provider=keys)
    with live.provider, Daemon(folder, config) as live.daemon:
        yield live
        shown = ""
        if live.daemon.process.poll() is None:
            shown = live.daemon.admin("/config") + live.daemon.admin("/metrics")
    shown += json.dumps(live.daemon.log) + live.daemon.errors + live.daemon.trace_path.read_text()
    assert "SECRET" not in shown


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Renewing]:
    """A daemon whose command counts its runs."""
    with run(tmp_path) as live:
        yield live


@pytest.fixture
def short(tmp_path: Path) -> Iterator[Renewing]:
    """A daemon whose command's output is good for a second."""
    with run(tmp_path, ttl="1s") as live:
        yield live


def test_what_is_printed_goes_to_the_provider(live: Renewing) -> None:
    """It is run once, and the requests share a connection."""
    assert [live.sent() for _ in range(3)] == ["1", "1", "1"]
    assert runs(live.folder) == 1
    assert live.provider.accepted == 1
    assert 0 <= live.daemon.metrics()[AGE] < 60


def test_a_new_output_reaches_new_requests_without_a_reload(short: Renewing) -> None:
    """It is on connections of its own, and the idle ones of the old value are closed."""
    first = short.number()
    until(lambda: short.number() > first, "the next output is used")
    second = short.number()
    until(lambda: short.number() > second, "and the one after it")
    idle = 'llmproxy_upstream_connections{provider="p",state="idle"}'
    until(lambda: short.daemon.metrics()[idle] <= 1, "no connection of an old value is kept")
    assert short.provider.accepted >= 3


def test_the_last_good_output_is_used_while_the_command_fails(short: Renewing) -> None:
    """The log says how it failed, and not what it said."""
    kept = short.number()
    script(short.folder, "echo tok-SECRET-garbage >&2; echo tok-SECRET-x; exit 7")
    line = short.daemon.wait_log("the credential's command failed")
    assert "exit status 7; its last output stays in use" in line["message"]
    assert line["level"] == "warn"
    assert short.number() >= kept
    until(lambda: short.daemon.metrics()[FAILURES] >= 2, "it is tried again")
    script(short.folder, PRINTS)
    short.daemon.wait_log("works again")
    last = short.number()
    until(lambda: short.number() > last, "it is renewed again")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("exit 1", "exit status 1"),
        ("printf 'tok-SECRET\\n\\n'", "one line of visible ASCII"),
        ("yes tok-SECRET", "more than 64KiB"),
        ("kill -9 $$", "signal 9"),
    ],
)
def test_a_command_that_fails_at_the_start_does_not_stop_the_daemon(
    tmp_path: Path, body: str, why: str
) -> None:
    """Requests get a 503 with a reason of its own until it succeeds; no provider is asked."""
    with run(tmp_path, body=body) as live:
        assert why in live.daemon.wait_log("command failed")["message"]
        got = live.get(GET)
        assert (got.status, got.error) == (503, "credential_unavailable")
        assert got.values(b"retry-after") == [b"1"]
        record = live.trace(got)
        assert (record["provider"], record["error"]) == ("p", "credential_unavailable")
        assert (record["end_reason"], record["attempts"]) == ("rejected", [])
        assert live.provider.accepted == 0
        assert AGE not in live.daemon.metrics()
        script(tmp_path, PRINTS)
        until(lambda: live.status() == 200, "the next try is in a second")


def test_a_refusal_of_the_provider_runs_the_command(live: Renewing) -> None:
    """The client gets the refusal as it is; a stream of refusals runs it once."""
    live.refuse = {b"Bearer tok-SECRET-1"}
    assert live.sent() == "1"
    live.daemon.wait_log("the provider refused its credential")
    until(lambda: live.sent() == "2", "the next output is used", seconds=30)
    assert [live.sent() for _ in range(5)] == ["2"] * 5
    assert runs(live.folder) == 2


def test_a_reload_keeps_the_output_and_runs_a_new_command(live: Renewing) -> None:
    """The same command is not run again; another one has run before a request needs it."""
    assert live.sent() == "1"
    reload(live.daemon, ('ttl = "1h"', 'ttl = "2h"'))
    assert (live.sent(), runs(live.folder), live.provider.accepted) == ("1", 1, 1)
    other = script(live.folder, "echo tok-SECRET-other", name="other")
    reload(live.daemon, (f'"{live.folder}/token"', f'"{other}"'))
    assert live.sent() == "other"
    reload(live.daemon, (f'"{other}"', f'"{live.folder}/token"'), ('ttl = "2h"', 'ttl = "1h"'))
    assert live.sent() == "2"


def test_nobody_is_turned_away_while_the_command_runs(tmp_path: Path) -> None:
    """Before its first run is over nothing listens; another process may have the port as well."""
    slow = "sleep 0.5\n" + PRINTS
    with run(tmp_path, body=slow) as live:
        assert live.sent() == "1"


def test_a_shutdown_does_not_wait_for_a_command_and_leaves_none(tmp_path: Path) -> None:
    """One that hangs is killed with its children."""
    hangs = "sleep 1000 & echo $! > FOLDER/child.new; mv FOLDER/child.new FOLDER/child; wait"
    child = tmp_path / "child"
    with run(tmp_path, ttl="1s") as live:
        script(tmp_path, hangs)
        until(child.exists, "it hangs")
        live.daemon.terminate()
        live.daemon.process.wait(20)
        stat = Path(f"/proc/{child.read_text().strip()}/stat")
        until(lambda: not stat.exists() or ") Z " in stat.read_text(), "it is gone")
