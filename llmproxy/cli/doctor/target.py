"""What is asked: a URL, and the requests that the doctor sends to it.

There are three kinds of far end.  A *paced* stream is llmproxy's own (``/-/pace``): each of its
events says when it was sent, and its query makes it fall silent or break off.  A *call* is a real
request of a dialect, to the base URL that an SDK would be given.  Everything else is a URL that is
fetched as it stands.  Nothing here opens a socket.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlencode

import msgspec

from llmproxy.config.url import Url
from llmproxy.config.url import url as read_url
from llmproxy.config.values import Wrong
from llmproxy.dialects.dialect import Dialect
from llmproxy.version import version

PACE_PATH = "/-/pace"
"""Where llmproxy has its paced stream, below whatever prefix a hop has put before it."""

PACE = {"n": "20", "interval_ms": "250", "bytes": "200", "format": "sse"}
"""What is asked of a paced stream where the URL does not say otherwise: five seconds."""

DIALECTS = (Dialect.OPENAI, Dialect.ANTHROPIC, Dialect.OLLAMA)
"""The dialects in which a call can be made."""

_PROMPT = "Count from 1 to 60, each number in words and on a line of its own."
_QUERY = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/?]|%[0-9A-Fa-f]{2})*")
_MOST_TOKENS = 600
_ENDPOINTS = {
    Dialect.OPENAI: "/chat/completions",
    Dialect.ANTHROPIC: "/v1/messages",
    Dialect.OLLAMA: "/api/chat",
}


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One URL, and what is sent to it.

    Attributes:
        url: whose host is asked; its path is not looked at.
        path: of the request, as it was given.
        query: of the request, without the question mark; may be empty.
        body: of a call, else empty.
        dialect: of a call, else None.
        key: what shows who calls, or None.
        direct: the URL is the provider itself, which is asked without any hop.
    """

    url: Url
    path: str
    query: str = ""
    body: bytes = b""
    dialect: Dialect | None = None
    key: str | None = None
    direct: bool = False

    def __str__(self) -> str:
        """Return the URL, without a query: it may hold a key."""
        return f"{self.url.scheme}://{self.url.netloc}{self.path}"

    @property
    def is_paced(self) -> bool:
        """Whether the URL is that of a paced stream."""
        return self.dialect is None and self.path.endswith(PACE_PATH)

    def request(self, encoding: str, pace: Mapping[str, object] | None = None) -> bytes:
        """Return the request as it goes on the wire.

        Args:
            encoding: what ``Accept-Encoding`` says.
            pace: what the query of a paced stream says besides, or instead.
        """
        query = self.query
        if pace:
            asked = dict(parse_qsl(query))
            if "ended" in pace:  # it asks about a stream, and for none
                asked = {name: value for name, value in asked.items() if name not in PACE}
            query = urlencode(asked | {name: str(value) for name, value in pace.items()})
        target = self.path + (f"?{query}" if query else "")
        lines = [
            f"{'POST' if self.body else 'GET'} {target} HTTP/1.1",
            f"Host: {self.url.netloc}",
            f"User-Agent: llmproxy-doctor/{version()}",
            f"Accept: {'application/json' if self.body else 'text/event-stream, */*'}",
            f"Accept-Encoding: {encoding}",
            *self._key_lines(),
        ]
        if self.body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(self.body)}"]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.body

    def _key_lines(self) -> list[str]:
        lines = ["anthropic-version: 2023-06-01"] if self.dialect is Dialect.ANTHROPIC else []
        if self.key is not None and self.dialect is Dialect.ANTHROPIC:
            lines.append(f"x-api-key: {self.key}")
        elif self.key is not None:
            lines.append(f"Authorization: Bearer {self.key}")
        return lines


def target(
    word: str,
    *,
    dialect: Dialect | None = None,
    model: str | None = None,
    key: str | None = None,
    direct: bool = False,
) -> Target:
    """Return what a URL of the command line means.

    Args:
        word: the URL.  With a dialect it is the base URL that an SDK is given, or the endpoint's
            own.  Without one, a URL that has no path is that of llmproxy's paced stream.
        dialect: of the call, or None.
        model: that the call names; needed with a dialect.
        key: see :class:`Target`.
        direct: see :class:`Target`.

    Raises:
        Wrong: it is no such URL.
    """
    address, mark, query = word.partition("?")
    url = read_url(address)
    if not _QUERY.fullmatch(query):
        raise Wrong("a URL whose query is visible ASCII, with %XX for all else", hidden=True)
    path = url.path
    if dialect is not None:
        ending = _ENDPOINTS[dialect]
        path = path if path.endswith(ending) else path + ending
        body = _call(dialect, model or "")
        return Target(
            url=url, path=path, query=query, body=body, dialect=dialect, key=key, direct=direct
        )
    if not path and not mark:
        if direct:
            raise Wrong("the URL of a stream, with its path, or --dialect")
        path = PACE_PATH
    elif address.endswith("/") or not path:
        path += "/"
    found = Target(url=url, path=path, query=query, key=key, direct=direct)
    if found.is_paced:
        asked = urlencode(PACE | dict(parse_qsl(query)))
        return msgspec.structs.replace(found, query=asked)
    return found


def _call(dialect: Dialect, model: str) -> bytes:
    """Return the body of a request that is answered by a stream of some length."""
    said: dict[str, object] = {
        "model": model,
        "stream": True,
        "messages": [{"role": "user", "content": _PROMPT}],
    }
    if dialect is Dialect.ANTHROPIC:
        said["max_tokens"] = _MOST_TOKENS
    return json.dumps(said).encode()
