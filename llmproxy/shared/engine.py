"""One process's way to the engine that several share: Redis 7 or Valkey.

What a process has to say and to ask goes out in *calls*, one at a time: what comes up while one is
under way is in the next.  So one round trip is for everything of a moment, and nothing is answered
out of its order.  ``batch.lua`` applies a call as a whole or not at all, and each number once
(ADR-0041).

A call that takes longer than the timeout is given up: those who ask are told that the engine is
away, and the connection is dropped.  Whether the engine has carried the call out all the same, and
what it said, it tells when it can be reached again; what it has not is in the next call.  So
nothing is lost, and nothing counts twice, however the engine goes.

Nothing here knows what is asked: an *op* is a list that the script understands.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any, Protocol

import msgspec
from OpenSSL import SSL
from service_identity import CertificateError, VerificationError
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure
from txredisapi import RedisError, RedisProtocol

from llmproxy.errors import EngineAway

_SCRIPT = files("llmproxy.shared").joinpath("batch.lua").read_bytes()
_SHA = sha1(_SCRIPT, usedforsecurity=False).hexdigest().encode("ascii")

LEASE_S = 10.0
"""Seconds after which the engine takes a process that says nothing for gone."""

_GATHER_S = 0.05
"""For how long news may wait for a question: so they have a call of their own rarely."""

_BEAT_S = 1.0
"""How often a process says something, even where it has nothing to say."""

_AGAIN_S, _LONGEST_AGAIN_S = 0.1, 2.0
"""Seconds until the next try at an engine that is away; they double up to the second figure."""

_OPEN_S = 2.0
"""Seconds in which a connection must come about, and say its first word."""

_MOST_ASKS, _MOST_TOLD = 128, 512
"""Ops of one call; the engine serves nobody else meanwhile."""

_LEAVE, _HELLO = -1, 0
"""Calls without ops: a process ends; and what was its last call?"""

Op = list[Any]

_log = Logger()


class _Wrong(Exception):
    """The engine answers something else than the script does."""


_AWAY = EngineAway()


class Asked:
    """One question.

    Args:
        op: what is asked.
        late: called with the result where nobody waits any more when it comes; with None where the
            engine was not asked after all.

    Attributes:
        done: fires with the result, or fails with :class:`EngineAway`; None once it has.
            Cancelling it gives the question up.
    """

    __slots__ = ("done", "late", "op")

    def __init__(self, op: Op, late: Callable[[Any], object]) -> None:
        self.op = op
        self.late = late
        self.done: Deferred[Any] | None = Deferred(self._cancelled)

    def _cancelled(self, _: object) -> None:
        self.done = None

    def give_up(self) -> None:
        """Let the one who waits decide without the engine."""
        done, self.done = self.done, None
        if done is not None:
            done.errback(Failure(_AWAY))

    def answer(self, result: Any) -> None:
        """Hand the result over: to the one who waits, or to ``late``."""
        done, self.done = self.done, None
        if done is not None:
            done.callback(result)
        else:
            self.late(result)

    def was_not_sent(self) -> None:
        """Give the question up; the engine has never seen it."""
        self.give_up()
        self.late(None)


class Teller(Protocol):
    """What a process tells the engine beside its questions."""

    @property
    def has_news(self) -> bool:
        """Whether there is something to tell."""

    def take(self, most: int) -> list[Op]:
        """Return what is to be told, at most so many ops; it is told once."""

    def heard(self, op: Op, result: Any) -> None:
        """The engine's result of an op of :meth:`take`."""

    def hear(self, age: float, text: str) -> None:
        """Hear what another process has told to all, so many seconds ago."""

    def away(self, processes: int) -> None:
        """The engine is away; before, so many processes shared it."""

    def introduce(self, told: list[Op], *, is_lost: bool) -> list[Op]:
        """Return what the process holds; the engine takes it for a new one.

        Args:
            told: what was to be told in a call that came to nothing.
            is_lost: the engine knows nothing of what it was told before.
        """

    def hear_time(self, milliseconds: int) -> None:
        """The engine's clock said this a moment ago."""


_Told = tuple[Teller, Op]


