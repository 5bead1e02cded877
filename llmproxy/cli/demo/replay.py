"""A fault that was seen once, played again: a capsule of the flight recorder instead of a response.

A capsule says how a response went and how it broke, and has no content.  What is played is made up
in the shape of the endpoint that was asked, cut into chunks of the capsule's sizes, and sent at its
times; then it breaks in the capsule's way.

The form of a capsule is written down here a second time, like everything else that the demo
provider shares with the proxy in front of it (docs/records.rst).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Annotated

import msgspec

from llmproxy.cli.demo import flow
from llmproxy.cli.demo.dialect import Clock, Endpoint, Event, Streamed, json_bytes, new_id
from llmproxy.cli.demo.flow import Ending, Flow, Reply, Time, Timer
from llmproxy.cli.demo.response import Asked, BadAsk, Response

REPLAYED = "demo-replay"
"""The model at which a capsule is played."""

MOST_BYTES = 64 * 1024 * 1024
"""The longest response that is played."""

_FORM = 1
_FAILED = "upstream_failed"
_MICROSECONDS = 1e6
"""What the tokens of an event count here, in a second."""

_FAILURE = "The provider failed here, when the capsule was made."

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=MOST_BYTES)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]


class BadCapsule(Exception):
    """A file that cannot be played; the message says why."""


class _Attempt(msgspec.Struct):
    seconds: _Seconds


class _Body(msgspec.Struct):
    status: Annotated[int, msgspec.Meta(ge=100, le=599)]
    chunks: _Count
    bytes: _Size
    ends_between_events: bool
    last_chunks: list[tuple[_Seconds, _Size]]
    length: _Count | None = None
    events: _Count | None = None
    first_chunk_s: _Seconds | None = None


class Capsule(msgspec.Struct):
    """What is read of a capsule.

    Attributes:
        end_reason, cause: how it ended.
        head_s: seconds from the request to the head of the response, or None.
        response: how that went, or None where none began.
        attempts: how long each attempt took; the last one is played.
    """

    capsule: int
    end_reason: str
    cause: str | None = None
    head_s: _Seconds | None = None
    attempts: list[_Attempt] = []
    response: _Body | None = None

    @property
    def wait_s(self) -> float:
        """Seconds from the provider's request to its head, or to the failure."""
        return self.attempts[-1].seconds if self.attempts else 0.0

    @property
    def in_words(self) -> str:
        """What is played."""
        body = self.response
        if body is None:
            came = "no response"
        else:
            came = f"status {body.status}, {body.bytes} bytes in {body.chunks} reads"
        return f"{came}, then {' '.join(filter(None, (self.end_reason, self.cause)))}"


def read_capsule(text: bytes) -> Capsule:
    """Read a capsule that was saved from ``/streams/ended/ID`` of an admin site.

    Raises:
        BadCapsule: it is none, or it has nothing that a provider could play.
    """
    try:
        capsule = msgspec.json.decode(text, type=Capsule)
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        raise BadCapsule(f"not a capsule: {wrong}") from None
    if capsule.capsule != _FORM:
        raise BadCapsule(f"a capsule of form {capsule.capsule}; this version reads form {_FORM}")
    body = capsule.response
    if body is None:
        if capsule.end_reason not in _WITHOUT_HEAD:
            raise BadCapsule(f"no provider did anything: the request ended as {capsule.end_reason}")
    elif body.status == 101:
        raise BadCapsule("a WebSocket, which the demo provider does not speak")
    elif capsule.end_reason not in _ENDINGS:
        raise BadCapsule(f"its end reason {capsule.end_reason!r} is unknown to this version")
    else:
        _check(body)
    return capsule


def _check(body: _Body) -> None:
    """Check what the types cannot.

    Raises:
        BadCapsule: the figures disagree.
    """
    times = [at for at, _ in body.last_chunks]
    if any(after < before for before, after in pairwise(times)):
        raise BadCapsule("`response.last_chunks` are not in their order")
    rest = body.bytes - sum(size for _, size in body.last_chunks)
    more = body.chunks - len(body.last_chunks)
    if more < 0 or rest < more or (rest and not more):
        raise BadCapsule("`response.last_chunks` disagree with `chunks` and `bytes`")


class Replay:
    """Plays one capsule to whoever asks.

    Args:
        capsule: what is played.
        time: for its times.
    """

    def __init__(self, capsule: Capsule, time: Time) -> None:
        self._capsule = capsule
        self._time = time

    def begin(
        self, reply: Reply, endpoint: Endpoint, ask: Asked, set_head: Callable[[int], object]
    ) -> None:
        """Play; the head, if there is one, leaves when its time has come.

        Args:
            set_head: sets status and fields of a response that the endpoint's dialect sends.
        """
        timer: Timer | None = None

        def play() -> None:
            nonlocal timer
            timer = None
            self._play(reply, endpoint, ask, set_head)

        def give_up(_: object) -> None:
            if timer is not None:
                timer.cancel()

        timer = self._time.callLater(self._capsule.wait_s, play)
        reply.notifyFinish().addErrback(give_up)

    def _play(
        self, reply: Reply, endpoint: Endpoint, ask: Asked, set_head: Callable[[int], object]
    ) -> None:
        body = self._capsule.response
        if body is None:
            _WITHOUT_HEAD[self._capsule.end_reason](reply)
            return
        set_head(body.status)
        if ask.stream and isinstance(endpoint, Streamed) and body.status < 400:
            reply.setHeader(b"content-type", endpoint.stream_type)
            reply.setHeader(b"cache-control", b"no-cache")
            content = _streamed(self._capsule, body, endpoint, ask, self._time.seconds)
        else:
            content = _whole(self._capsule, body, endpoint, ask, self._time.seconds)
        if body.length is not None:
            reply.setHeader(b"content-length", b"%d" % max(body.length, len(content)))
        head_s = self._capsule.head_s or 0.0
        Flow(
            reply,
            self._time,
            _chunks(content, body, head_s),
            _MICROSECONDS,
            _ending(self._capsule),
        ).start()


