"""What each client may use: requests at once and in a minute, tokens in a minute and in a day.

A request of a client with limits gets a :class:`Lease` before the provider is asked, or is refused
with a 429.  The lease holds one of the client's slots, and reserves the tokens that such a request
usually costs.  It is settled once, however the request ends: the slot is free again, and what the
request did cost takes the place of what was reserved (ADR-0027).

Minutes are sliding windows, days are calendar days in UTC; no bucket refills.  The counts outlive
each configuration, so that a changed limit counts at once.  Nothing here knows bodies, sockets or
records.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping

import msgspec

from llmproxy.config import Client
from llmproxy.errors import ProxyError

STREAMS, REQUESTS = "max_streams", "requests_per_minute"
TOKENS_MINUTE, TOKENS_DAY = "tokens_per_minute", "tokens_per_day"
LIMITS = (STREAMS, REQUESTS, TOKENS_MINUTE, TOKENS_DAY)
"""The limits, which are keys of the configuration, words in a header and labels of metrics."""

REASON = "limited"

_MINUTE_S = 60.0
DAY_S = 86400

_GRAIN_S = 1 / 64
"""What comes within this time is one entry of a window, with the time of its last part.

So a window has at most 3,841 entries, and what stands in it stays for 60 seconds at least and
one grain more at most: never too much passes."""

_SOON_S = 1.0
"""When to come again for what a running request holds: nobody knows when that ends."""

_PATIENCE_S = 60
"""Longer than this no SDK should sleep by itself; Anthropic's would, whatever it is told."""

_SAMPLES = 32
_USUAL = 0.9
"""The usual cost: of the last so many requests, what this part of them did not exceed."""

_MOST_MODELS = 64
_LONGEST_MODEL = 256
"""For how many models, and names of how many characters, the costs of a client are known."""

_BYTES_PER_TOKEN = 4
_MOST_GUESSED = 32_768
_GUESSED_OUTPUT = 1000
"""The guess where no cost is known: the body is text, but not all of a large one; an image is not.
And a response of a usual length."""

_WORDS = {
    STREAMS: "This client may have {} under way at once",
    REQUESTS: "This client may make {} in a minute",
    TOKENS_MINUTE: "This client may use {} in a minute",
    TOKENS_DAY: "This client may use {} in a day (UTC)",
}
_UNITS = {STREAMS: "request", REQUESTS: "request", TOKENS_MINUTE: "token", TOKENS_DAY: "token"}


class _Entry:
    """An amount that came within one grain; ``at`` is when its last part came."""

    __slots__ = ("amount", "at", "began")

    def __init__(self, now: float, amount: int) -> None:
        self.began = self.at = now
        self.amount = amount


class Window:
    """What came within the last 60 seconds; its bound is that of ``_GRAIN_S``.

    Every ``now`` is in seconds of a monotonic clock.
    """

    __slots__ = ("_entries", "_total")

    def __init__(self) -> None:
        self._entries: deque[_Entry] = deque()
        self._total = 0

    def __len__(self) -> int:
        return len(self._entries)

    def total(self, now: float) -> int:
        """Return how much came within the last 60 seconds."""
        entries = self._entries
        while entries and entries[0].at + _MINUTE_S <= now:
            self._total -= entries.popleft().amount
        return self._total

    def add(self, amount: int, now: float) -> _Entry:
        """Let ``amount`` come now; return where it stands."""
        entries = self._entries
        self._total += amount
        if entries and now - entries[-1].began < _GRAIN_S:
            entry = entries[-1]
            entry.amount += amount
            entry.at = now
        else:
            entry = _Entry(now, amount)
            entries.append(entry)
        return entry

    def change(self, entry: _Entry, more: int, now: float) -> None:
        """Let what came be ``more``, or less; what has left the window cannot be less any more."""
        self.total(now)
        if entry.at + _MINUTE_S > now:
            entry.amount += more
            self._total += more
        elif more > 0:
            self.add(more, now)

    def wait(self, amount: int, limit: int, now: float) -> float:
        """Return the seconds until ``amount`` may come; 0 if it may now.

        An amount beyond the limit may come where nothing else came.
        """
        over = self.total(now) + (amount if amount < limit else limit) - limit
        if over <= 0:
            return 0.0
        for entry in self._entries:
            over -= entry.amount
            if over <= 0:
                return entry.at + _MINUTE_S - now
        return _MINUTE_S  # not reached: an empty window has room for anything


