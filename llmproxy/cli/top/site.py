"""The admin site of a daemon, as ``llmproxy top`` asks it: over TCP or a Unix socket.

What cannot be had is a :class:`SiteError`, whose text says what to do.  Nothing here knows how a
state is shown.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import NamedTuple, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from llmproxy.config.endpoints import socket_path

DEFAULT = "http://127.0.0.1:9080"

_SLOW_S = 15.0
"""Seconds for which an answer, or a state that is due, may be late; then the daemon is gone."""

_SECONDS = re.compile("[1-9][0-9]{0,5}", re.ASCII)
_MOST_RETRY_S = 60

_Form = TypeVar("_Form")


class SiteError(Exception):
    """The site does not answer, or refuses.

    Args:
        text: what is wrong, and what can be done.
        retry_s: seconds after which the site wants to be asked again; None where it says nothing.
    """

    def __init__(self, text: str, retry_s: int | None = None) -> None:
        super().__init__(text)
        self.retry_s = retry_s


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
        url: ``http://HOST:PORT``, or ``unix:PATH``; options behind the path, which ``listen`` of
            the configuration may have, are for the daemon.
        token: the admin token, where something may be changed.

    Raises:
        SiteError: the URL is no such thing.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._token = token
        self._path = socket_path(url)
        self._host = "localhost" if self._path else _host_of(url)

    def follow(self, query: Mapping[str, str]) -> Follower:
        """Begin to follow the states of a window.

        Raises:
            SiteError: it cannot be followed.
        """
        followed = self._ask("GET", f"/events?{urlencode(query)}")
        if query.get("every", "").isdecimal():
            followed.sock.settimeout(_SLOW_S + int(query["every"]))
        kind = followed.response.headers.get_content_type()
        if kind != "text/event-stream":
            followed.close()
            raise SiteError(f"{self.url}: {kind} instead of events: is it an admin site?")
        return Follower(self.url, followed)

    def end_stream(self, name: str) -> None:
        """End a request.

        Raises:
            SiteError: it was not ended.
        """
        fields = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        self._ask("DELETE", f"/streams/{quote(name, safe='')}", fields).close()

    def _ask(
        self, method: str, target: str, fields: Mapping[str, str] = MappingProxyType({})
    ) -> _Response:
        connection: http.client.HTTPConnection
        if self._path:
            connection = _UnixConnection(self._path, _SLOW_S)
        else:
            connection = http.client.HTTPConnection(self._host, timeout=_SLOW_S)
        try:
            connection.request(method, target, headers=dict(fields))
            # ``getresponse`` forgets the socket where the server wants to close it.
            sock = connection.sock
            found = _Response(connection, connection.getresponse(), sock)
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            raise SiteError(f"{self.url}: {_words(error)}") from None
        if found.response.status != 200:
            raise self._refusal(method, found)
        return found

    def _refusal(self, method: str, found: _Response) -> SiteError:
        """Return what a refusal says, and what can be done; the response is closed."""
        status, said = found.response.status, _message(found.response)
        found.close()
        if status == 404 and method == "GET":
            said += " Is this the listener of the whole admin site (`listen` in [admin])?"
        if status == 421:
            said = (
                f"the site refuses {self._host} in the Host field: use an address in "
                "the URL, or add the name to `hosts` in [admin]"
            )
        after = found.response.headers.get("retry-after", "") if status == 503 else ""
        retry_s = min(int(after), _MOST_RETRY_S) if _SECONDS.fullmatch(after) else None
        return SiteError(f"{self.url}: {status}: {said}", retry_s)


class _Response(NamedTuple):
    """A response whose body is not read, and what it comes through."""

    connection: http.client.HTTPConnection
    response: http.client.HTTPResponse
    sock: socket.socket

    def close(self) -> None:
        """Read no more of it."""
        self.response.close()
        self.connection.close()


class Follower:
    """The states of one window, as they come.

    Args:
        url: of the site.
        followed: the response that has them.
    """

    def __init__(self, url: str, followed: _Response) -> None:
        self._url = url
        self._followed = followed

    def states(self, form: type[_Form]) -> Iterator[_Form]:
        """Yield each state.

        Args:
            form: what a state is decoded into.  docs/admin-api.json has what ``/events`` sends.

        Raises:
            SiteError: the connection has ended, or a state has another form.
        """
        decoder = msgspec.json.Decoder(form)
        try:
            while line := self._followed.response.readline(1 << 24):
                if line.startswith(b"data: "):
                    yield decoder.decode(line[6:])
        except msgspec.DecodeError as error:
            text = f"{self._url}: the site speaks another form, is it of another version? {error}"
            raise SiteError(text) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise SiteError(f"{self._url}: {_words(error)}") from None
        raise SiteError(f"{self._url}: the daemon has closed the connection")

    def stop(self) -> None:
        """Let :meth:`states` end, which another thread may be in."""
        with suppress(OSError):  # it has ended already
            self._followed.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Follow no more."""
        self._followed.close()


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