class Engine:
    """The engine, as one process sees it.

    Args:
        reactor: keeps time, and connects.
        endpoint: makes the endpoint of the engine, anew for each try.
        user, password: of the engine's user; None where it has none.
        database: its number.
        prefix: what all keys begin with.
        name: of this process among those that share a configuration.
        timeout: seconds that a question waits at most.
        tellers: what is told beside questions, and who hears what others told to all.
        born: since when the engine knows what it was told of this process; empty if it was told
            nothing.

    Attributes:
        is_up: the engine answers.
        processes: how many share it, as it said last; 1 at least.
        born: since when it knows what it was told.
        calls: how many calls it has answered.
        given_up: how many it has not, in time.
    """

    def __init__(
        self,
        reactor: Any,
        endpoint: Callable[[], Any],
        *,
        user: str | None = None,
        password: str | None = None,
        database: int = 0,
        prefix: str = "llmproxy:",
        name: str,
        timeout: float,
        tellers: Sequence[Teller],
        born: str = "",
    ) -> None:
        self._reactor = reactor
        self._endpoint = endpoint
        self._login = {"username": user, "password": password, "dbid": database or None}
        self._prefix = prefix.encode()
        self._name = f"{name}.{random.getrandbits(48):012x}".encode()
        self._timeout = timeout
        self._tellers = tellers
        self._connection: Any = None
        self._opening: Deferred[None] | None = None
        self._number = 0
        self._heard = 0
        self.born = born
        self._asks: list[Asked] = []
        self._sent: tuple[list[_Told], list[Asked]] | None = None  # under way, or it is not known
        self._is_new = False  # it introduces the process
        self._timer: Any = None
        self._turn: Any = None
        self._again_s = _AGAIN_S
        self._why = ""
        self._is_over = False
        self.is_up = False
        self.processes = 1
        self.calls = self.given_up = 0

    def start(self) -> None:
        """Connect, now and whenever the connection is lost."""
        self._turn = None
        self._opening = Deferred.fromCoroutine(self._open())
        self._opening.addTimeout(_OPEN_S, self._reactor)
        self._opening.addErrback(lambda failure: _log.failure("cannot connect", failure))

    def ask(self, op: Op, late: Callable[[Any], object]) -> Deferred[Any]:
        """Ask, and return a Deferred that fires with the result.

        It fails with :class:`EngineAway` where that does not come in time.  Where it has failed or
        was cancelled, ``late`` is called as :class:`Asked` says.

        Raises:
            EngineAway: the engine is away.
        """
        if not self.is_up:
            raise _AWAY
        asked = Asked(op, late)
        self._asks.append(asked)
        self.wake()
        return asked.done  # type: ignore[return-value]  # it was made a moment ago

    def wake(self, seconds: float = 0.0) -> None:
        """There is something to ask or to tell: let a call begin within so many seconds."""
        if self.is_up and self._sent is None:
            self._call_later(seconds, self._send)

    def stop(self) -> Deferred[None]:
        """Say what is left to say, and leave the engine; fires when that is said, or cannot be."""
        self._is_over = True
        was_up, connection = self.is_up, self._connection
        self._give_all_up()
        gone: Deferred[None] = Deferred()
        if connection is None or not was_up:
            self._go_away("")
            gone.callback(None)
            return gone
        self._cancel()
        self.is_up = False
        for asked in () if self._sent is None else self._sent[1]:
            asked.late(None)  # nobody will say what becomes of it
        told: list[Op] = []
        while self._has_news:
            told += [op for _, op in self._news(_MOST_TOLD)]
        self._execute(self._number + 1, told).addErrback(lambda _: None)
        left = self._execute(_LEAVE, [])
        left.addTimeout(self._timeout, self._reactor)
        left.addBoth(lambda _: connection.transport.abortConnection())
        return left.addBoth(lambda _: None)

    # -- calls ----------------------------------------------------------------------------------

    def _call_later(self, seconds: float, call: Callable[[], object]) -> None:
        """Do this next; what was to be done later than that is not."""
        if self._turn is not None and self._turn.active():
            if self._turn.getTime() <= self._reactor.seconds() + seconds:
                return
            self._turn.cancel()
        self._turn = self._reactor.callLater(seconds, call)

    def _send(self) -> None:
        self._turn = None
        asks = []
        for asked in self._asks[:_MOST_ASKS]:
            if asked.done is None:
                asked.late(None)
            else:
                asks.append(asked)
        del self._asks[:_MOST_ASKS]
        self._write(self._news(_MOST_TOLD), asks)

    def _news(self, most: int) -> list[_Told]:
        found: list[_Told] = []
        for teller in self._tellers:
            found += [(teller, op) for op in teller.take(most - len(found))]
        return found

    def _write(self, told: list[_Told], asks: list[Asked], *, is_new: bool = False) -> None:
        self._cancel_turn()
        self._number += 1
        self._sent, self._is_new = (told, asks), is_new
        self._timer = self._reactor.callLater(self._timeout, self._late)
        connection = self._connection

        def failed(failure: Failure) -> None:
            if connection is self._connection:
                self._fail(_words(failure))

        ops = [*(op for _, op in told), *(asked.op for asked in asks)]
        done = self._execute(self._number, ops, is_new=is_new)
        done.addCallback(self._came).addErrback(failed)

    def _execute(self, number: int, ops: list[Op], *, is_new: bool = False) -> Deferred[Any]:
        lease = int(LEASE_S * 1000)
        what: list[object] = [self._prefix, self._name, number, lease]
        what.append(self._number if number == _HELLO else msgspec.msgpack.encode(ops))
        done: Deferred[Any] = self._connection.execute_command(
            "EVALSHA", _SHA, 1, *what, int(is_new), self._heard
        )
        return done.addCallback(self._read)

    def _read(self, reply: Any) -> list[Any]:
        """Return what the script says.

        Raises:
            _Wrong: the engine said something else.
        """
        try:
            head, *rest = reply
            word, number, born, now, *more = msgspec.msgpack.decode(head)
        except (msgspec.DecodeError, TypeError, ValueError):
            raise _Wrong("it does not answer as the script does") from None
        for teller in self._tellers:
            teller.hear_time(now)
        return [word, number, born, *more, *rest]

    def _came(self, reply: list[Any]) -> None:
        if self._sent is None or self._is_over:
            return
        word, number, born, *rest = reply
        if word == "unknown" and not self._is_new:  # it took us for gone, or has lost what it knew
            self._cancel_timer()
            self._introduce(*self._sent, is_lost=born != self.born)
            return
        if word != "done":
            raise _Wrong(f"it answers {word!r}")
        self._cancel_timer()
        self.born = born
        self.processes = max(1, number)
        self.calls += 1
        heard, events, packed = rest
        self._heard = heard
        for age_ms, who, text in events:
            if who != self._name.decode():
                for teller in self._tellers:
                    teller.hear(age_ms / 1000, text)
        self._conclude(packed)

    def _conclude(self, packed: bytes) -> None:
        """Hand over what the call under way has brought, and go on."""
        results, (told, asks) = msgspec.msgpack.decode(packed), self._sent or ([], [])
        if len(results) != len(told) + len(asks):
            raise _Wrong(f"it gives {len(results)} results for {len(told) + len(asks)} ops")
        self._sent, self._again_s = None, _AGAIN_S
        try:
            for (teller, op), result in zip(told, results, strict=False):
                teller.heard(op, result)
            for asked, result in zip(asks, results[len(told) :], strict=True):
                asked.answer(result)
        finally:
            for asked in asks:
                asked.give_up()  # who has no answer by now, as a result was none
        if self._asks:
            self._call_later(0, self._send)
        else:
            self._call_later(_GATHER_S if self._has_news else _BEAT_S, self._send)

    @property
    def _has_news(self) -> bool:
        return any(teller.has_news for teller in self._tellers)

    def _late(self) -> None:
        self._timer = None
        self.given_up += 1
        self._fail(f"no answer within {self._timeout * 1000:g} ms")

    def _fail(self, why: str) -> None:
        """Take the engine for away, and let all who wait decide by themselves."""
        self._go_away(why)
        self._give_all_up()

    def _give_all_up(self) -> None:
        asks, self._asks = self._asks, []
        for asked in () if self._sent is None else self._sent[1]:
            asked.give_up()
        for asked in asks:
            asked.was_not_sent()

    # -- the connection -------------------------------------------------------------------------

    async def _open(self) -> None:
        factory = _Connections(self._login, self._lost)
        try:
            connection = self._connection = await self._endpoint().connect(factory)
            await factory.ready
            await connection.execute_command("SCRIPT", "LOAD", _SCRIPT)
            self._greeted(await self._execute(_HELLO, []))
        except CancelledError:
            self._go_away(f"no answer within {_OPEN_S:g} s")
        except Exception as error:
            self._go_away(factory.why or str(error) or type(error).__name__)
        finally:
            self._opening = None

    def _greeted(self, reply: list[Any]) -> None:
        """Find out what came of the call that was under way, and go on."""
        word, is_done, born, *rest = reply
        if self._is_over:
            return
        self._why, self.is_up = "", True
        _log.info("the shared engine answers")
        if is_done and self._sent is not None:
            self.born = born
            self._conclude(rest[0])
        told, asks = self._sent or ([], [])
        if word == "unknown":
            self._introduce(told, asks, is_lost=born != self.born)
            return
        self._ask_again(asks)
        if told:
            self._write(told, [])
        else:
            self._sent = None
            self._send()

    def _introduce(self, told: list[_Told], asks: list[Asked], *, is_lost: bool) -> None:
        self._ask_again(asks)
        held: list[_Told] = []
        for teller in self._tellers:
            own = [op for who, op in told if who is teller]
            held += [(teller, op) for op in teller.introduce(own, is_lost=is_lost)]
        self._write(held, [], is_new=True)

    def _ask_again(self, asks: list[Asked]) -> None:
        """Let questions that came to nothing be in a later call, where somebody waits."""
        waits = [asked for asked in asks if asked.done is not None]
        for asked in asks:
            if asked.done is None:
                asked.late(None)
        self._asks[:0] = waits

    def _lost(self, connection: Any) -> None:
        """A connection has ended by itself."""
        if connection is self._connection and self._opening is None:
            self._fail("the connection was lost")

    def _go_away(self, why: str) -> None:
        was_up, self.is_up = self.is_up, False
        self._cancel()
        if was_up:
            for teller in self._tellers:
                teller.away(self.processes)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.transport.abortConnection()
        if self._is_over:
            if (opening := self._opening) is not None:
                self._opening = None
                opening.cancel()
            return
        if was_up or why != self._why:
            _log.warn("the shared engine is away, and this process counts alone: {why}", why=why)
        self._why = why
        self._call_later(self._again_s, self.start)
        self._again_s = min(_LONGEST_AGAIN_S, 2 * self._again_s)

    def _cancel(self) -> None:
        self._cancel_timer()
        self._cancel_turn()

    def _cancel_turn(self) -> None:
        if self._turn is not None and self._turn.active():
            self._turn.cancel()
        self._turn = None

    def _cancel_timer(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None


class _Connection(RedisProtocol):  # type: ignore[misc]  # the library has no types
    """A connection to something that may not be an engine; it keeps why TLS has ended it."""

    def dataReceived(self, data: bytes, unpause: bool = False) -> None:
        """Take what comes; the library raises where it makes no sense."""
        try:
            super().dataReceived(data, unpause)
        except (RedisError, ValueError):
            self.factory.connectionError("it does not speak the protocol of Redis")
            self.transport.abortConnection()

    def connectionLost(self, why: Failure) -> None:
        """End."""
        if isinstance(why.value, SSL.Error):
            self.factory.why = ", ".join(str(one[-1]) for one in why.value.args[0]) or "TLS failed"
        elif isinstance(why.value, VerificationError | CertificateError):
            self.factory.why = "its certificate is for another name"
        super().connectionLost(why)


class _Connections(Factory):
    """Makes one connection, and tells how it begins and ends.

    Attributes:
        ready: fires when it can be used, or fails with why it cannot be.
        why: why it has ended, where TLS says so; else "".
    """

    noisy = False
    isLazy = False  # the library logs nothing then

    def __init__(self, login: dict[str, Any], lost: Callable[[Any], object]) -> None:
        self._login = login
        self._lost = lost
        self.ready: Deferred[None] = Deferred()
        self.why = ""

    def buildProtocol(self, addr: object) -> Any:
        """Return the connection's protocol."""
        made = _Connection(charset=None, convertNumbers=False, **self._login)
        made.factory = self
        made.whenConnected().addCallback(lambda _: self._fire(None))
        made.whenDisconnected().addCallback(self._ended)
        return made

    def stopTrying(self) -> None:
        """The library would not connect again; here nothing does so by itself."""

    def connectionError(self, why: str) -> None:  # noqa: N802 - the library calls it so
        """The engine refuses the user, or the database; or it is none."""
        self._fire(Failure(RedisError(why)))

    def _ended(self, connection: Any) -> None:
        self._fire(Failure(RedisError("the connection was closed")))
        self._lost(connection)

    def _fire(self, result: Failure | None) -> None:
        if not self.ready.called:
            self.ready.callback(result)


def _words(failure: Failure) -> str:
    return failure.getErrorMessage() or type(failure.value).__name__