class _Day:
    """The tokens of one calendar day in UTC: settled, and reserved for what is under way."""

    __slots__ = ("number", "reserved", "settled")

    def __init__(self) -> None:
        self.number = 0
        self.reserved = self.settled = 0

    def turn(self, number: int) -> None:
        """Begin a day, unless it is the one; a clock that is put back a little begins none."""
        if number != self.number and number != self.number - 1:
            self.number = number
            self.reserved = self.settled = 0


class _Costs:
    """What the last requests of a client for one model cost."""

    __slots__ = ("_ranked", "_samples", "usual")

    def __init__(self) -> None:
        self._samples: deque[int] = deque()
        self._ranked: list[int] = []
        self.usual = 0

    def add(self, tokens: int) -> None:
        """Learn what one more request did cost."""
        samples, ranked = self._samples, self._ranked
        if len(samples) == _SAMPLES:
            oldest = samples.popleft()
            if oldest == tokens:
                samples.append(tokens)
                return
            del ranked[bisect_left(ranked, oldest)]
        samples.append(tokens)
        insort(ranked, tokens)
        self.usual = ranked[math.ceil(len(ranked) * _USUAL) - 1]


class _Used:
    """What one client uses now, and what its requests cost by model."""

    __slots__ = ("_costs", "day", "knows_day", "requests", "streams", "tokens")

    def __init__(self) -> None:
        self.streams = 0
        self.requests, self.tokens = Window(), Window()
        self.day = _Day()
        self.knows_day = False
        self._costs: OrderedDict[str, _Costs] = OrderedDict()

    def usual(self, model: str, size: int) -> int:
        """Return what a request for ``model`` usually costs; a guess from its size at first."""
        costs = self._costs.get(model)
        if costs is not None:
            self._costs.move_to_end(model)
            return max(1, costs.usual)
        return min(size // _BYTES_PER_TOKEN, _MOST_GUESSED) + _GUESSED_OUTPUT

    def learn(self, model: str, tokens: int) -> None:
        """Learn what a request for ``model`` did cost."""
        costs = self._costs.get(model)
        if costs is None:
            costs = self._costs[model] = _Costs()
            if len(self._costs) > _MOST_MODELS:
                self._costs.popitem(last=False)
        costs.add(tokens)

    def by_limit(self, client: Client, now: float, day: int) -> list[tuple[str, int, int]]:
        """Return each limit that ``client`` has, how much it allows, and how much is used."""
        found = []
        if (most := client.max_streams) is not None:
            found.append((STREAMS, most, self.streams))
        if (most := client.requests_per_minute) is not None:
            found.append((REQUESTS, most, self.requests.total(now)))
        if (most := client.tokens_per_minute) is not None:
            found.append((TOKENS_MINUTE, most, self.tokens.total(now)))
        if (most := client.tokens_per_day) is not None:
            self.day.turn(day)
            found.append((TOKENS_DAY, most, self.day.settled + self.day.reserved))
        return found


class Spent(msgspec.Struct, frozen=True):
    """The tokens that clients have used on one day; days are counted from the epoch."""

    day: int
    tokens: Mapping[str, int]


NOTHING_SPENT = Spent(0, {})


class Lease:
    """One slot of a client, and the tokens that are reserved for one request.

    Attributes:
        reserved: how many tokens are reserved; None where no tokens count.
    """

    __slots__ = (
        *("_day", "_entry", "_is_settled", "_limits", "_model", "_used"),
        "reserved",
    )

    def __init__(
        self,
        limits: ClientLimits,
        used: _Used,
        model: str,
        reserved: int | None,
        now: float,
    ) -> None:
        self._limits = limits
        self._used = used
        self._model = model
        self._is_settled = False
        self.reserved = reserved
        used.streams += 1
        used.requests.add(1, now)
        self._day = 0
        self._entry: _Entry | None = None
        if reserved is not None:
            self._entry = used.tokens.add(reserved, now)
            day = used.day  # it was turned to today
            day.reserved += reserved
            self._day = day.number

    def settle(self, reported: int, *, is_whole: bool, may_have_run: bool, seen: int) -> int | None:
        """Give everything back, and return how many tokens count; None where none count.

        Only the first call does anything.

        Args:
            reported: tokens as the provider reported them, as far as it did.
            is_whole: it reported all of them.
            may_have_run: the provider may have done the work, or some of it.
            seen: how many tokens came at least.
        """
        if self._is_settled:
            return None
        self._is_settled = True
        used, reserved = self._used, self.reserved
        used.streams -= 1
        if reserved is None or self._entry is None:
            return None
        if is_whole:
            tokens = reported
            used.learn(self._model, tokens)
        else:
            tokens = max(reported, reserved, seen) if may_have_run else 0
        used.tokens.change(self._entry, tokens - reserved, self._limits.clock())
        if used.day.number == self._day:
            used.day.reserved -= reserved
            used.day.settled += tokens
        return tokens


class ClientLimits:
    """What all clients use; it lasts as long as the process.

    Args:
        clock: monotonic seconds.
        wall: seconds since the epoch.

    Attributes:
        refused: how many requests were refused, by client and limit.
    """

    def __init__(self, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self.clock = clock
        self._wall = wall
        self._clients: Mapping[str, Client] = {}
        self._used: dict[str, _Used] = {}
        self.refused: Counter[tuple[str, str]] = Counter()

    def today(self) -> int:
        """Return the number of the day in UTC, counted from the epoch."""
        return int(self._wall() // DAY_S)

    def unknown(self, clients: Mapping[str, Client]) -> bool:
        """Return whether some of the clients have a limit for a day whose count is not known."""
        return any(
            client.tokens_per_day is not None
            and not (name in self._used and self._used[name].knows_day)
            for name, client in clients.items()
        )

    def follow(self, clients: Mapping[str, Client], spent: Spent = NOTHING_SPENT) -> None:
        """Go by these clients from now on.

        What is counted stays, also for a client that loses its limits while requests of it run.

        Args:
            clients: those of the configuration.
            spent: what they used before, where that is known; of another day, it does not count.
        """
        today = self.today()
        known = spent.tokens if spent.day == today else {}
        self._clients = limited(clients)
        self._used = {
            name: used for name, used in self._used.items() if name in self._clients or used.streams
        }
        for name in self._clients:
            self._used.setdefault(name, _Used())
        for name, used in self._used.items():
            wanted = name in self._clients and self._clients[name].tokens_per_day is not None
            if wanted and not used.knows_day:
                used.day.turn(today)
                used.day.settled = max(used.day.settled, known.get(name, 0))
            used.knows_day = wanted

    def admit(self, client: Client, model: str | None, size: int | None) -> Lease:
        """Admit a request of a client that has limits, and return what it holds.

        Args:
            client: who calls, with the limits that count.
            model: the one that is asked for.
            size: how many bytes of text are sent; None for a request that costs no tokens.

        Raises:
            ProxyError: 429, which says what limit is reached, and when to come again.
        """
        used = self._used.get(client.name)
        if used is None:
            used = self._used[client.name] = _Used()
        model = model if model is not None and len(model) <= _LONGEST_MODEL else ""
        if client.tokens_per_minute is None and client.tokens_per_day is None:
            size = None
        tokens = None if size is None else used.usual(model, size)
        now, wall = self.clock(), self._wall()
        used.day.turn(int(wall // DAY_S))
        # One after the other: most requests pass, and no list is made for them.
        wait, limit = 0.0, ""
        if (most := client.max_streams) is not None and used.streams >= most:
            wait, limit = _SOON_S, STREAMS
        most = client.requests_per_minute
        if most is not None and (left := used.requests.wait(1, most, now)) >= wait:
            wait, limit = left, REQUESTS
        if tokens is not None:
            most = client.tokens_per_minute
            if most is not None and (left := used.tokens.wait(tokens, most, now)) >= wait:
                wait, limit = left, TOKENS_MINUTE
            most = client.tokens_per_day
            if most is not None and (left := _wait_for_day(used.day, tokens, most, wall)) >= wait:
                wait, limit = left, TOKENS_DAY
        if wait > 0:
            raise self._refusal(client, limit, wait)
        return Lease(self, used, model, tokens, now)

    def _refusal(self, client: Client, limit: str, wait: float) -> ProxyError:
        self.refused[client.name, limit] += 1
        most, unit = getattr(client, limit), _UNITS[limit]
        text = _WORDS[limit].format(f"{most} {unit}{'' if most == 1 else 's'}")
        thousandths = max(1, math.ceil(round(wait * 1000, 3)))  # floats do not add up
        seconds = math.ceil(thousandths / 1000)
        fields = [
            (b"retry-after", b"%d" % seconds),
            (b"retry-after-ms", b"%d" % thousandths),
            (b"x-llmproxy-limit", limit.encode("ascii")),
            self.remaining_field(client),
        ]
        if seconds > _PATIENCE_S:
            fields.append((b"x-should-retry", b"false"))
        return ProxyError(
            429,
            REASON,
            f"{text}; try again in {seconds} s.",
            fields=tuple(fields),
            detail=f"{limit} = {most} of client {client.name}",
            cause=limit,
        )

    # -- what is left ---------------------------------------------------------------------------

    def remaining_field(self, client: Client) -> tuple[bytes, bytes]:
        """Return the field that says what ``client`` has left of each limit (RFC 9651, 3.2)."""
        found = self._by_limit(client)
        left = ", ".join([f"{limit}={max(0, most - used)}" for limit, most, used in found])
        return b"x-llmproxy-remaining", left.encode("ascii")

    def remaining(self) -> dict[tuple[str, str], int]:
        """Return what is left now, by client and limit."""
        return {
            (name, limit): max(0, most - used)
            for name, client in self._clients.items()
            for limit, most, used in self._by_limit(client)
        }

    def rows(self) -> list[dict[str, object]]:
        """Return a row for each client that has limits: of each limit what is used, and left."""
        return [
            {
                "client": name,
                "limits": {
                    limit: {"limit": most, "used": used, "remaining": max(0, most - used)}
                    for limit, most, used in self._by_limit(client)
                },
            }
            for name, client in self._clients.items()
        ]

    def _by_limit(self, client: Client) -> list[tuple[str, int, int]]:
        return self._used[client.name].by_limit(client, self.clock(), self.today())


def _wait_for_day(day: _Day, tokens: int, limit: int, wall: float) -> float:
    """Return the seconds until a day has room for so many tokens."""
    least = min(tokens, limit)
    if day.settled + day.reserved + least <= limit:
        return 0.0
    if day.settled + least <= limit:
        return _SOON_S  # what runs may cost less than is reserved for it
    return (day.number + 1) * DAY_S - wall


def limited(clients: Mapping[str, Client]) -> dict[str, Client]:
    """Return the clients that have some limit."""
    return {
        name: client
        for name, client in clients.items()
        if any(getattr(client, limit) is not None for limit in LIMITS)
    }
