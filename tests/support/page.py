"""A page in a real browser, and the server that it is from and that it reports to."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "browser"
BUNDLER = PAGE / "node_modules" / ".bin" / "esbuild"
CHROMIUM = shutil.which("chromium")
WITHIN = 120.0
"""Seconds for a browser to start and to do its calls, on a busy machine."""

OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run")


class PageServer(ThreadingHTTPServer):
    """Serves one page, its script and its settings, and takes its report."""

    def __init__(self, script: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _PageHandler)
        self.config: dict[str, str] = {}
        self.script = script
        self.reports: queue.Queue[dict[str, Any]] = queue.Queue()

    @property
    def origin(self) -> str:
        """The page's origin."""
        return f"http://127.0.0.1:{self.server_port}"


class _PageHandler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        parts = {
            "/page.js": ("text/javascript", self.server.script),
            "/config": ("application/json", json.dumps(self.server.config).encode()),
        }
        page = b'<!doctype html><script type="module" src="/page.js"></script>'
        self._respond(*parts.get(self.path, ("text/html", page)))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._respond("text/plain", b"")
        self.server.reports.put(json.loads(body))

    def _respond(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(script: bytes) -> Iterator[PageServer]:
    """Run a page's server."""
    with PageServer(script) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def report_of(server: PageServer, folder: Path) -> dict[str, Any]:
    """Open the page in a browser; return what it reports.

    Args:
        folder: for the browser's profile.
    """
    profile = f"--user-data-dir={folder / 'profile'}"
    with subprocess.Popen(
        [str(CHROMIUM), *OPTIONS, profile, server.origin],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as browser:
        try:
            return server.reports.get(timeout=WITHIN)
        finally:
            browser.terminate()
