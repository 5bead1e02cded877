"""What the service manager is sent, when, in which words, and through which socket."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, formatEvent

from llmproxy.ops.notify import Notify, send_status
from tests.ops.conftest import Listening

PID = 4711


class Manager:
    """The manager's end of the socket, and the process's end.

    Args:
        address: as ``NOTIFY_SOCKET`` writes it.
        environ: further variables.
    """

    def __init__(self, address: str, **environ: str) -> None:
        self.clock = Clock()
        self.status = "fine"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.setblocking(False)
        self.notify = Notify(
            {"NOTIFY_SOCKET": address, **environ},
            self.clock,
            lambda: 12.5,
            lambda: self.status,
            pid=PID,
        )

    def received(self) -> list[str]:
        """Return what came since the last look."""
        messages = []
        while True:
            try:
                messages.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return messages

    def close(self) -> None:
        """Take down both ends."""
        self.notify.close()
        self.socket.close()
        assert not self.clock.getDelayedCalls()


@pytest.fixture
def address(tmp_path: Path) -> str:
    """Where a manager may listen."""
    return str(tmp_path / "notify")


@pytest.fixture
def manager(address: str) -> Iterator[Manager]:
    """A manager without a watchdog."""
    manager = Manager(address)
    yield manager
    manager.close()


def test_readiness_has_a_status(manager: Manager) -> None:
    """Nothing is sent before it."""
    assert manager.received() == []
    manager.notify.ready()
    assert manager.received() == ["READY=1\nSTATUS=fine"]


def test_an_abstract_socket(tmp_path: Path) -> None:
    """A name behind an @ is one without a file."""
    manager = Manager(f"@{tmp_path}/abstract")
    manager.notify.ready()
    assert manager.received() == ["READY=1\nSTATUS=fine"]
    manager.close()


def test_a_status_is_sent_when_it_has_changed(manager: Manager) -> None:
    """The same line is not sent again and again."""
    manager.notify.ready()
    manager.received()
    manager.clock.pump([1.0] * 60)
    assert manager.received() == []
    manager.status = "better"
    manager.clock.pump([1.0] * 60)
    assert manager.received() == ["STATUS=better"]


def test_a_reload_has_a_beginning_and_an_end(manager: Manager) -> None:
    """The beginning carries its time, by the manager's own clock."""
    manager.notify.ready()
    manager.received()
    with manager.notify.reloading():
        assert manager.received() == ["RELOADING=1\nMONOTONIC_USEC=12500000"]
        manager.status = "reloaded"
    assert manager.received() == ["READY=1\nSTATUS=reloaded"]


def test_a_reload_that_a_shutdown_overtakes_makes_nothing_ready(manager: Manager) -> None:
    """A process that shuts down does not become ready again."""
    manager.notify.ready()
    with manager.notify.reloading():
        manager.received()
        manager.notify.stopping()
        manager.received()
    assert manager.received() == []


def test_a_reload_that_fails_ends_too(manager: Manager) -> None:
    """A manager that waits for the end would believe that the process is stuck."""
    manager.notify.ready()
    with pytest.raises(RuntimeError), manager.notify.reloading():
        raise RuntimeError
    assert manager.received()[-1] == "READY=1\nSTATUS=fine"


def test_a_shutdown_reports_its_progress_and_extends_its_time(manager: Manager) -> None:
    """Each second, so that a long drain does not look like a shutdown that hangs."""
    manager.notify.ready()
    manager.received()
    manager.status = "3 left"
    manager.notify.stopping()
    first, second = manager.received()
    assert first == "STOPPING=1"
    assert second == "EXTEND_TIMEOUT_USEC=15000000\nSTATUS=3 left"
    manager.clock.pump([1.0] * 10)
    assert manager.received() == [second] * 10
    manager.status = "none left"
    manager.notify.close()
    assert manager.received() == ["STATUS=none left"]


