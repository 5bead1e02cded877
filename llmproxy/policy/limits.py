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
from collections import Counter, deque
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


class Entry:
    """What came within one grain; ``at`` is when its last part came."""

    __slots__ = ("at", "began", "requests", "tokens")

    def __init__(self, now: float, requests: int, tokens: int) -> None:
        self.began = self.at = now
        self.requests = requests
        self.tokens = tokens


class Window:
    """The requests and tokens that came within the last 60 seconds.

    Its bound is that of ``_GRAIN_S``.  Every ``now`` is in seconds of a monotonic clock.

    Attributes:
        requests: how many came, as of the last time that something came or :meth:`trim` was called.
        tokens: likewise.
    """

    __slots__ = ("_entries", "requests", "tokens")

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()
        self.requests = self.tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    def trim(self, now: float) -> None:
        """Let go of what came more than 60 seconds ago."""
        entries, since = self._entries, now - _MINUTE_S
        while entries and entries[0].at <= since:
            gone = entries.popleft()
            self.requests -= gone.requests
            self.tokens -= gone.tokens

    def add(self, requests: int, tokens: int, now: float) -> Entry:
        """Let so much come now; return where it stands."""
        entries = self._entries
        self.requests += requests
        self.tokens += tokens
        if entries and now - (entry := entries[-1]).began < _GRAIN_S:
            entry.requests += requests
            entry.tokens += tokens
            entry.at = now
            return entry
        entry = Entry(now, requests, tokens)
        entries.append(entry)
        return entry

    def change(self, entry: Entry, more: int, now: float) -> None:
        """Let ``more`` tokens have come, or less; what has left the window cannot be less."""
        if entry.at > now - _MINUTE_S:
            entry.tokens += more
            self.tokens += more
        elif more > 0:
            self.add(0, more, now)

    def wait(self, over: int, unit: str, now: float) -> float:
        """Return the seconds until so many ``requests`` or ``tokens``, as ``unit`` says, left."""
        if over <= 0:
            return 0.0
        for entry in self._entries:
            over -= getattr(entry, unit)
            if over <= 0:
                return entry.at + _MINUTE_S - now
        return _MINUTE_S  # not reached: no more has to leave than came


