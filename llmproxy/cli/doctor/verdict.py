"""From what was seen to words: the findings at each URL, and the hop that is guilty of each.

A finding belongs to a URL.  Whose fault it is comes from two URLs: what is seen at the outer one
and not at the inner one is made in between, by the program that answers at the outer one.  Nothing
here touches a socket, and nothing is printed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from math import inf

import msgspec

from llmproxy.cli.doctor.examination import SILENCE_AFTER, Observations
from llmproxy.cli.doctor.exchange import End, Seen
from llmproxy.cli.doctor.hops import LLMPROXY, NODE, Hop, hops_of, printable
from llmproxy.cli.doctor.shape import (
    FEWEST_EVENTS,
    LATE_S,
    Pattern,
    Shape,
    beside,
    block_of,
    lags_of,
    shape_of,
)

_ENVOY_LIMIT = "x-envoy-expected-rq-timeout-ms"
_ENOUGH_LIMIT_MS = 600_000
_MUCH_BYTES = 48 * 1024**2  # kernels took 30 MiB on the way through two hops
_KEPT = (Pattern.HELD, Pattern.BLOCKS)
_TIMER_S = (0.15, 0.35)
_STREAM_TYPES = ("text/event-stream", "ndjson", "jsonl", "json-seq")


class Kind(StrEnum):
    """What is found at a URL."""

    UNREACHABLE = "unreachable"
    REFUSED = "refused"
    NO_STREAM = "no_stream"
    HELD = "held"
    BLOCKS = "blocks"
    HELD_AT_FIRST = "held_at_first"
    LATE = "late"
    COMPRESSED = "compressed"
    CUT = "cut"
    CUT_IN_SILENCE = "cut_in_silence"
    BREAK_HIDDEN = "break_hidden"
    BREAK_LOST = "break_lost"
    CANCEL_LOST = "cancel_lost"
    CANCEL_LOST_IN_SILENCE = "cancel_lost_in_silence"
    TAKES_MUCH = "takes_much"
    LIMIT_AHEAD = "limit_ahead"
    LENGTH_KNOWN = "length_known"
    UNFRAMED = "unframed"
    ASKED_IN_1_0 = "asked_in_1_0"
    INVITES_BUFFERING = "invites_buffering"
    UNTOLD = "untold"


class Level(StrEnum):
    """How bad a finding is."""

    FATAL = "fatal"
    """Nothing could be measured."""
    BAD = "bad"
    """A stream is held back or cut."""
    WARNING = "warning"
    NOTE = "note"


class State(StrEnum):
    """What a URL is, in a word."""

    HEALTHY = "healthy"
    BUFFERED = "buffered"
    UNREACHABLE = "unreachable"


class Finding(msgspec.Struct, frozen=True):
    """What is found at a URL, in words."""

    kind: Kind
    level: Level
    text: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What is thought of one URL.

    Attributes:
        target: the URL.
        state: in a word.
        words: in a sentence.
        shape: how the stream came.
        findings: the worst first.
        hops: the programs that are seen there.
        late_s: how late events were without compression: in the middle, and at most.
    """

    target: str
    state: State
    words: str
    shape: Shape
    findings: list[Finding]
    hops: list[Hop]
    late_s: tuple[float, float] = (0.0, 0.0)


class Guilt(msgspec.Struct, frozen=True, kw_only=True):
    """Which hop makes a finding.

    Attributes:
        kind: of the finding.
        at: the URL at which the hop answers.
        before: the URL behind it, at which all is well; None where there is none.
        programs: what the hop is by its own words; empty where it does not say.
        words: all of it in a sentence.
    """

    kind: Kind
    at: str
    before: str | None
    programs: list[str]
    words: str


# --- one URL --------------------------------------------------------------------------------------


def judge_all(seen: Sequence[Observations]) -> list[Verdict]:
    """Return what is thought of several URLs, from the client's side to the provider's."""
    verdicts: list[Verdict] = []
    for one in reversed(seen):
        verdicts.insert(0, judge(one, verdicts[0].shape if verdicts else None))
    return verdicts


