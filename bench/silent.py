"""What idle, half-said and slow clients cost the daemon, and when it ends them.

Opens thousands of loopback connections to a daemon of its own and measures the daemon's memory
(PSS: its own pages, and its share of those that it shares) before them, with all of them open, and
after the last one is gone.  Four kinds of client (``--mode``):

``silent``
    connects, and says nothing: closed after ``client_idle``.
``half-head``
    sends half a request's head: told 408 after ``request_head``.
``slow-reader``
    asks for an endless response and takes some KiB of it now and then: lives for as long as it is
    wanted (``--hold``), and none may be cut.
``stuck-reader``
    asks for the same, and takes nothing: cut after ``client_stall``, which counts from when the
    kernels between have taken what they take.

The provider behind the readers is a process of its own, so that the memory is the daemon's alone.
What the kernel holds for sockets is in nobody's PSS.  Exits with 1 where something is not as said
above, or the daemon logged an error.  Standard library only::

    python bench/silent.py --mode silent --count 10000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
MODES = ("silent", "half-head", "slow-reader", "stuck-reader")
COUNTS = {"silent": 10_000, "half-head": 10_000, "slow-reader": 1_000, "stuck-reader": 1_000}

PER_ADDRESS = 4000
"""Connections from one source address: far less than there are ephemeral ports."""

SLACK = 15.0
"""Seconds beside a deadline after which a connection that is still there counts as forgotten."""

WAIT = 30.0
"""Seconds that anything may take which has no deadline of the daemon's."""

STEP = 8192
PAUSE = 0.2
"""A slow reader takes so many bytes, and so many seconds later the next.

Two kernels tell the daemon of it in steps of 64 KiB and more, so ``client_stall`` must not be
shorter than some of those.
"""

READ_BUFFER = 16_384
"""Bytes of a reader's own receive buffer."""

HALF = b"GET /p/x HTTP/1.1\r\nHost: proxy\r\nX-Half: "
WHOLE = b"GET /p/x HTTP/1.1\r\nHost: proxy\r\n\r\n"

CONFIG = """\
[proxy]
listen = ["tcp:0:interface=127.0.0.1:backlog=4096"]
anonymous = true
{proxy}
[admin]
listen = "tcp:0:interface=127.0.0.1"
[trace]
jsonl = "{trace}"
[timeouts]
request_head = "{head}s"
client_idle = "{idle}s"
client_stall = "{stall}s"
[providers.p]
url = "http://127.0.0.1:{provider}"
dialect = "raw"
[[routes]]
path = "/p"
providers = ["p"]
"""

# -- the daemon -----------------------------------------------------------------------------------


class Daemon:
    """A running daemon.

    Args:
        process: it.
        log: the file with its log, in JSON lines.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self.port = self._port("proxy")
        self._admin = self._port("admin")

    def lines(self) -> list[dict[str, Any]]:
        """Return its log so far."""
        whole = self._log.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def _port(self, site: str) -> int:
        def found() -> int:
            if self._process.poll() is not None:
                raise SystemExit(f"the daemon ended with {self._process.returncode}")
            for line in self.lines():
                if "listens" in line["message"] and line.get("site") == site:
                    return int(line["port"])
            return 0

        return int(until(found, f"the {site} site listens"))

    def gauge(self, name: str) -> float:
        """Return a metric that has no labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._admin}/metrics", timeout=WAIT) as got:
            for line in got.read().decode().splitlines():
                if line.startswith(f"llmproxy_{name} "):
                    return float(line.split()[1])
        raise KeyError(name)

    def pss(self) -> float:
        """Return its proportional set size, in MiB."""
        for line in Path(f"/proc/{self._process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
        raise KeyError("Pss")


@contextmanager
def running(command: list[str], config: str, folder: Path) -> Iterator[Daemon]:
    """Run a daemon; ``command`` is followed by ``--config FILE``."""
    path, log = folder / "llmproxy.toml", folder / "log.jsonl"
    path.write_text(config)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--config", str(path)], cwd=folder, env=environ, stdout=out
        )
    try:
        yield Daemon(process, log)
    finally:
        for _ in range(2):  # the second signal cuts what still runs
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(WAIT)
        process.kill()
        process.wait()


# -- the provider ---------------------------------------------------------------------------------


async def provide() -> None:
    """Answer everybody without end; says its port, and lives for as long as its standard input."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        writer.close()

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    listener.bind(("127.0.0.1", 0))
    await asyncio.start_server(serve, sock=listener, backlog=4096)
    print(listener.getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


@contextmanager
def provider() -> Iterator[int]:
    """Run the provider in a process of its own; its port."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--provide"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()


# -- the clients ----------------------------------------------------------------------------------


