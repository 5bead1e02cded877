"""A hop with a limit in front of the daemon, and ``llmproxy doctor timeouts``, which finds it."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.daemon import environment
from tests.support.hops import hop, is_installed
from tests.support.live_proxy import ONE_ROUTE, assert_settles, begin, open_live_proxy, until
from tests.support.scripts import SSE, event
from tests.support.sockets import chunked, connect

_CUTS = 6


def test_nginx_s_read_timeout_is_found(tmp_path: Path) -> None:
    """It cuts streams in a silence; the ledger has the time to a tenth of a second, and who."""
    if not is_installed("nginx"):
        pytest.skip("nginx is not installed")
    ledger = tmp_path / "ledger.sqlite3"
    with ExitStack() as stack:
        trace = f'ledger = "{ledger}"\n'  # what stands before it ends with [trace]
        live = stack.enter_context(open_live_proxy(tmp_path, trace + ONE_ROUTE))
        lines = ("proxy_http_version 1.1;", "proxy_buffering off;", "proxy_read_timeout 1500ms;")
        port = stack.enter_context(hop("nginx", live.daemon.port, *lines))
        live.hold(SSE, chunked(event(0)))
        clients = [begin(connect(port), "/p/v1/chat/completions") for _ in range(_CUTS)]
        for client in clients:
            client.wait_closed()
            client.close()
        assert_settles(live.daemon)
        command = [str(Path(sys.executable).parent / "llmproxy"), "doctor", "timeouts", str(ledger)]

        def said() -> str:
            done = subprocess.run(
                command, env=environment(), capture_output=True, text=True, check=True, timeout=60
            )
            return done.stdout if f"{_CUTS} of {_CUTS}" in done.stdout else ""

        words = until(said, "the ledger has them all")
    assert (
        f"{_CUTS} of {_CUTS} cuts came 1.5 s after the last byte, from the client's side" in words
    )