def judge(seen: Observations, behind: Shape | None = None) -> Verdict:
    """Return what is thought of one URL.

    Args:
        seen: what was seen there.
        behind: how the stream came at the URL behind it, if there is one.
    """
    found = _fatal(seen.stream)
    quickest = _quickest(seen)
    shape = beside(shape_of(seen.stream, quickest), behind)
    plain = shape if seen.plain is None else shape_of(seen.plain, quickest)
    if not found:
        found = [
            *_of_arrival(seen, shape),
            *_of_end(seen.stream),
            *_of_broken(seen.broken),
            *_of_cancel(seen),
            *_of_unread(seen),
            *_of_silence(seen),
            *_of_head(seen),
        ]
    found.sort(key=lambda finding: [*Level].index(finding.level))
    worst = found[0].level if found else None
    states = {Level.FATAL: State.UNREACHABLE, Level.BAD: State.BUFFERED}
    state = State.HEALTHY if worst is None else states.get(worst, State.HEALTHY)
    words = found[0].text if worst in states else _healthy(seen.stream, shape)
    return Verdict(
        target=seen.target,
        state=state,
        words=words,
        shape=shape,
        findings=found,
        hops=hops_of(seen.stream.fields, seen.arrived),
        late_s=(plain.late_s or 0.0, plain.latest_s or 0.0),
    )


def _healthy(seen: Seen, shape: Shape) -> str:
    if shape.pattern is Pattern.UNKNOWN:
        return "nothing is wrong, as far as it can be told"
    coded = f", compressed with {printable(seen.coding)}" if seen.coding else ""
    return f"streams: {shape.events} events, one by one{coded}"


def _fatal(seen: Seen) -> list[Finding]:
    if seen.status is None:
        return [Finding(Kind.UNREACHABLE, Level.FATAL, seen.problem or "there is no response")]
    if 300 <= seen.status < 400:
        where = printable(seen.field("location") or "nowhere")
        text = f"it redirects to {where}, which is not followed"
        return [Finding(Kind.REFUSED, Level.FATAL, text)]
    if seen.status != 200:
        key = " (--key-file?)" if seen.status == 401 else ""
        text = f"refused with {seen.status}{_reason(seen)}{key}"
        found = [Finding(Kind.REFUSED, Level.FATAL, text)]
        if seen.status == 426:
            text = "a hop asks in HTTP/1.0, which the far end refuses, as Envoy does"
            found.append(Finding(Kind.ASKED_IN_1_0, Level.WARNING, text))
        return found
    kind = (seen.field("content-type") or "").partition(";")[0]
    if kind == "text/html" or (not seen.events and kind == "application/json"):
        text = f"a whole response of type {kind} and no stream: is it the right path?"
        return [Finding(Kind.NO_STREAM, Level.FATAL, text)]
    if not seen.reads and seen.end is not End.OPEN:
        return [Finding(Kind.NO_STREAM, Level.FATAL, "the response is empty")]
    return []


def _reason(seen: Seen) -> str:
    """Return what an error's body says, or nothing."""
    try:
        said = json.loads(seen.excerpt)
    except ValueError:
        return ""
    error = said.get("error", said) if isinstance(said, dict) else None
    words = error.get("message") if isinstance(error, dict) else error
    return f": {printable(words)}" if isinstance(words, str) and words else ""


def _quickest(seen: Observations) -> float:
    """Return the least lag of any paced event that came from a URL."""
    streams = (seen.stream, seen.plain, seen.wide, seen.broken)
    return min((lag for one in streams if one is not None for lag in lags_of(one)), default=inf)