@pytest.mark.parametrize("environ", [{}, {"WATCHDOG_PID": str(PID)}])
def test_the_watchdog_gets_two_messages_in_each_interval(
    address: str, environ: dict[str, str]
) -> None:
    """They are sent by the reactor, and so stop when it does not turn."""
    manager = Manager(address, WATCHDOG_USEC="3000000", **environ)
    manager.notify.ready()
    assert manager.received()[1:] == ["WATCHDOG=1"]
    manager.clock.advance(1.4)
    assert manager.received() == []
    manager.clock.pump([0.2] * 23)
    assert manager.received() == ["WATCHDOG=1"] * 4
    manager.notify.stopping()
    manager.received()
    manager.clock.advance(1.5)
    assert "WATCHDOG=1" in manager.received()
    manager.close()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"},
    ],
)
def test_a_watchdog_of_no_process_or_of_another_gets_no_message(
    address: str, environ: dict[str, str]
) -> None:
    """A process that inherited the variables must not speak for the process that they name."""
    manager = Manager(address, **environ)
    manager.notify.ready()
    manager.clock.pump([1.0] * 10)
    assert not any("WATCHDOG" in message for message in manager.received())
    manager.close()


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "nowhere"}])
def test_without_a_manager_nothing_is_done(environ: dict[str, str]) -> None:
    """No socket is opened, and no timer is set."""
    clock = Clock()
    notify = Notify(
        {**environ, "WATCHDOG_USEC": "1000"}, clock, clock.seconds, lambda: "fine", pid=PID
    )
    before = len(os.listdir("/proc/self/fd"))
    notify.ready()
    with notify.reloading():
        pass
    notify.stopping()
    assert not clock.getDelayedCalls()
    assert len(os.listdir("/proc/self/fd")) == before
    notify.close()


def test_a_manager_that_is_gone_is_reported_once(manager: Manager, logged: Listening) -> None:
    """The process goes on without it, and reports it again only after it was reached again."""
    manager.notify.ready()
    manager.socket.close()
    for status in ("a", "b", "c"):
        manager.status = status
        manager.clock.advance(5)
    reports: list[LogEvent] = [e for e in logged if "cannot be reached" in formatEvent(e)]
    assert len(reports) == 1


def test_a_manager_that_reads_nothing_delays_nothing(manager: Manager) -> None:
    """A full queue costs some status messages, and no time."""
    manager.notify.ready()
    for number in range(2000):
        manager.status = str(number)
        manager.clock.advance(5)
    received = manager.received()
    assert 1 < len(received) < 2000
    manager.status = "again"
    manager.clock.advance(5)
    assert manager.received() == ["STATUS=again"]


def fill(manager: Manager) -> None:
    """Fill the manager's queue, as one does that hangs."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                other.sendto(b"STATUS=full", manager.socket.getsockname())


def test_what_a_manager_must_not_miss_waits_without_delaying_anything(manager: Manager) -> None:
    """While its queue is full, nothing waits here; with room again, all comes in its order."""
    fill(manager)
    began = time.monotonic()
    manager.notify.ready()
    with manager.notify.reloading():
        pass
    manager.status = "better"
    manager.clock.advance(1.0)
    assert time.monotonic() - began < 1.0
    assert set(manager.received()) == {"STATUS=full"}
    manager.clock.advance(0.1)
    assert manager.received() == [
        "READY=1\nSTATUS=fine",
        "RELOADING=1\nMONOTONIC_USEC=12500000",
        "READY=1\nSTATUS=fine",
    ]
    manager.clock.advance(4.0)
    assert manager.received() == ["STATUS=better"]


def test_a_manager_that_hangs_is_given_up(manager: Manager, logged: Listening) -> None:
    """After two seconds the message is gone; the log says so once."""
    fill(manager)
    manager.notify.ready()
    manager.clock.pump([0.1] * 30)
    assert set(manager.received()) == {"STATUS=full"}
    manager.clock.pump([0.1] * 30)
    assert manager.received() == []
    reports = [e for e in logged if "cannot be reached" in formatEvent(e)]
    assert len(reports) == 1


def test_a_status_can_be_sent_without_a_reactor(manager: Manager, address: str) -> None:
    """Of several lines it makes one, and what is too long for the manager is cut."""
    send_status({"NOTIFY_SOCKET": address}, "cannot start:\n no\tport")
    send_status({"NOTIFY_SOCKET": address}, "\N{EURO SIGN}" * 5000)
    assert manager.received() == [
        "STATUS=cannot start: no port",
        "STATUS=" + "\N{EURO SIGN}" * 1000,
    ]


def test_a_status_of_half_a_character_is_sent(manager: Manager, address: str) -> None:
    """A file's name may hold bytes that are no UTF-8."""
    send_status({"NOTIFY_SOCKET": address}, "no file \udcff")
    assert manager.received() == ["STATUS=no file ?"]


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "/nowhere"}])
def test_a_status_without_a_manager_is_no_error(environ: dict[str, str]) -> None:
    """Nobody hears it, and no descriptor stays open."""
    before = len(os.listdir("/proc/self/fd"))
    send_status(environ, "fine")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_status_that_a_full_manager_misses_delays_nothing(manager: Manager, address: str) -> None:
    """The process is about to end, and waits for nobody."""
    fill(manager)
    send_status({"NOTIFY_SOCKET": address}, "fine")
    assert set(manager.received()) == {"STATUS=full"}
