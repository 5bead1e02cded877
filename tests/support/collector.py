"""A stand-in for an OpenTelemetry collector, on a real socket."""

from __future__ import annotations

import http.server
import json
import ssl
import threading
from typing import Any

from llmproxy.config import Url
from tests.support.sockets import WAIT


class OtlpCollector:
    """A collector on a real socket, whose responses the test decides.

    Attributes:
        status: of its responses, and their ``body``.
        hang: a response waits for this, where it is set.
        requests: path, fields and decoded body of each request.
    """

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.status = 200
        self.body = b"{}"
        self.hang: threading.Event | None = None
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.serve(self)

            def log_message(self, *_: object) -> None:
                """It says nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        scheme = "http" if context is None else "https"
        self.url = Url(scheme=scheme, host="localhost", port=self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def serve(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        """Take one request, and respond as the test says."""
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        self.requests.append((handler.path, dict(handler.headers), body))
        if self.hang is not None:
            self.hang.wait(WAIT)
        handler.send_response(self.status)
        handler.end_headers()
        handler.wfile.write(self.body)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(WAIT)

    def spans(self) -> list[dict[str, Any]]:
        """Return every span that it was sent."""
        return [
            span
            for _, _, body in self.requests
            for span in body["resourceSpans"][0]["scopeSpans"][0]["spans"]
        ]