def _of_arrival(seen: Observations, shape: Shape) -> list[Finding]:
    stream, coding = seen.stream, printable(seen.stream.coding or "")
    plain = shape_of(seen.plain, _quickest(seen)) if seen.plain is not None else None
    if stream.end is End.OPEN and not stream.reads:
        text = f"nothing of the body came within {stream.end_s:.0f} s"
        return [Finding(Kind.HELD, Level.BAD, text)]
    if plain is not None and _is_held_by_coding(shape, plain):
        how = f"compressed with {coding}, and " if coding else "to a client that takes gzip: "
        late = [Finding(Kind.LATE, Level.BAD, _how(plain))] * (plain.pattern is Pattern.LATE)
        without = _how(plain) if late else "it streams"
        text = f"{how}{_how(shape)}; without compression {without}"
        return [Finding(Kind.COMPRESSED, Level.BAD, text), *late]
    if plain is not None and shape.pattern in _KEPT:
        shape = plain
    if shape.pattern in _KEPT and shape.is_sure:
        return [_of_size(seen, shape)]
    bad = {
        Pattern.HELD: Kind.HELD,
        Pattern.BLOCKS: Kind.BLOCKS,
        Pattern.HELD_AT_FIRST: Kind.HELD_AT_FIRST,
        Pattern.LATE: Kind.LATE,
    }
    found = []
    if shape.pattern in bad:
        likely = "" if shape.is_sure else ", as it looks"
        found.append(Finding(bad[shape.pattern], Level.BAD, _how(shape) + likely))
    if coding and not found:
        not_held = "" if shape.pattern is Pattern.UNKNOWN else ", but not held"
        text = f"compressed with {coding}{not_held}"
        found.append(Finding(Kind.COMPRESSED, Level.NOTE, text))
    if shape.pattern is Pattern.UNKNOWN:
        text = f"only {shape.events} events: too few to tell whether it is held"
        if shape.events >= FEWEST_EVENTS:
            quick = f"all {shape.events} events within {1000 * shape.took_s:.0f} ms"
            text = f"{quick}: too quick to tell whether it is held"
        found.append(Finding(Kind.UNTOLD, Level.WARNING, text))
    return found


def _is_held_by_coding(shape: Shape, plain: Shape) -> bool:
    """Return whether a stream is held, or later, because it is compressed."""
    if plain.pattern not in (Pattern.STREAMS, Pattern.LATE):
        return False
    later = (shape.late_s or 0) - (plain.late_s or 0) >= LATE_S
    return shape.pattern in _KEPT or (shape.pattern is Pattern.LATE and later)


def _of_size(seen: Observations, shape: Shape) -> Finding:
    """Return what holds a paced stream: a size, a time, or its end."""
    wide = shape_of(seen.wide, _quickest(seen)) if seen.wide is not None else None
    if seen.wide is None or wide is None or wide.pattern is Pattern.HELD:
        kind = Kind.HELD if shape.pattern is Pattern.HELD else Kind.BLOCKS
        return Finding(kind, Level.BAD, _how(shape))
    if wide.pattern is Pattern.HELD_AT_FIRST:
        return Finding(Kind.HELD_AT_FIRST, Level.BAD, _how(wide))
    if wide.pattern is Pattern.STREAMS and (wide.late_s or 0) < LATE_S / 2:
        return Finding(Kind.BLOCKS, Level.BAD, "held in blocks of a few kilobytes: more passes")
    blocks = [block_of(one) for one in (seen.wide, seen.plain or seen.stream)]
    # A busy machine reads several at once, so the smaller one is the block.
    if block := min(filter(None, blocks), default=None):
        short = ": this stream is shorter than one" if shape.pattern is Pattern.HELD else ""
        return Finding(Kind.BLOCKS, Level.BAD, f"held in blocks of {block:,} bytes{short}")
    late = 1000 * (wide.latest_s or 0)
    return Finding(Kind.LATE, Level.BAD, f"events are up to {late:.0f} ms late, several at a time")


def _how(shape: Shape) -> str:
    """Return how a stream came, as the end of a sentence."""
    if shape.pattern is Pattern.HELD:
        return (
            f"held until the end: {shape.events} events at once, after {shape.first_s or 0:.1f} s"
        )
    if shape.pattern is Pattern.BLOCKS:
        return _in_blocks(shape)
    if shape.pattern is Pattern.HELD_AT_FIRST:
        return f"the first {shape.block_bytes or 0:,} bytes are held, and the rest streams"
    return f"each event is {1000 * (shape.late_s or 0):.0f} ms late"


def _in_blocks(shape: Shape) -> str:
    about = "" if shape.alike else "about "
    return f"held in blocks of {about}{shape.block_bytes or 0:,} bytes"


