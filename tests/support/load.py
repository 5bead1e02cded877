"""Callers that do not try again: short calls and streams, one after the other, until the test ends.

They talk to the demo provider behind the proxy.  Whatever goes wrong for one of them, a connection
that is refused, a response that is broken or an error, is kept; a caller goes on after it.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Self

from tests.support.live_proxy import Response, post, read_response
from tests.support.scripts import DONE
from tests.support.sockets import WAIT, Wire, connect

_PAUSE = 0.02
"""Seconds between two short calls of one caller: they are to be many, not to fill the machine."""


def ask(words: int, model: str, *fields: str) -> bytes:
    """Return the request of one stream of so many words."""
    message = {"role": "user", "content": "word " * words}
    body = json.dumps({"model": model, "stream": True, "messages": [message]}).encode()
    return post("/p/v1/chat/completions", body, *fields)


def content_of(body: bytes) -> str:
    """Return the text of a whole stream."""
    assert body.endswith(DONE), body[-100:]
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]
    deltas = [choice["delta"] for one in events for choice in one["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


class Load:
    """Calls through one port, in threads; leaving the context lets each end what it has begun.

    Args:
        port: the proxy's, on loopback.
        fresh: callers that make short calls, each on a connection of its own.
        kept: callers that make short calls on a connection for as long as that is offered.
        streams: callers that read streams.
        words: how long a stream is; there are twenty words a second.
        key: what the callers show.

    Attributes:
        done: how many calls went well, by kind.
        failures: what went wrong; each stream must have the same text as the first of its kind.
        ids: the ``x-request-id`` of every request.
    """

    def __init__(
        self,
        port: int,
        *,
        fresh: int = 2,
        kept: int = 1,
        streams: int = 4,
        words: int = 60,
        key: str = "",
    ) -> None:
        self.done: Counter[str] = Counter()
        self.failures: list[str] = []
        self.ids: list[str] = []
        self._texts: dict[str, str] = {}
        self._fields = [f"x-api-key: {key}"] if key else []
        self._port = port
        self._words = words
        self._over = threading.Event()
        self._changed = threading.Condition()
        callers = [self._call_fresh] * fresh + [self._call_kept] * kept + [self._stream] * streams
        self._threads = [threading.Thread(target=self._go_on, args=[one]) for one in callers]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(WAIT + self._words / 20)
            assert not thread.is_alive()

    def wait_more(self, kind: str, count: int) -> None:
        """Wait until so many more calls of one kind went well than until now."""
        with self._changed:
            wanted = self.done[kind] + count
            enough = self._changed.wait_for(
                lambda: self.done[kind] >= wanted or self.failures, WAIT
            )
        assert enough, f"no {count} more of {kind}: {self.done}"

    def assert_whole(self, *kinds: str) -> None:
        """Check that nothing went wrong, and that there were calls of each kind."""
        assert not self.failures, (self.failures[:5], len(self.failures), self.done)
        assert all(self.done[kind] for kind in kinds), self.done

    def _go_on(self, call: Callable[[], str]) -> None:
        while not self._over.is_set():
            try:
                kind = call()
            except (OSError, EOFError, AssertionError, ValueError) as error:
                self._note(None, f"{call.__name__}: {error!r}")
            else:
                self._note(kind, None)

    def _note(self, done: str | None, failure: str | None) -> None:
        with self._changed:
            if failure is not None:
                self.failures.append(failure)
            elif done is not None:
                self.done[done] += 1
            self._changed.notify_all()

    def _call_fresh(self) -> str:
        with connect(self._port) as wire:
            self._ask_shortly(wire)
        self._over.wait(_PAUSE)
        return "fresh"

    def _call_kept(self) -> str:
        with connect(self._port) as wire:
            while not self._ask_shortly(wire) and not self._over.wait(_PAUSE):
                self._note("kept", None)
        return "kept"

    def _ask(self, wire: Wire, words: int, model: str) -> Response:
        name = uuid.uuid4().hex
        self.ids.append(name)
        wire.send(ask(words, model, *self._fields, f"x-request-id: {name}"))
        got = read_response(wire)
        assert got.status == 200, got
        text = content_of(got.body)
        assert text == self._texts.setdefault(model, text), text
        return got

    def _ask_shortly(self, wire: Wire) -> bool:
        """Make one short call; return whether its response closes the connection."""
        return b"close" in self._ask(wire, 1, "demo-fast").values(b"connection")

    def _stream(self) -> str:
        with connect(self._port) as wire:
            self._ask(wire, self._words, "demo-20tps")
        return "stream"
