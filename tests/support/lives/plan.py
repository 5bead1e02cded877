"""The plan of one life of a client, made before it begins.

A :class:`Life` is one connection to the proxy: what it asks, how far it gets, and how it leaves.
Each :class:`RequestFacts` carries the provider's :class:`Part`, since both sides are drawn
together.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

KEY = "the-key-of-every-honest-life"
BODY_LIMIT = 512 * 1024
"""Most bytes of a request body, in the proxy's configuration."""


MALFORMED = "malformed"
"""The flaw of a request whose head is not HTTP."""


class Kind(StrEnum):
    """How the provider plays its part."""

    WHOLE = "whole"
    EXTRA = "extra"  # whole, with bytes behind it that nobody asked for
    EARLY = "early"  # whole, before the request is
    SILENT = "silent"  # no head, ever
    DROPPED = "dropped"  # the connection ends before the head does
    GARBLED = "garbled"  # a head that is not HTTP
    SHORT = "short"  # the connection ends inside the body
    BAD_CHUNK = "bad_chunk"  # the body's framing is no framing
    HANGING = "hanging"  # silence inside the body
    GONE = "gone"  # nobody listens there
    UNTRUSTED = "untrusted"  # a certificate that nobody vouches for
    MUTE = "mute"  # takes the connection, and never speaks TLS


BROKEN_BODY = (Kind.SHORT, Kind.BAD_CHUNK, Kind.HANGING)
"""The parts that begin a response and do not end it."""


class Departure(StrEnum):
    """How a client leaves."""

    CLOSE = "close"
    HALF_CLOSE = "half_close"
    RESET = "reset"
    WAIT = "wait"  # sends no more, and reads until the proxy ends it
    PAUSE = "pause"  # stops reading for a while, then goes on
    PAUSE_CLOSE = "pause_close"
    PAUSE_RESET = "pause_reset"


class Moment(StrEnum):
    """When a client leaves."""

    CONNECTED = "connected"
    HEAD = "head"  # after some bytes of its request's head
    BODY = "body"  # after some bytes of its request's body
    WAITING = "waiting"  # the request is out
    RESPONSE = "response"  # after some bytes of the response
    END = "end"  # the response is whole


class Part(NamedTuple):
    """The provider's part in one request.

    Attributes:
        framing: ``length``, ``chunked`` or ``close``.
        size: bytes of the whole content.
        cut: bytes of the content that go out before the fault; of the head, where it is dropped.
        pieces: in how many the content goes out, ``gap`` seconds apart.
        interim: how many 1xx responses go before.
        abrupt: a RST where it would be a FIN.
        closes: it says that the connection ends with the response.
        deserts: the connection ends with the response, and nothing had said so.
        variant: which of several, where there are several.
    """

    kind: Kind
    status: int = 200
    media: str = "application/json"
    framing: str = "length"
    size: int = 0
    cut: int = 0
    pieces: int = 1
    gap: float = 0.0
    interim: int = 0
    abrupt: bool = False
    closes: bool = False
    deserts: bool = False
    variant: int = 0


class RequestFacts(NamedTuple):
    """One request.

    Attributes:
        flaw: why the proxy refuses it, or nothing.
        media: of the body, which decides whether the proxy holds or streams it.
        framing: ``length``, ``chunked``, or nothing where there is no body.
        size: bytes of the body.
        cuts: parts of the whole at which sending takes a breath.
        variant: which of several, where there are several.
        known: it asks an endpoint whose responses are read, so that the tap is on.
    """

    method: str
    version: str
    route: str
    part: Part
    flaw: str = ""
    media: str = ""
    framing: str = ""
    size: int = 0
    expects: bool = False
    closes: bool = False
    cuts: tuple[float, ...] = ()
    variant: int = 0
    known: bool = False


class Leave(NamedTuple):
    """When and how a client leaves.

    Attributes:
        ask: in which of its requests.
        share: how far into what the moment speaks of, 0 to 1.
        pause: seconds without reading.
    """

    ask: int
    moment: Moment
    way: Departure
    share: float
    pause: float = 0.0


class Life(NamedTuple):
    """One client connection.

    Attributes:
        secure: through the TLS listener.
        pipelined: every request goes out at once.
        patient: at the end it waits for the proxy to close.
        narrow: its kernel takes only a little.
    """

    number: int
    secure: bool
    asks: tuple[RequestFacts, ...]
    pipelined: bool
    patient: bool
    narrow: bool
    leave: Leave | None


PLAIN = ("plain", "secure")
"""The routes to the provider, over TCP and over TLS, with deadlines that no life meets."""

IMPATIENT = ("impatient", "impatient-secure")
"""The same, with a short ``idle``."""

CURT = ("curt", "curt-secure")
"""With a short ``first_byte``."""

STERN = ("stern", "stern-secure")
"""With a short ``client_stall``."""
