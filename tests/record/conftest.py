"""What the tests of records share: full disks, files, a collector, and what is logged."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from twisted.logger import ILogObserver, LogEvent, formatEvent, globalLogPublisher

from llmproxy.record.sinks import Sinks
from llmproxy.record.writer import Writer
from tests.support.collector import OtlpCollector
from tests.support.postgres import PostgresServer, postgres_server
from tests.support.records import trace

Disk = Callable[[int | None], None]


def write(to: Sinks | Writer, numbers: range) -> None:
    """Write a trace for each of these numbers."""
    for number in numbers:
        to.write(trace(number))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The paths of the trace file and the ledger, each in its own folder."""
    for name in ("log", "lib"):
        (tmp_path / name).mkdir()
    return tmp_path / "log" / "t", tmp_path / "lib" / "ledger"


@pytest.fixture
def collector() -> Iterator[OtlpCollector]:
    """A collector without TLS."""
    collector = OtlpCollector()
    yield collector
    collector.close()


@pytest.fixture
def disk() -> Iterator[Disk]:
    """Limit the size of every file of this process, in bytes; None is no limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system with room for 400 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The lines that are logged during the test."""
    lines: list[str] = []

    def observe(event: LogEvent) -> None:
        lines.append(formatEvent(event))

    observer = cast(ILogObserver, observe)
    globalLogPublisher.addObserver(observer)
    yield lines
    globalLogPublisher.removeObserver(observer)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server; who stops it starts it again."""
    with postgres_server() as server:
        yield server


@pytest.fixture
def database(postgres: PostgresServer) -> str:
    """The name of an empty database."""
    return postgres.database()
