"""Which keys a configuration may hold, and a walk over its tables that gathers every problem.

A :class:`Table` reads its keys with the readers of ``values.py`` and goes on after a wrong one, so
that an operator sees all mistakes at once.  Nothing here knows a struct, a file or what a key is
for; ``sections.py`` does.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from llmproxy.config.values import Wrong, kind, show

T = TypeVar("T")
D = TypeVar("D")
Reader = Callable[[object], T]

#: Every key that is built, by section; ``*`` stands for a name that the operator chooses.
KEYS: Mapping[str, tuple[str, ...]] = {
    "": (
        "proxy",
        "admin",
        "credentials",
        "timeouts",
        "limits",
        "providers",
        "routes",
        "clients",
        "trace",
    ),
    "proxy": (
        "listen",
        "listen_tls",
        "reuse_port",
        "certificate",
        "key",
        "anonymous",
        "drain_timeout",
        "max_connections",
        "tuned_loop",
        "via",
    ),
    "admin": ("listen", "metrics_listen"),
    "credentials": ("directory",),
    "timeouts": (
        "connect",
        "first_byte",
        "idle",
        "total",
        "client_stall",
        "request_head",
        "request_body",
        "client_idle",
        "pool_idle",
    ),
    "limits": (
        "request_head",
        "request_body",
        "request_memory",
        "response_head",
        "accumulate",
        "event",
        "connections_per_address",
        "drains",
    ),
    "providers.*": (
        "url",
        "dialect",
        "credential",
        "header",
        "format",
        "pass_credential",
        "headers",
        "ca",
        "pool",
        "timeouts",
    ),
    "providers.*.timeouts": (
        "connect",
        "first_byte",
        "idle",
        "total",
        "client_stall",
        "pool_idle",
    ),
    "routes": (
        "path",
        "name",
        "providers",
        "hosts",
        "models",
        "strip",
        "override",
        "timeouts",
        "accept_encoding",
        "include_usage",
        "on_disconnect",
        "drain_for",
        "error_event",
        "capture",
        "request_body",
    ),
    "routes.timeouts": ("connect", "first_byte", "idle", "total", "client_stall"),
    "routes.override.*": ("model",),
    "clients.*": ("keys", "routes", "models"),
    "trace": ("jsonl", "ledger", "keep", "otlp", "session_header"),
}

#: Keys that the design has and this version has not; they are refused, never read and ignored.
NOT_BUILT: Mapping[str, frozenset[str]] = {
    "": frozenset({"intercept", "tunnel"}),
    "admin": frozenset({"token"}),
    "providers.*": frozenset({"max_streams"}),
    "routes": frozenset(
        {
            "balance",
            "retry_on",
            "heartbeat",
            "padding",
        }
    ),
    "routes.override.*": frozenset({"weight"}),
    "clients.*": frozenset(
        {"max_streams", "requests_per_minute", "tokens_per_minute", "tokens_per_day"}
    ),
}

NOT_BUILT_YET = "is not built yet in this version"

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


class Table:
    """One table of the file, where it stands, and the list that gathers what is wrong with it.

    Making one reports the keys that its ``section`` does not know.
    """

    def __init__(self, data: object, path: str, section: str, problems: list[str]) -> None:
        self.path = path
        self.section = section
        self._problems = problems
        self._data: dict[str, object] = data if isinstance(data, dict) else {}
        self._is_table = isinstance(data, dict)
        if not self._is_table:
            problems.append(f"{path}: expected a table, got {kind(data)}")
        if section in KEYS:
            for key in self._data:
                self._check_known(key)

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def lacks(self, key: str) -> bool:
        """Tell whether ``key`` is absent; nothing is absent from what is no table at all."""
        return self._is_table and key not in self._data

    def at(self, key: str) -> str:
        """Return the path of ``key`` as the file would spell it."""
        spelt = key if _BARE_KEY.fullmatch(key) else show(key)
        return f"{self.path}.{spelt}" if self.path else spelt

    def problem(self, key: str, words: str) -> None:
        """Report ``words`` about ``key``."""
        self._problems.append(f"{self.at(key)}: {words}")

    def read(self, key: str, reader: Reader[T], default: D) -> T | D:
        """Return what ``key`` holds, or ``default`` where it is absent or wrong (and reported)."""
        if key not in self._data:
            return default
        return self._read(self.at(key), self._data[key], reader, default)

    def need(self, key: str, reader: Reader[T], default: D) -> T | D:
        """Do as :meth:`read`, and report an absent key."""
        if self.lacks(key):
            self.problem(key, "expected this key, but it is missing")
        return self.read(key, reader, default)

    def array(
        self, key: str, reader: Reader[T], default: D, *, may_be_empty: bool = False
    ) -> tuple[T, ...] | D:
        """Return what the array ``key`` holds, each item read by ``reader``."""
        if key not in self._data:
            return default
        items = self._data[key]
        if not isinstance(items, list) or not (items or may_be_empty):
            got = "an empty one" if isinstance(items, list) else kind(items)
            self.problem(key, f"expected an array with at least one item, got {got}")
            return default
        missing = object()
        read = [
            self._read(f"{self.at(key)}[{at}]", one, reader, missing)
            for at, one in enumerate(items)
        ]
        return tuple(one for one in read if one is not missing)  # type: ignore[misc]  # the filter tells

    def table(self, key: str, section: str) -> Table:
        """Return the table ``key``, an empty one where it is absent."""
        return Table(self._data.get(key, {}), self.at(key), section, self._problems)

    def tables(self, key: str, section: str) -> list[Table]:
        """Return the tables of the array ``key``, written ``[[key]]``."""
        items = self._data.get(key, [])
        if not isinstance(items, list):
            self.problem(key, f"expected [[{key}]], an array of tables, got {kind(items)}")
            return []
        return [
            Table(one, f"{self.at(key)}[{at}]", section, self._problems)
            for at, one in enumerate(items)
        ]

    def named(self, key: str, section: str, name: Reader[str]) -> dict[str, Table]:
        """Return the tables below ``key`` by their names, which ``name`` checks."""
        parent = self.table(key, f"{key} by name")
        for one in parent:
            parent._read(parent.at(one), one, name, None)
        return {one: parent.table(one, section) for one in parent}

    def _read(self, path: str, value: object, reader: Reader[T], default: D) -> T | D:
        try:
            return reader(value)
        except Wrong as wrong:
            got = "" if wrong.hidden else f", got {show(value)}"
            self._problems.append(f"{path}: expected {wrong.expected}{got}")
            return default

    def _check_known(self, key: str) -> None:
        if key in KEYS[self.section]:
            return
        if key in NOT_BUILT.get(self.section, ()):
            self.problem(key, NOT_BUILT_YET)
        elif self.section.endswith(".timeouts") and key in KEYS["timeouts"]:
            self.problem(key, "can only be set in [timeouts]")
        else:
            self.problem(key, f"unknown key; {_hint(key, KEYS[self.section])}")


def _hint(key: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(key[:80].lower(), known, n=1)
    if close:
        return f"did you mean {json.dumps(close[0])}?"
    return "expected one of " + ", ".join(known)