def _of_end(seen: Seen) -> list[Finding]:
    how = {
        End.CUT: "was closed before its end",
        End.RESET: "was reset",
        End.MALFORMED: "ended in what is no HTTP/1.1",
    }.get(seen.end)
    if how is None:
        return []
    text = f"the stream broke off: the connection {how}, after {seen.end_s:.1f} s"
    return [Finding(Kind.CUT, Level.BAD, text)]


def _of_broken(seen: Seen | None) -> list[Finding]:
    if seen is None or seen.end in (End.CUT, End.RESET, End.MALFORMED):
        return []
    if seen.status is None:
        text = f"a broken body brings no response: its client still waits after {seen.end_s:.0f} s"
        return [Finding(Kind.BREAK_LOST, Level.WARNING, text)]
    if seen.status != 200:
        text = f"a broken body arrives as a {seen.status}, without what came before the break"
        return [Finding(Kind.BREAK_HIDDEN, Level.NOTE, text)]
    if seen.end is End.OPEN:
        text = f"a broken body does not end: its client still waits after {seen.end_s:.0f} s"
        return [Finding(Kind.BREAK_LOST, Level.WARNING, text)]
    text = "a broken body arrives as if it were whole"
    return [Finding(Kind.BREAK_HIDDEN, Level.WARNING, text)]


def _of_cancel(seen: Observations) -> list[Finding]:
    found = []
    for told, kind, when in (
        (seen.cancel_sending, Kind.CANCEL_LOST, "sends"),
        (seen.cancel_silent, Kind.CANCEL_LOST_IN_SILENCE, "is silent"),
    ):
        if told is not None and told.seconds is None:
            text = f"the far end is not told that a client left while it {when}"
            found.append(Finding(kind, Level.WARNING, text))
    return found[:1]  # whoever does not tell while bytes flow, does not in silence


def _of_unread(seen: Observations) -> list[Finding]:
    unread = seen.unread
    if unread is None or unread.size < _MUCH_BYTES:
        return []
    size = f"{unread.size / 1024**2:.0f} MiB"
    end = "" if unread.far_end_waited else ", and the far end never had to wait"
    text = f"{size} were taken for a client that read nothing{end}: a hop keeps them"
    return [Finding(Kind.TAKES_MUCH, Level.WARNING, text)]


def _of_silence(seen: Observations) -> list[Finding]:
    silence, asked = seen.silence, seen.silence_s
    if silence is None or asked is None:
        return []
    last = max([read.at for read in silence.reads], default=0.0)
    silent = silence.end_s - last
    if silence.status is None or silence.status != 200:
        what = silence.problem or f"a {silence.status}"
        text = f"a silence of {asked:g} s ends the stream after {silence.end_s:.0f} s: {what}"
        return [Finding(Kind.CUT_IN_SILENCE, Level.BAD, text)]
    whole = silence.end in (End.WHOLE, End.CLOSED)
    if silence.end is End.OPEN and len(silence.events) <= SILENCE_AFTER:
        text = f"a silence of {asked:g} s is cut, but its client is not told: it waits for ever"
        return [Finding(Kind.CUT_IN_SILENCE, Level.BAD, text)]
    if silence.end is End.OPEN or (whole and silence.end_s >= asked):
        return []
    how = ", as if it were whole" if whole else ""
    text = f"cut after {silent:.1f} s of silence{how}"
    return [Finding(Kind.CUT_IN_SILENCE, Level.BAD, text)]


def _of_head(seen: Observations) -> list[Finding]:
    stream, found = seen.stream, []
    arrived = seen.arrived or {}
    limit = arrived.get(_ENVOY_LIMIT, "")
    if limit.isdigit() and 0 < int(limit) < _ENOUGH_LIMIT_MS:
        text = (
            f"Envoy will cut each stream, a busy one too, {int(limit) / 1000:g} s after its request"
        )
        found.append(Finding(Kind.LIMIT_AHEAD, Level.WARNING, text))
    if stream.framing == "length":
        text = "a Content-Length on a stream: somebody had all of it before it was sent"
        found.append(Finding(Kind.LENGTH_KNOWN, Level.WARNING, text))
    if stream.framing == "close":
        text = f"HTTP/1.{stream.minor} without framing: a break that is no reset looks whole"
        found.append(Finding(Kind.UNFRAMED, Level.WARNING, text))
    if arrived.get("version") == "1.0":
        text = "the far end is asked in HTTP/1.0: a break that is no reset looks whole to the hop"
        found.append(Finding(Kind.ASKED_IN_1_0, Level.WARNING, text))
    missing = []
    by_nginx = "nginx" in {hop.program for hop in hops_of(stream.fields)}  # which takes it out
    if not by_nginx and (stream.field("x-accel-buffering") or "").lower() != "no":
        missing.append("X-Accel-Buffering: no")
    if "no-transform" not in (stream.field("cache-control") or "").lower():
        missing.append("Cache-Control: no-transform")
    kind = stream.field("content-type") or ""
    if missing and any(word in kind for word in _STREAM_TYPES):
        text = f"a hop between this one and the client may hold it: no {', no '.join(missing)}"
        found.append(Finding(Kind.INVITES_BUFFERING, Level.NOTE, text))
    return found