class _Day:
    """The tokens of one calendar day in UTC: settled, and reserved for what is under way.

    Attributes:
        number: which day, counted from the epoch.
        ends: when it ends, in seconds since the epoch.
        used: settled and reserved together.
    """

    __slots__ = ("ends", "number", "settled", "used")

    def __init__(self) -> None:
        self.number = self.ends = 0
        self.settled = self.used = 0

    def turn(self, wall: float) -> None:
        """Begin the day of ``wall``; a clock that is put back by less than a day begins none."""
        if not self.ends - 2 * DAY_S <= wall < self.ends:
            self.number = int(wall // DAY_S)
            self.ends = (self.number + 1) * DAY_S
            self.settled = self.used = 0

    def spent(self, tokens: int) -> None:
        """So many at least were settled, as the ledger says."""
        more = max(0, tokens - self.settled)
        self.settled += more
        self.used += more

    def wait(self, tokens: int, limit: int, wall: float) -> float:
        """Return the seconds until the day has room for so many tokens; 0 if it has now."""
        least = min(tokens, limit)
        if self.used + least <= limit:
            return 0.0
        if self.settled + least <= limit:
            return _SOON_S  # what runs may cost less than is reserved for it
        return self.ends - wall


class Costs:
    """What the last requests of a client for one model cost.

    Attributes:
        usual: what is reserved for one; at least 1, so that a full budget is full for each.
        asked_at: when the last one came.
    """

    __slots__ = ("_ranked", "_samples", "asked_at", "usual")

    def __init__(self) -> None:
        self._samples: deque[int] = deque()
        self._ranked: list[int] = []
        self.usual = 1
        self.asked_at = 0.0

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
        self.usual = max(1, ranked[math.ceil(len(ranked) * _USUAL) - 1])


class Used:
    """What one client uses now, and what its requests cost by model."""

    __slots__ = ("client", "costs", "day", "knows_day", "streams", "window")

    def __init__(self, client: str) -> None:
        self.client = client
        self.streams = 0
        self.window = Window()
        self.day = _Day()
        self.knows_day = False
        self.costs: dict[str, Costs] = {}

    def learns(self, model: str, now: float) -> Costs:
        """Begin to learn what requests for ``model`` cost; forget those that came least lately."""
        costs = self.costs.get(model)
        if costs is None:
            if len(self.costs) == _MOST_MODELS:
                del self.costs[min(self.costs, key=lambda name: self.costs[name].asked_at)]
            costs = self.costs[model] = Costs()
            costs.asked_at = now
        return costs

    def expected(
        self, client: Client, model: str | None, size: int | None, now: float
    ) -> tuple[int | None, Costs | None]:
        """Return what a request is expected to cost, and what others for its model did.

        The tokens are None where none count.
        """
        if size is None or (client.tokens_per_minute is None and client.tokens_per_day is None):
            return None, None
        costs = self.costs.get(known_model(model))
        if costs is None:
            return _guess(size), None
        costs.asked_at = now
        return costs.usual, costs

    def by_limit(self, client: Client, now: float, wall: float) -> list[tuple[str, int, int]]:
        """Return each limit that ``client`` has, how much it allows, and how much is used."""
        found = []
        self.window.trim(now)
        if (most := client.max_streams) is not None:
            found.append((STREAMS, most, self.streams))
        if (most := client.requests_per_minute) is not None:
            found.append((REQUESTS, most, self.window.requests))
        if (most := client.tokens_per_minute) is not None:
            found.append((TOKENS_MINUTE, most, self.window.tokens))
        if (most := client.tokens_per_day) is not None:
            self.day.turn(wall)
            found.append((TOKENS_DAY, most, self.day.used))
        return found


class Spent(msgspec.Struct, frozen=True):
    """The tokens that clients have used on one day; days are counted from the epoch."""

    day: int
    tokens: Mapping[str, int]


NOTHING_SPENT = Spent(0, {})


class Lease(msgspec.Struct, gc=False):
    """One slot of a client, and the tokens that are reserved for one request.

    Attributes:
        limits: whose clock it goes by.
        used: what the client uses.
        entry: where the request, and its tokens, stand in the client's minute.
        day: the number of the day for which tokens are reserved.
        model: the one that is asked for.
        costs: what requests for it cost, where that was known.
        reserved: how many tokens are reserved; None where no tokens count.
        is_settled: everything was given back.
    """

    limits: ClientLimits
    used: Used
    entry: Entry
    day: int
    model: str
    costs: Costs | None
    reserved: int | None
    is_settled: bool = False

    def settle(self, tokens: int, is_known: bool = True) -> int | None:
        """Give everything back, and return how many tokens count; None where none count.

        Only the first call does anything.

        Args:
            tokens: what the request did cost.
            is_known: that is what the provider reported, and tells what such requests cost.
        """
        if self.is_settled:
            return None
        self.is_settled = True
        used, reserved = self.used, self.reserved
        used.streams -= 1
        if reserved is None:
            return None
        if is_known:
            costs = self.costs
            if costs is None:
                costs = used.learns(self.model, self.limits.clock())
            costs.add(tokens)
        day = used.day
        if tokens != reserved:
            used.window.change(self.entry, tokens - reserved, self.limits.clock())
        if day.number == self.day:
            day.used += tokens - reserved
            day.settled += tokens
        return tokens

    def settle_unknown(self, reported: int, seen: int, may_have_run: bool) -> int | None:
        """Do as :meth:`settle` where the provider did not report the whole cost.

        Args:
            reported: the tokens that it did report.
            seen: how many came at least.
            may_have_run: the provider may have done the work, or some of it.
        """
        tokens = max(reported, self.reserved or 0, seen) if may_have_run else 0
        return self.settle(tokens, is_known=False)


class Use(msgspec.Struct, frozen=True):
    """What a client uses of one limit.

    Attributes:
        limit: what is allowed.
        used: how much of it counts now, of all processes that share an engine.
        remaining: what is left.
        here: what this process has used of it.
    """

    limit: int
    used: int
    remaining: int
    here: int


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
        self._used: dict[str, Used] = {}
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
        wall = self._wall()
        known = spent.tokens if spent.day == wall // DAY_S else {}
        self._clients = limited(clients)
        self._used = {
            name: used for name, used in self._used.items() if name in self._clients or used.streams
        }
        for name in self._clients:
            self._used.setdefault(name, Used(name))
        for name, used in self._used.items():
            wanted = name in self._clients and self._clients[name].tokens_per_day is not None
            if wanted and not used.knows_day:
                used.day.turn(wall)
                used.day.spent(known.get(name, 0))
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
        now, wall = self.clock(), self._wall()
        used = self._used_by(client, now, wall)
        window, day = used.window, used.day
        # One after the other: most requests pass, and no list is made for them.
        wait, limit = 0.0, ""
        if (most := client.max_streams) is not None and used.streams >= most:
            wait, limit = _SOON_S, STREAMS
        if (most := client.requests_per_minute) is not None and window.requests >= most:
            left = window.wait(window.requests + 1 - most, "requests", now)
            if left >= wait:
                wait, limit = left, REQUESTS
        tokens, costs = used.expected(client, model, size, now)
        if tokens is not None:
            minute, budget = client.tokens_per_minute, client.tokens_per_day
            if minute is not None and window.tokens + tokens > minute:
                # what is beyond the limit may come where nothing else came
                left = window.wait(window.tokens + min(tokens, minute) - minute, "tokens", now)
                if left >= wait:
                    wait, limit = left, TOKENS_MINUTE
            if budget is not None and day.used + tokens > budget:
                left = day.wait(tokens, budget, wall)
                if left >= wait:
                    wait, limit = left, TOKENS_DAY
        if wait > 0:
            raise self._refusal(client, limit, wait)
        return self._hold(used, model, costs, tokens, now)

    def _used_by(self, client: Client, now: float, wall: float) -> Used:
        """Return what a client uses at this moment."""
        used = self._used.get(client.name)
        if used is None:
            used = self._used[client.name] = Used(client.name)
        used.window.trim(now)
        used.day.turn(wall)
        return used

    def _hold(
        self,
        used: Used,
        model: str | None,
        costs: Costs | None,
        tokens: int | None,
        now: float,
    ) -> Lease:
        """Let a request begin, whatever the limits are."""
        used.streams += 1
        reserved = tokens or 0
        used.day.used += reserved
        entry = used.window.add(1, reserved, now)
        return Lease(self, used, entry, used.day.number, known_model(model), costs, tokens)

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

    def allowed(self) -> dict[tuple[str, str], int]:
        """Return what is allowed, by client and limit."""
        return {
            (name, limit): most
            for name, client in self._clients.items()
            for limit in LIMITS
            if (most := getattr(client, limit)) is not None
        }

    def use(self, name: str) -> dict[str, Use]:
        """Return what a client uses of each limit that it has, by the limit's name."""
        client = self._clients.get(name)
        if client is None:
            return {}
        here = {limit: used for limit, _, used in self._own_by_limit(client)}
        return {
            limit: Use(most, used, max(0, most - used), here[limit])
            for limit, most, used in self._by_limit(client)
        }

    def used_here(self) -> dict[tuple[str, str], int]:
        """Return what this process uses, by client and limit."""
        return {
            (name, limit): used
            for name, client in self._clients.items()
            for limit, _, used in self._own_by_limit(client)
        }

    def _by_limit(self, client: Client) -> list[tuple[str, int, int]]:
        return self._own_by_limit(client)

    def _own_by_limit(self, client: Client) -> list[tuple[str, int, int]]:
        return self._used[client.name].by_limit(client, self.clock(), self._wall())


def known_model(model: str | None) -> str:
    """Return by what name the costs of a model are known."""
    return "" if model is None or len(model) > _LONGEST_MODEL else model


def _guess(size: int) -> int:
    """Return what a request of so many bytes may cost, where no cost is known."""
    return min(size // _BYTES_PER_TOKEN, _MOST_GUESSED) + _GUESSED_OUTPUT


def limited(clients: Mapping[str, Client]) -> dict[str, Client]:
    """Return the clients that have some limit."""
    return {
        name: client
        for name, client in clients.items()
        if any(getattr(client, limit) is not None for limit in LIMITS)
    }
