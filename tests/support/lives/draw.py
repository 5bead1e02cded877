"""Draws lives: all of it comes from a seed and the life's number.

So any single life can be played again without the others.
"""

from __future__ import annotations

import random
from typing import TypeVar

from tests.support.lives.plan import (
    BODY_LIMIT,
    BROKEN_BODY,
    CURT,
    IMPATIENT,
    MALFORMED,
    PLAIN,
    STERN,
    Departure,
    Kind,
    Leave,
    Life,
    Moment,
    Part,
    RequestFacts,
)

T = TypeVar("T")

_FLAWS = ("key", "route", "method", "expectation", "large", "bad_chunk")

_NEEDS_BODY = ("expectation", "large", "bad_chunk")
_NOWHERE = (Kind.GONE, Kind.UNTRUSTED, Kind.MUTE)

_KINDS = {
    Kind.WHOLE: 56,
    Kind.EXTRA: 6,
    Kind.EARLY: 6,
    Kind.SILENT: 2,
    Kind.DROPPED: 6,
    Kind.GARBLED: 4,
    Kind.SHORT: 9,
    Kind.BAD_CHUNK: 4,
    Kind.HANGING: 2,
    Kind.GONE: 2,
    Kind.UNTRUSTED: 2,
    Kind.MUTE: 1,
}
_MOMENTS = {
    Moment.CONNECTED: 6,
    Moment.HEAD: 14,
    Moment.BODY: 20,
    Moment.WAITING: 22,
    Moment.RESPONSE: 30,
    Moment.END: 8,
}
_WAYS = {
    Departure.CLOSE: 24,
    Departure.HALF_CLOSE: 20,
    Departure.RESET: 24,
    Departure.WAIT: 6,
    Departure.PAUSE: 14,
    Departure.PAUSE_CLOSE: 6,
    Departure.PAUSE_RESET: 6,
}
_MEDIA = ("application/json", "text/event-stream", "application/x-ndjson", "audio/mpeg")
_TLS = tuple(secure for _, secure in (PLAIN, IMPATIENT, CURT, STERN))


def draw_life(seed: int, number: int) -> Life:
    """Return the life with that number."""
    rng = random.Random(f"{seed}/{number}")
    count = rng.choices((1, 2, 3, 4), (75, 13, 8, 4))[0]
    pipelined = count > 1 and rng.random() < 0.4
    # Its requests go to one provider more often than not, so that they meet on its connections.
    plainly = rng.random() < 0.75
    asks = tuple(_draw_ask(rng, small=pipelined, plainly=plainly) for _ in range(count))
    if rng.random() < 0.05:
        asks = (asks[0]._replace(flaw=MALFORMED, variant=rng.randrange(1000)), *asks[1:])
    leave = _draw_leave(rng, asks) if rng.random() < 0.5 else None
    if rng.random() < 0.01:
        asks, leave = _draw_stall(rng)
    asks = tuple(ask._replace(known=(number + at) % 3 > 0) for at, ask in enumerate(asks))
    return Life(
        number=number,
        secure=rng.random() < 0.12,
        asks=asks,
        pipelined=pipelined and len(asks) > 1,
        patient=rng.random() < 0.05,
        narrow=rng.random() < 0.2 or (leave is not None and leave.pause > 0),
        leave=leave,
    )


def _draw_leave(rng: random.Random, asks: tuple[RequestFacts, ...]) -> Leave:
    ask = rng.randrange(len(asks))
    moment, way = _one(rng, _MOMENTS), _one(rng, _WAYS)
    pauses = way in (Departure.PAUSE, Departure.PAUSE_CLOSE, Departure.PAUSE_RESET)
    return Leave(ask, moment, way, rng.random(), rng.uniform(0.01, 0.4) if pauses else 0.0)


def _draw_stall(rng: random.Random) -> tuple[tuple[RequestFacts, ...], Leave]:
    """Draw a client that takes nothing of a large response for longer than it may."""
    part = Part(Kind.WHOLE, framing="chunked", size=rng.randrange(400_000, 500_000), pieces=4)
    ask = RequestFacts("GET", "1.1", rng.choice(STERN), part)
    return (ask,), Leave(0, Moment.RESPONSE, Departure.PAUSE, 0.0, 2.5)


def _draw_ask(rng: random.Random, *, small: bool, plainly: bool) -> RequestFacts:
    part = _draw_part(rng, small=small)
    has_body = rng.random() < 0.6
    flaw = rng.choice(_FLAWS) if rng.random() < 0.12 else ""
    if flaw:
        part = _faultless(rng, Kind.WHOLE, small=small)
    if part.kind is Kind.EARLY or flaw in _NEEDS_BODY:
        has_body = True
    ask = RequestFacts(
        method=rng.choice(("POST", "PUT") if has_body else ("GET", "GET", "GET", "HEAD", "DELETE")),
        version="1.0" if rng.random() < 0.12 else "1.1",
        route=_draw_route(rng, part, plainly=plainly),
        part=part,
        flaw=flaw,
        closes=rng.random() < 0.1,
        cuts=tuple(sorted(rng.random() for _ in range(rng.choice((0, 0, 0, 1, 2))))),
    )
    if ask.method == "HEAD":
        ask = ask._replace(part=_faultless(rng, Kind.WHOLE, small=True))
        ask = ask._replace(route=PLAIN[not plainly])
    ask = ask._replace(part=_said(ask))
    return _with_body(rng, ask, small=small) if has_body else ask