# --- several URLs ---------------------------------------------------------------------------------


_ONLY_TOLD = (
    *(Kind.UNTOLD, Kind.NO_STREAM, Kind.REFUSED, Kind.UNREACHABLE),
    *(Kind.INVITES_BUFFERING, Kind.UNFRAMED),
)
"""What is no hop's doing, or not by itself a fault."""

_HOLDING = (Kind.HELD, Kind.BLOCKS, Kind.HELD_AT_FIRST, Kind.LATE, Kind.COMPRESSED)
"""Of these a hop behind may show another one: it holds all the same."""


def blame(verdicts: Sequence[Verdict]) -> list[Guilt]:
    """Return which hop makes which finding.

    Args:
        verdicts: of the URLs, from the client's side to the provider's.
    """
    found = []
    for at, verdict in enumerate(verdicts):
        behind = verdicts[at + 1] if at + 1 < len(verdicts) else None
        if behind is not None and behind.state is State.UNREACHABLE:
            behind = None
        for finding in verdict.findings:
            is_note = finding.level is Level.NOTE
            if finding.kind in _ONLY_TOLD or is_note or _has(behind, finding.kind):
                continue
            found.append(_guilt(finding, verdict, behind, last=at + 1 == len(verdicts)))
    return found


def _has(verdict: Verdict | None, kind: Kind) -> bool:
    alike = _HOLDING if kind in _HOLDING else (kind,)
    return verdict is not None and any(
        finding.kind in alike and finding.level is not Level.NOTE for finding in verdict.findings
    )


def _guilt(finding: Finding, verdict: Verdict, behind: Verdict | None, *, last: bool) -> Guilt:
    known = {hop.program for hop in behind.hops} if behind is not None else set()
    hops = [hop for hop in verdict.hops if hop.program not in known]
    if behind is None and len(hops) > 1:
        hops = [hop for hop in hops if hop.program != LLMPROXY]
    if not hops and behind is not None:
        hops = _by_habit(verdict)
    programs = [hop.program for hop in hops]
    if finding.kind is Kind.LIMIT_AHEAD:
        programs = ["Envoy"]
    name = " or ".join(f"{hop.program} ({hop.evidence})" for hop in hops)
    if not hops:
        itself = "the server itself, or " if behind is None and last else ""
        name = f"{itself}a hop that does not name itself"
    if behind is not None:
        words = f"{name}, between {verdict.target} and {behind.target}"
    elif last:
        words = f"{name}, at {verdict.target} or behind it"
    else:
        words = f"{name}, at {verdict.target} or behind it (the next URL was not measured)"
    return Guilt(
        kind=finding.kind,
        at=verdict.target,
        before=behind.target if behind is not None else None,
        programs=programs,
        words=words,
    )


def _by_habit(verdict: Verdict) -> list[Hop]:
    """Return what a hop without a name is known by: nobody else was seen to do it."""
    shortest, longest = _TIMER_S
    kinds = {finding.kind for finding in verdict.findings}
    if Kind.LATE in kinds and any(shortest <= late <= longest for late in verdict.late_s):
        return [Hop("HAProxy", "it does not name itself, but holds events for 200 ms")]
    if Kind.BREAK_LOST in kinds:
        return [Hop(NODE, "it does not name itself, but does not pass a break on")]
    return []
