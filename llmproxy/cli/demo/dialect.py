"""What the demo provider's dialects and their endpoints promise, and how they write.

An endpoint stands between the wire and ``response.py``: it reads a decoded body into a
:class:`~.response.Asked` and spells a :class:`~.response.Response`; its dialect has what all
endpoints of one provider share.  The shapes are those of the providers' published APIs, and are
written down here a second time on purpose: the demo provider must not share them with the proxy
that it stands behind.

This module knows no HTTP beyond status codes and header fields, no reactor and nothing else of the
program.
"""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar, NamedTuple

from llmproxy.cli.demo.response import Asked, BadAsk, Response

Clock = Callable[[], float]
"""Tells the seconds since 1970."""

Document = dict[str, object]
"""A JSON object on its way out."""

Fields = Sequence[tuple[bytes, bytes]]
"""Header fields, in order, names in lower case."""

RELEASED = 1735689600
"""The demo models' birthday, 2025-01-01, in seconds since 1970."""

REQUESTS_PER_MINUTE = 10000
"""The limit that the rate limit headers claim; nobody enforces it."""


class Event(NamedTuple):
    """One write on a stream, and how many tokens had to be made for it."""

    data: bytes
    tokens: int = 0


class Dialect(ABC):
    """One provider's shapes that its endpoints share: errors, header fields and models."""

    @abstractmethod
    def error(self, status: int, bad: BadAsk, request_id: str) -> Document:
        """An error of that status."""

    @abstractmethod
    def unknown_model(self, name: str) -> BadAsk:
        """The words with which this provider says that a model does not exist."""

    @abstractmethod
    def fields(self, request_id: str, remaining: int, clock: Clock) -> Fields:
        """The header fields such a provider adds; ``remaining`` requests are left this minute."""

    @abstractmethod
    def models(self) -> Document:
        """The list of models."""

    @abstractmethod
    def model(self, name: str) -> Document:
        """One model, as the list shows it."""


class Endpoint(ABC):
    """One path of a provider: requests in, answers in one piece out."""

    dialect: ClassVar[Dialect]
    """Whose path it is."""

    @abstractmethod
    def ask(self, body: dict[str, Any]) -> Asked:
        """Read the body of a request.

        Raises:
            BadAsk: a field is missing or of the wrong type.
        """

    @abstractmethod
    def document(self, response: Response, ask: Asked, clock: Clock) -> Document:
        """The response in one piece."""

    def work(self, response: Response, ask: Asked) -> int:
        """How many tokens' time the document takes; here as long as a stream would."""
        return response.made


class Streamed(Endpoint):
    """An endpoint that also streams, where ``ask.stream`` is true."""

    stream_type: ClassVar[bytes]
    """The content type of a stream."""

    @abstractmethod
    def events(self, response: Response, ask: Asked, clock: Clock) -> Iterator[Event]:
        """The events of a stream, each a whole one, to the dialect's own end marker.

        Where the response has a ``failure``, the dialect's own error event is the last.
        """


def json_bytes(value: object) -> bytes:
    """Compact JSON in UTF-8; half a surrogate pair becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def sse(data: bytes) -> bytes:
    """One SSE event without a name."""
    return b"data: %s\n\n" % data


def new_id(prefix: str) -> str:
    """A random id as providers write them."""
    return prefix + secrets.token_hex(12)


def rfc3339(seconds: float) -> str:
    """A time in UTC, from seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
