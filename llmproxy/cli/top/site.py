"""The admin site of a daemon, as ``llmproxy top`` asks it: over TCP or a Unix socket.

What cannot be had is a :class:`SiteError`, whose text says what to do.  Nothing here knows how a
state is shown.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

DEFAULT = "http://127.0.0.1:9080"

_SLOW_S = 15.0
"""Seconds for which an answer, or a state that is due, may be late; then the daemon is gone."""

State = dict[str, Any]
"""What ``/events`` sends: docs/admin-api.json has it."""


class SiteError(Exception):
    """The site does not answer, or refuses."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP through a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Site:
    """One admin site.

    Args:
        url: ``http://HOST:PORT``, or ``unix:PATH``.
        token: the admin token, where something may be changed.

    Raises:
        SiteError: the URL is no such thing.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._token = token
        self._path = url.removeprefix("unix:") if url.startswith("unix:") else None
        self._host = "localhost" if self._path is not None else _host_of(url)

    def follow(self, query: Mapping[str, str]) -> Follower:
        """Begin to follow the states of a window.

        Raises:
            SiteError: it cannot be followed.
        """
        connection, response = self._ask("GET", f"/events?{urlencode(query)}")
        if connection.sock is not None and query.get("every", "").isdecimal():
            connection.sock.settimeout(_SLOW_S + int(query["every"]))
        kind = response.headers.get_content_type()
        if kind != "text/event-stream":
            connection.close()
            raise SiteError(f"{self.url}: {kind} instead of events: is it an admin site?")
        return Follower(self, connection, response)

    def end_stream(self, name: str) -> None:
        """End a request.

        Raises:
            SiteError: it was not ended.
        """
        fields = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        connection, _ = self._ask("DELETE", f"/streams/{quote(name, safe='')}", fields)
        connection.close()

    def _ask(
        self, method: str, target: str, fields: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection: http.client.HTTPConnection
        if self._path is not None:
            connection = _UnixConnection(self._path, _SLOW_S)
        else:
            connection = http.client.HTTPConnection(self._host, timeout=_SLOW_S)
        try:
            connection.request(method, target, headers=dict(fields))
            response = connection.getresponse()
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            raise SiteError(f"{self.url}: {_words(error)}") from None
        if response.status != 200:
            said = _message(response)
            connection.close()
            if response.status == 404 and method == "GET":
                said += " Is this the listener of the whole admin site (`listen` in [admin])?"
            raise SiteError(f"{self.url}: {response.status}: {said}")
        return connection, response


class Follower:
    """The states of one window, as they come."""

    def __init__(
        self,
        site: Site,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
    ) -> None:
        self._site = site
        self._connection = connection
        self._response = response

    def states(self) -> Iterator[State]:
        """Yield each state.

        Raises:
            SiteError: the connection has ended.
        """
        try:
            while line := self._response.readline(1 << 24):
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise SiteError(f"{self._site.url}: {_words(error)}") from None
        raise SiteError(f"{self._site.url}: the daemon has closed the connection")

    def stop(self) -> None:
        """Let :meth:`states` end, which another thread may be in."""
        if (sock := self._connection.sock) is not None:
            with suppress(OSError):  # it has ended already
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Follow no more."""
        self._connection.close()


def _host_of(url: str) -> str:
    """Return the host and port of a URL.

    Raises:
        SiteError: the URL is no such thing.
    """
    with suppress(ValueError):  # no address, or no port
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname and parts.port != 0:
            return parts.netloc
    raise SiteError(f"{url}: expected http://HOST:PORT or unix:PATH")


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _message(response: http.client.HTTPResponse) -> str:
    """Return what an error says."""
    try:
        said = json.loads(response.read(65536))["error"]["message"]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
        return response.reason
    return str(said)
