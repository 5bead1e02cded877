"""The demo provider for tests: a child process, on a port of its own choice."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Self

from tests.support.daemon import ROOT
from tests.support.sockets import WAIT

# It ends with its standard input, so that it outlives nobody who was killed.
_PROGRAM = """\
import sys
from twisted.internet import reactor, stdio
from twisted.internet.protocol import Protocol
from llmproxy.cli.demo import PromptCache, demo_site
from llmproxy.cli.demo.replay import read_capsule

class UntilTheEnd(Protocol):
    def connectionLost(self, reason):
        if reactor.running:
            reactor.stop()

cache = PromptCache(reactor.seconds) if sys.argv[2] == "caching" else None
capsule = read_capsule(sys.argv[3].encode()) if sys.argv[3] else None
site = demo_site(reactor, cache=cache, capsule=capsule)
port = reactor.listenTCP(int(sys.argv[1]), site, interface="127.0.0.1")
stdio.StandardIO(UntilTheEnd())
print(port.getHost().port, flush=True)
reactor.run()
"""


class Demo:
    """A spawned demo provider; leaving the context ends it.

    Args:
        port: where it is to listen; 0: where the kernel chooses.
        caching: it has a prompt cache.
        capsule: what its model ``demo-replay`` plays, in JSON.

    Attributes:
        port: where it listens, on loopback.
        errors: what it wrote to standard error, once it has ended.
    """

    def __init__(self, *, port: int = 0, caching: bool = False, capsule: str = "") -> None:
        self.port = port
        self._arguments = ["caching" if caching else "plain", capsule]
        self.errors = ""

    @property
    def url(self) -> str:
        """Where it is reached."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(self.port), *self._arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the demo provider did not start: {self._end()}")
        self.port = int(line)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.errors = self._end()
        if kind is None:
            assert not self.errors, self.errors
            assert self.process.returncode == 0

    def _end(self) -> str:
        """Close its standard input and wait; return what it wrote to standard error."""
        try:
            _, errors = self.process.communicate(timeout=WAIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        return errors