class Client:
    """One connection.

    Attributes:
        opened: when it was, in monotonic seconds.
        lasted: seconds until the daemon ended it; 0 while it lives.
        got: what it was told, its first bytes.
    """

    __slots__ = ("got", "lasted", "opened", "sock")

    def __init__(self, number: int, port: int, said: bytes, *, buffer: int) -> None:
        self.sock = socket.socket()
        # The port is chosen when the peer is known, so that a port may serve for several addresses.
        self.sock.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
        if buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.sock.bind((f"127.0.0.{2 + number // PER_ADDRESS}", 0))
        self.sock.settimeout(WAIT)
        self.sock.connect(("127.0.0.1", port))
        self.opened = time.monotonic()
        self.sock.sendall(said)
        self.sock.setblocking(False)
        self.lasted = 0.0
        self.got = b""

    def take(self, count: int) -> bool:
        """Take so many bytes at most; return whether the connection is still there."""
        try:
            data = self.sock.recv(count)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        if len(self.got) < 1000:
            self.got += data
        return bool(data)

    def ended(self) -> None:
        """The daemon has ended it."""
        self.lasted = time.monotonic() - self.opened
        self.sock.close()


_BIND_ADDRESS_NO_PORT = 24
"""linux/in.h; the socket module has no name for it."""


class Crowd:
    """All connections of one run."""

    def __init__(self) -> None:
        self.all: list[Client] = []
        self._open: dict[int, Client] = {}
        self._poll = select.epoll()

    def open(self, count: int, port: int, said: bytes, *, reads: bool, buffer: int = 0) -> None:
        """Open so many, each of which says something, and takes what it is told or does not."""
        wanted = select.EPOLLIN if reads else select.EPOLLRDHUP
        for number in range(count):
            client = Client(number, port, said, buffer=buffer)
            self.all.append(client)
            self._open[client.sock.fileno()] = client
            self._poll.register(client.sock.fileno(), wanted)

    def __len__(self) -> int:
        return len(self._open)

    def look(self, seconds: float) -> None:
        """Wait for ends, and for things to read, at most so long."""
        for number, what in self._poll.poll(seconds, 4096):
            client = self._open[number]
            is_over = what & (select.EPOLLERR | select.EPOLLHUP | select.EPOLLRDHUP)
            # What it was told comes before the end.
            if what & select.EPOLLIN:
                is_over = not client.take(4096)
            if is_over:
                self._end(number)

    def wait_ended(self, seconds: float) -> None:
        """Wait until the last one is ended, at most so long."""
        over = time.monotonic() + seconds
        while self._open and time.monotonic() < over:
            self.look(0.1)

    def read_slowly(self, seconds: float) -> None:
        """Let each take a little now and then, for so long."""
        over = time.monotonic() + seconds
        while time.monotonic() < over:
            began = time.monotonic()
            for number, client in list(self._open.items()):
                if not client.take(STEP):
                    self._end(number)
            time.sleep(max(0.0, began + PAUSE - time.monotonic()))

    def leave(self) -> None:
        """Close those that are still there, from this side."""
        for client in self._open.values():
            client.sock.close()
        self._open.clear()

    def _end(self, number: int) -> None:
        self._poll.unregister(number)
        self._open.pop(number).ended()


# -- one run --------------------------------------------------------------------------------------


class Figures(NamedTuple):
    """What one run showed: memory in MiB, times in seconds, and what was not as it must be."""

    mode: str
    connections: int
    opening_s: float
    before: float
    at: float
    after: float
    last_s: float
    deadline: str
    problems: list[str]

    @property
    def each(self) -> float:
        """KiB for each connection."""
        return (self.at - self.before) * 1024 / self.connections


def until(condition: Callable[[], Any], what: str, seconds: float = WAIT) -> Any:
    """Wait until ``condition`` returns something true, and return that."""
    over = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > over:
            raise SystemExit(f"not within {seconds} s: {what}")
        time.sleep(0.05)
    return found