# --- what is played -------------------------------------------------------------------------------


def _streamed(capsule: Capsule, body: _Body, endpoint: Streamed, ask: Asked, clock: Clock) -> bytes:
    """Return events of the endpoint, as many as were seen, in as many bytes."""
    fails = capsule.end_reason == _FAILED

    def events(tokens: Sequence[str]) -> list[bytes]:
        response = Response(
            model=ask.model,
            tokens=tuple(tokens),
            prompt_tokens=1,
            failure=_FAILURE if fails else None,
        )
        made = list(endpoint.events(response, ask, clock))
        count = max((n for n, event in enumerate(made, 1) if event.tokens), default=0)
        return [event.data for event in made[: count + fails]]

    *before, first = events("x")[: -1 if fails else None]
    around = len(first) - 1
    begun = len(b"".join(before))
    room = body.bytes - (len(events("x")[-1]) if fails else 0)
    if room <= begun + around:  # not even one event has room
        return b"".join(events("x"))[: body.bytes]
    size = max(1, room // max(1, body.events or body.chunks) - around)
    most = max(1, (room - begun) // (around + size))
    sizes = [len(event) for event in events(["x" * size] * most)[len(before) :][:most]]
    ends = list(accumulate(sizes, initial=begun))
    count = max(1, bisect_right(ends, room) - 1)  # an event may be longer than the first
    over = room - ends[count]  # below 0 where the first one is to be shorter
    tokens = ["x" * size] * (count - 1)
    if body.ends_between_events or fails:
        return b"".join(events([*tokens, "x" * (size + over)]))
    further = ["x" * size] * 2 if over else ["x" * (size + 1)]
    return b"".join(events([*tokens, *further]))[: body.bytes]


def _whole(capsule: Capsule, body: _Body, endpoint: Endpoint, ask: Asked, clock: Clock) -> bytes:
    """Return a document of the endpoint, or an error of its dialect, in as many bytes.

    JSON may have blanks behind it.  What was broken is cut; what was whole never is.
    """
    if body.status >= 400:
        bad = BadAsk(_FAILURE)
        made = json_bytes(endpoint.dialect.error(body.status, bad, new_id("req_")))
    else:
        response = Response(model=ask.model, tokens=("x",), prompt_tokens=1)
        made = json_bytes(endpoint.document(response, ask, clock))
    if len(made) > body.bytes and _ending(capsule) is flow.end_properly:
        return made
    return made.ljust(body.bytes)[: body.bytes]


def _chunks(content: bytes, body: _Body, head_s: float) -> Iterator[Event]:
    """Cut ``content`` as the body was cut; each piece waits as long as its chunk did."""
    at, start = head_s, 0
    for when, size in _arrivals(body):
        data = content[start : start + size]
        start += size
        yield Event(data, round(max(0.0, when - at) * _MICROSECONDS))
        at = max(at, when)
    if start < len(content):
        yield Event(content[start:])


def _arrivals(body: _Body) -> Iterator[tuple[float, int]]:
    """Yield when each chunk came, and its size; those that were not kept came evenly."""
    kept = body.last_chunks
    more = body.chunks - len(kept)
    if more:
        rest = body.bytes - sum(size for _, size in kept)
        first = body.first_chunk_s or 0.0
        step = max(0.0, kept[0][0] - first) / more if kept else 0.0
        for number in range(more):
            size = rest * (number + 1) // more - rest * number // more
            yield first + step * number, size
    yield from kept


# --- how it ends ----------------------------------------------------------------------------------


def _ending(capsule: Capsule) -> Ending:
    if capsule.end_reason == "upstream_broken" and capsule.cause == "closed":
        return flow.end_closed
    return _ENDINGS[capsule.end_reason]


_ENDINGS: dict[str, Ending] = {
    "upstream_broken": flow.end_broken,
    "upstream_protocol": flow.end_malformed,
    "upstream_idle": flow.end_silent,
    "upstream_timeout": flow.end_silent,
    "upstream_failed": flow.end_properly,
    "upstream_refused": flow.end_properly,
    "unfinished": flow.end_properly,
    # Whoever ended these, it was not the provider; it goes on, and has nothing more to say.
    "client_gone": flow.end_silent,
    "client_stalled": flow.end_silent,
    "drained": flow.end_silent,
    "killed": flow.end_silent,
    "rejected": flow.end_silent,
    "internal": flow.end_silent,
}
"""What happens after the last chunk, by end reason."""

_WITHOUT_HEAD: dict[str, Ending] = {
    "upstream_broken": flow.end_broken,
    "upstream_protocol": flow.end_without_head,
    "upstream_timeout": flow.end_silent,
    "client_gone": flow.end_silent,
    "drained": flow.end_silent,
    "killed": flow.end_silent,
}
"""What happens instead of a head, by end reason."""