def _said(ask: RequestFacts) -> Part:
    """Let a plain connection end only where the response says or shows so.

    Its FIN may come behind the response by the kernel's whim, when the proxy uses it again; TLS's
    close_notify comes in one piece with the response.
    """
    part = ask.part
    if ask.route in _TLS:
        return part
    unsaid = ask.method == "HEAD" and part.framing == "close"
    return part._replace(deserts=False, closes=part.closes or unsaid)


def _with_body(rng: random.Random, ask: RequestFacts, *, small: bool) -> RequestFacts:
    streams = ask.part.kind is Kind.EARLY or rng.random() < 0.5
    size = _draw_size(rng, small=small, most=BODY_LIMIT) or 1
    framing = rng.choice(("length", "chunked"))
    version = "1.1" if framing == "chunked" else ask.version
    if ask.flaw == "bad_chunk":
        framing, version = "chunked", "1.1"
    elif ask.flaw == "large":
        size = BODY_LIMIT + rng.randrange(1, 50_000)
        framing = framing if rng.random() < 0.2 and not small and version == "1.1" else "length"
    return ask._replace(
        version=version,
        media="audio/wav" if streams else "application/json",
        framing=framing,
        size=size,
        expects=rng.random() < 0.15 and not small and not ask.flaw,
    )


def _draw_route(rng: random.Random, part: Part, *, plainly: bool) -> str:
    if part.kind in _NOWHERE:
        return part.kind.value
    plainly = plainly if rng.random() < 0.9 else not plainly
    if part.kind is Kind.EARLY and (part.closes or part.deserts or part.framing == "close"):
        plainly = True  # TLS has no half-close, and a whole one resets while an upload comes in
    if part.kind is Kind.SILENT:
        return CURT[not plainly]
    if part.kind is Kind.HANGING:
        return IMPATIENT[not plainly]
    return PLAIN[not plainly]


def _draw_part(rng: random.Random, *, small: bool) -> Part:
    kind = _one(rng, _KINDS)
    if small and kind is Kind.EARLY:
        kind = Kind.WHOLE
    # What hangs, or has more behind it, comes in one piece, whatever the machine is at.
    part = _faultless(rng, kind, small=small or kind in (Kind.HANGING, Kind.EXTRA))
    if kind is Kind.HANGING:
        # The proxy's clock runs on where the machine stands still between two pieces.
        part = part._replace(pieces=1)
    if kind in BROKEN_BODY:
        # A body that ends with its connection cannot be short by a FIN.
        framings = ["length", "chunked"]
        if kind is Kind.BAD_CHUNK:
            framings = ["chunked"]
        elif part.abrupt or kind is Kind.HANGING:
            framings.append("close")
        size = max(part.size, 2)
        part = part._replace(
            status=200, framing=rng.choice(framings), size=size, cut=rng.randrange(size)
        )
    elif kind is Kind.DROPPED:
        part = part._replace(cut=rng.choice((0, rng.randrange(1, 30))))
    return part


def _faultless(rng: random.Random, kind: Kind, *, small: bool) -> Part:
    framings = ("length", "chunked", "close")
    framing = rng.choice(framings if kind is not Kind.EXTRA else framings[:2])
    pieces = rng.choice((1, 1, 1, 2, 3, 8))
    status = rng.choices((200, 201, 204, 302, 400, 429, 500), (80, 4, 5, 2, 3, 3, 3))[0]
    if kind is Kind.EARLY:
        status = 413
    return Part(
        kind,
        status=status,
        media=rng.choice(_MEDIA),
        framing=framing if status != 204 else "length",
        size=0 if status == 204 else _draw_size(rng, small=small, most=500_000),
        pieces=pieces,
        gap=rng.uniform(0.0, 0.015) if pieces > 1 or rng.random() < 0.3 else 0.0,
        interim=rng.choices((0, 1, 3), (90, 7, 3))[0],
        abrupt=rng.random() < 0.5,
        closes=rng.random() < 0.15,
        deserts=rng.random() < 0.06,
        variant=rng.randrange(1000),
    )


def _draw_size(rng: random.Random, *, small: bool, most: int) -> int:
    if small:
        return rng.choice((0, rng.randrange(2000), rng.randrange(6000)))
    scale = rng.random()
    if scale < 0.07:
        return rng.randrange(most // 2, most - 20_000)
    return rng.randrange(60_000) if scale < 0.3 else rng.choice((0, rng.randrange(3000)))


def _one(rng: random.Random, weights: dict[T, int]) -> T:
    return rng.choices(list(weights), list(weights.values()))[0]