def run(mode: str, count: int, args: argparse.Namespace) -> Figures:
    """Run one mode against a daemon of its own."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmproxy-silent-")))
        is_reader = mode.endswith("reader")
        config = CONFIG.format(
            trace=folder / "trace.jsonl",
            head=args.request_head,
            idle=args.client_idle,
            stall=args.client_stall,
            provider=stack.enter_context(provider()) if is_reader else 9,
            proxy=f"max_connections = {args.max_connections}" if args.max_connections else "",
        )
        daemon = stack.enter_context(running(args.daemon, config, folder))
        if is_reader:
            _warm_up(daemon)
        return _measure(daemon, mode, count, args)


def _warm_up(daemon: Daemon) -> None:
    """Let what is loaded with the first request be there before anything is measured."""
    client = Client(0, daemon.port, WHOLE, buffer=0)
    until(lambda: client.take(100) and client.got, "the provider answers")
    client.sock.close()
    until(lambda: daemon.gauge("client_connections") == 0, "the first one is gone")


def _measure(daemon: Daemon, mode: str, count: int, args: argparse.Namespace) -> Figures:
    crowd = Crowd()
    daemon.gauge("client_connections")
    before = daemon.pss()
    began = time.monotonic()
    is_reader = mode.endswith("reader")
    said = {"silent": b"", "half-head": HALF}.get(mode, WHOLE)
    buffer = READ_BUFFER if is_reader else 0
    crowd.open(count, daemon.port, said, reads=not is_reader, buffer=buffer)
    opening = time.monotonic() - began
    problems = []

    # A stuck reader is at its dearest once all on the way to it is full.
    gauge = {"slow-reader": "active_streams", "stuck-reader": "paused_streams"}.get(
        mode, "client_connections"
    )
    until(lambda: daemon.gauge(gauge) >= count, f"{count} at once; is a deadline too short?")
    if mode == "slow-reader":
        crowd.read_slowly(args.hold)
    at = daemon.pss()
    if is_reader:
        held = daemon.gauge("buffered_bytes") / count
        problems += [f"{held:.0f} bytes held for each"] if held > 128 * 1024 else []
    if mode == "slow-reader":
        deadline = f"- (held {args.hold:g})"
        problems += [f"{count - len(crowd)} were cut"] if len(crowd) < count else []
        left = time.monotonic()
        crowd.leave()
        until(lambda: daemon.gauge("client_connections") == 0, "they are gone")
        last = time.monotonic() - left
    else:
        seconds = {"silent": args.client_idle, "half-head": args.request_head}
        limit = seconds.get(mode, args.client_stall)
        deadline = f"{limit:g}"
        crowd.wait_ended(limit + SLACK)
        problems += [f"{len(crowd)} were forgotten"] if crowd else []
        last = max(client.lasted for client in crowd.all)
        problems += _untold(mode, crowd)
        crowd.leave()
        until(lambda: daemon.gauge("client_connections") == 0, "they are gone")
    time.sleep(1.0)
    after = daemon.pss()
    errors = [line for line in daemon.lines() if line["level"] in ("error", "critical")]
    problems += [f"{len(errors)} errors logged, first {errors[0]}"] if errors else []
    return Figures(mode, count, opening, before, at, after, last, deadline, problems)


def _untold(mode: str, crowd: Crowd) -> list[str]:
    """Say how many were not told what they must be told."""
    if mode == "half-head":
        told = sum(
            one.got.startswith(b"HTTP/1.1 408") and b"slow_request" in one.got for one in crowd.all
        )
        return [f"{len(crowd.all) - told} were not told 408"] if told < len(crowd.all) else []
    talked = sum(bool(one.got) for one in crowd.all)
    return [f"{talked} were told something"] if talked else []


HEADINGS = (
    "mode",
    "connections",
    "opened in s",
    "before MiB",
    "at MiB",
    "after MiB",
    "KiB each",
    "last ended s",
    "deadline s",
)


def show(found: list[Figures]) -> None:
    """Print a table."""
    rows = [HEADINGS] + [
        (
            one.mode,
            f"{one.connections}",
            f"{one.opening_s:.1f}",
            f"{one.before:.1f}",
            f"{one.at:.1f}",
            f"{one.after:.1f}",
            f"{one.each:.1f}",
            f"{one.last_s:.1f}",
            one.deadline,
        )
        for one in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    for one in found:
        for problem in one.problems:
            print(f"{one.mode}: {problem}")


def main() -> int:
    """Run what was asked for."""
    if sys.argv[1:] == ["--provide"]:
        asyncio.run(provide())
        return 0
    twistd = f"{shlex.quote(str(Path(sys.executable).parent / 'twistd'))} -n --pidfile= llmproxy"
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--mode", choices=(*MODES, "all"), default="silent", help="default: silent")
    add("--count", type=int, help="connections; default: 10000, of readers 1000")
    add("--daemon", type=shlex.split, default=shlex.split(twistd), metavar="COMMAND",
        help=f"followed by --config FILE; default: {twistd}")  # fmt: skip
    add("--request-head", type=float, default=20.0, metavar="S", help="seconds; default: 20")
    add("--client-idle", type=float, default=20.0, metavar="S", help="seconds; default: 20")
    add("--client-stall", type=float, default=20.0, metavar="S", help="seconds; default: 20")
    add("--hold", type=float, default=45.0, metavar="S", help="of slow readers; default: 45")
    add("--max-connections", type=int, help="by default the daemon's own default")
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    modes = MODES if args.mode == "all" else (args.mode,)
    found = [run(mode, args.count or COUNTS[mode], args) for mode in modes]
    show(found)
    return 1 if any(one.problems for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
