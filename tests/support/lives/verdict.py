"""The verdict on a life: whether its client saw, and its record has, what was drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from tests.support.lives.caller import LifeClient
from tests.support.lives.messages import body, content, path
from tests.support.lives.plan import (
    BROKEN_BODY,
    MALFORMED,
    STERN,
    Departure,
    Kind,
    Moment,
    RequestFacts,
)
from tests.support.lives.response_reader import Seen

Record = dict[str, Any]

_ENDS = {
    Kind.SILENT: "upstream_timeout",
    Kind.DROPPED: "upstream_broken",
    Kind.GARBLED: "upstream_protocol",
    Kind.SHORT: "upstream_broken",
    Kind.BAD_CHUNK: "upstream_protocol",
    Kind.HANGING: "upstream_idle",
    Kind.GONE: "upstream_unreachable",
    Kind.UNTRUSTED: "upstream_tls",
    Kind.MUTE: "upstream_timeout",
}
_REFUSALS = {
    "key": 401,
    "route": 404,
    "method": 405,
    "expectation": 417,
    "large": 413,
    "bad_chunk": 400,
}
_RESPONDED = (Kind.WHOLE, Kind.EXTRA, Kind.EARLY)
_MALFORMED = (400, 414, 431, 501, 505)


def _identity(seen: Seen) -> str:
    return seen.fields.get(b"x-llmproxy-request-id", b"").decode()


def end_of(ask: RequestFacts) -> str:
    """Return the end reason of a request whose client stays and sends all of it."""
    if ask.flaw:
        return "rejected"
    if ask.part.kind in _RESPONDED:
        if ask.part.status >= 400:
            return "upstream_refused"
        return "unfinished" if _lacks_its_marker(ask) else "complete"
    return _ENDS[ask.part.kind]


def _lacks_its_marker(ask: RequestFacts) -> bool:
    """Return whether the response is a whole stream that the tap reads, without end marker.

    Other bytes than events or lines of JSON degrade the tap, but none of them is the marker.
    """
    part = ask.part
    is_read = ask.known and ask.method == "POST" and part.status in (200, 201)
    return is_read and part.media in ("text/event-stream", "application/x-ndjson")


class Records:
    """The trace of all lives."""

    def __init__(self, records: list[Record]) -> None:
        self.by_path: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            self.by_path[record["path"]].append(record)
        self.by_id = {record["id"]: record for record in records}


class LifeVerdict:
    """Finds the faults of one life.

    Args:
        caller: its client.
        records: the trace.
        heard: how often the provider got its request with that number.
        cut: the proxy was stopped in the middle of it.
    """

    def __init__(
        self,
        caller: LifeClient,
        records: Records,
        heard: dict[tuple[int, int], int],
        *,
        cut: bool = False,
    ) -> None:
        self._caller = caller
        self._life = caller.life
        self._records = records.by_path
        self._by_id = records.by_id
        self._heard = heard
        self._cut = cut

    def complaints(self) -> Iterator[str]:
        """Yield every fault."""
        reader = self._caller.reader
        if reader.complaint:
            yield f"a response is not HTTP: {reader.complaint}"
        if reader.behind and not (self._life.pipelined and self._caller.left):
            yield f"bytes behind the last response: {reader.behind[:80]!r}"
        for number, ask in enumerate(self._life.asks):
            seen = reader.responses[number] if number < len(reader.responses) else Seen()
            for complaint in self._of_request(number, ask, seen):
                yield f"request {number}: {complaint}"

    def _of_request(self, number: int, ask: RequestFacts, seen: Seen) -> Iterator[str]:
        name = (self._life.number, number)
        records = self._records.get(path(ask, *name), [])
        if ask.flaw == MALFORMED or self._stuck_in_head(number):
            yield from self._of_no_request(number, ask, seen)
            return
        if len(records) > 1:
            yield f"{len(records)} records"
        if self._heard[name] > 1:
            yield f"the provider was asked {self._heard[name]} times"
        if self._heard[name] and ask.flaw and ask.flaw != "bad_chunk" and ask.flaw != "large":
            yield "the provider was asked, although it was refused"
        if not records:
            if seen.code is not None or self._must_be_recorded(number):
                yield f"no record, though the client saw {seen}"
            return
        yield from self._of_response(ask, seen, number, records[0])
        yield from self._of_record(ask, seen, number, records[0])

    def _of_no_request(self, number: int, ask: RequestFacts, seen: Seen) -> Iterator[str]:
        """Yield the faults of a request whose head is malformed or never whole."""
        if seen.code is None:
            if not self._may_have_left(number) and number < len(self._caller.reader.responses):
                yield "the client got no response"
            return
        record = self._by_id.get(_identity(seen))
        if record is None or (record["status"], record["path"]) != (seen.code, ""):
            yield f"the client saw {seen}, the record is {record}"
        if seen.code not in (*_MALFORMED, 408) or (seen.code == 408) != self._stuck(number, seen):
            yield f"the client saw {seen}"

    # -- what the client did --------------------------------------------------------------------

    def _may_have_left(self, number: int) -> bool:
        """Return whether the client may have left before that request ended."""
        leave = self._life.leave
        if leave is None:
            return self._cut
        at_once = self._life.pipelined and leave.moment in (Moment.HEAD, Moment.BODY)
        return self._cut or at_once or leave.ask <= number

    def _stuck(self, number: int, seen: Seen) -> bool:
        """Return whether the client stopped inside a request and got 408."""
        leave = self._life.leave
        return seen.code == 408 and leave is not None and leave.ask == number

    def _stuck_in_head(self, number: int) -> bool:
        leave = self._life.leave
        if leave is None or (leave.ask, leave.way) != (number, Departure.WAIT):
            return False
        return leave.moment is Moment.HEAD

    def _must_be_recorded(self, number: int) -> bool:
        """Return whether the head of the request certainly came before the client's end."""
        leave = self._life.leave
        if self._cut or self._caller.unsent or self._caller.heads <= number:
            return False
        responses = self._caller.reader.responses
        if number >= len(responses) or any(not response.kept for response in responses[:number]):
            return False  # those before it may have ended the connection
        if leave is None or leave.ask > number:
            return not self._may_have_left(number)
        # A reset makes the kernel drop what was not read.
        resets = leave.way in (Departure.RESET, Departure.PAUSE_RESET)
        return leave.ask == number and leave.moment is not Moment.HEAD and not resets

    # -- response and record ---------------------------------------------------------------------

    def _of_response(
        self, ask: RequestFacts, seen: Seen, number: int, record: Record
    ) -> Iterator[str]:
        part = ask.part
        if seen.code is None:
            if not self._may_have_left(number):
                yield "the client got no response"
            return
        wanted = b"" if ask.method == "HEAD" else content(part, self._life.number, number)
        if b"x-llmproxy-error" in seen.fields:
            yield from self._of_refusal(ask, seen, number, record)
            return
        if ask.flaw:
            yield f"a request with the flaw {ask.flaw!r} was served: {seen}"
        if seen.code != part.status or part.kind not in (*_RESPONDED, *BROKEN_BODY):
            yield f"another response than the provider's {part.status}: {seen}"
        if not wanted.startswith(seen.body):
            yield f"another body than the provider's: {seen}"
        if seen.whole and part.kind in BROKEN_BODY:
            yield f"a broken response looks whole: {seen}"
        if seen.whole and seen.body != wanted:
            yield f"whole, and not the {len(wanted)} bytes of it: {seen}"
        if self._may_have_left(number):
            return
        if part.kind in _RESPONDED and not seen.whole:
            yield f"not the whole response of {len(wanted)} bytes: {seen}"
        # A reset makes the proxy's kernel drop what it had not read.
        if (part.kind is not Kind.SHORT or not part.abrupt) and seen.body != wanted:
            yield f"what came before the end ({len(wanted)} bytes) is not all there: {seen}"

    def _of_refusal(
        self, ask: RequestFacts, seen: Seen, number: int, record: Record
    ) -> Iterator[str]:
        if not seen.whole and not self._may_have_left(number):
            yield f"a refusal that is not whole: {seen}"
        if record["error"] != seen.fields[b"x-llmproxy-error"].decode():
            yield f"the client got another reason than the record: {seen}"
        if self._stuck(number, seen):
            return
        if ask.flaw and seen.code != _REFUSALS[ask.flaw]:
            yield f"not the refusal of {ask.flaw!r}: {seen}"
        if not ask.flaw and ask.part.kind in _RESPONDED:
            yield f"a faultless response became {seen}"

    def _of_record(
        self, ask: RequestFacts, seen: Seen, number: int, record: Record
    ) -> Iterator[str]:
        end = record["end_reason"]
        if end not in self._plausible_ends(ask, seen, number):
            yield f"ended as {end}, plausible is {self._plausible_ends(ask, seen, number)}"
        if record["is_complete"] != (end == "complete"):
            yield "is_complete does not fit"
        shown = (_identity(seen), seen.code)
        if seen.code is not None and (record["id"], record["status"]) != shown:
            yield f"the record is of another response: {seen}"
        if seen.whole and record["bytes_out"] != len(seen.body):
            yield f"{record['bytes_out']} bytes out, {len(seen.body)} were seen"
        sent = len(body(ask, self._life.number, number))
        if end == "complete" and record["bytes_in"] != sent:
            yield f"{record['bytes_in']} bytes in, {sent} were sent"
        if len(record["attempts"]) != bool(record["attempts"]):
            yield "more than one attempt"

    def _plausible_ends(self, ask: RequestFacts, seen: Seen, number: int) -> set[str]:
        plain = {end_of(ask)}
        leave = self._life.leave
        if seen.whole and ask.part.kind in _RESPONDED and not ask.flaw and seen.code != 408:
            return plain
        if not self._may_have_left(number):
            return plain
        if self._cut:
            plain.add("drained")
        if leave is not None:
            plain.add("client_gone")
            if leave.way is Departure.WAIT and leave.moment in (Moment.HEAD, Moment.BODY):
                plain.add("rejected")
            # Behind a closed window a FIN may be a half close, and the client's kernel answers
            # probes for a client that is gone.
            shut = leave.way is Departure.PAUSE_CLOSE
            if leave.pause and (shut or ask.route in STERN):
                plain.add("client_stalled")
        return plain
