"""How a key of the configuration is declared, and a walk over tables that gathers every problem.

A key is the field of a struct, annotated with a :class:`Key`, which holds the :class:`Kind` of
value that the key takes; the docstring below the field says what the key means::

    drain_timeout: Annotated[float, Key(DURATION)] = 300.0

All else follows from that: a :class:`Section` knows the names, a :class:`Table` reads the values
and reports each mistake, :func:`redacted` shows them, and ``reference.py`` writes them down.
Nothing here knows a kind or a key: ``kinds.py`` has the kinds, ``settings.py`` the keys.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar, get_type_hints

import msgspec

from llmproxy.config.credentials import Credentials
from llmproxy.config.values import Wrong, kind, show

T = TypeVar("T")
D = TypeVar("D")
S = TypeVar("S", bound=msgspec.Struct)
Reader = Callable[[object], T]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


# --- declarations ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What a key takes.

    Args:
        words: as the reference says it, such as "whole number".
        read: returns what a table holds at a key, or the key's default where that is absent or
            wrong; a mistake is reported to the table.
        show: returns a value of the struct as :func:`redacted` shows it.
    """

    words: str
    read: Callable[[Table, Key], Any]
    show: Callable[[Any], object]


@dataclass(frozen=True)
class Key:
    """One key of the file.

    A declaration gives the first four at most; :func:`keys_of` adds the others.

    Args:
        kind: what the key takes.
        name: its name, where that is not the field's: several keys may fill one field.
        stated: the reference's words on the default, where the field's own does not say it.
        also_in: further sections that take the key.
        struct: the name of the struct that declares the key.
        field: the field that the key fills.
        make: makes the default, if there is one.
    """

    kind: Kind
    name: str = ""
    stated: str = ""
    also_in: frozenset[str] = frozenset()
    struct: str = ""
    field: str = ""
    make: Callable[[], object] | None = None

    @property
    def needed(self) -> bool:
        """Whether the file must hold this key, as its field has no default."""
        return self.make is None


@lru_cache(maxsize=64)
def keys_of(struct: type[msgspec.Struct]) -> Mapping[str, Key]:
    """Return the keys that ``struct`` declares by their names, in its order."""
    hints = get_type_hints(struct, include_extras=True)
    found = {}
    for one in msgspec.structs.fields(struct):
        for key in getattr(hints[one.name], "__metadata__", ()):
            name = key.name or one.name
            found[name] = replace(
                key, name=name, struct=struct.__name__, field=one.name, make=_default_of(one)
            )
    return found


def redacted(struct: msgspec.Struct) -> dict[str, object]:
    """Return the keys of ``struct`` as JSON-able values, each as its kind shows it."""
    keys = keys_of(type(struct))
    return {name: key.kind.show(getattr(struct, key.field)) for name, key in keys.items()}


@dataclass(frozen=True)
class Section:
    """The keys that a table may hold.

    Args:
        names: of the keys.
        keys: how they are declared; the file's own tables, at its root, are not.
        elsewhere: keys that are only known in ``[timeouts]``.
        instead: what to write instead of keys that operators expect here, by those; ``*`` stands
            for every other that is no slip. ``{}`` stands for the table's own name.
    """

    names: Collection[str]
    keys: Mapping[str, Key] = field(default_factory=dict)
    elsewhere: Collection[str] = ()
    instead: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, struct: type[msgspec.Struct], *, instead: Mapping[str, str] | None = None
    ) -> Section:
        """Return the section whose keys ``struct`` declares."""
        keys = keys_of(struct)
        return cls(tuple(keys), keys, instead=instead or {})

    @classmethod
    def part_of(cls, struct: type[msgspec.Struct], name: str) -> Section:
        """Return the section ``name``, which takes some keys of ``struct``."""
        keys = keys_of(struct)
        own = {one: key for one, key in keys.items() if name in key.also_in}
        return cls(tuple(own), own, elsewhere=keys.keys() - own.keys())

    def objection(self, name: str, table: str = "") -> str | None:
        """Return what is wrong with a key of this ``name`` in a ``table``, or ``None``."""
        if name in self.names:
            return None
        if name in self.elsewhere:
            return "can only be set in [timeouts]"
        instead = self.instead.get(name.lower().replace("-", "_"))
        if instead is None and not _close_to(name, self.names):
            instead = self.instead.get("*")
        return f"unknown key; {instead.format(table) if instead else _hint(name, self.names)}"


# --- tables ---------------------------------------------------------------------------------------


@dataclass
class Context:
    """What readers may know beside their value; it is filled while the file is read.

    Args:
        instance: this daemon's name among several.
        now: seconds since the epoch, or ``None``: what expires is not judged.
        credentials: the directory of credential files.
        providers: the names of all providers.
        routes: the names of all routes, or ``None`` where a route has none.
    """

    instance: str
    now: float | None = None
    credentials: Credentials = field(init=False)
    providers: Collection[str] = ()
    routes: Collection[str] | None = None


class Table:
    """One table of the file, where it stands, and the list that gathers what is wrong with it.

    Making one reports the keys that its ``section`` does not know; a table without a section holds
    names of the operator's choice.  A wrong value is reported, and reading goes on, so that an
    operator sees all mistakes at once.
    """

    def __init__(
        self,
        data: object,
        path: str,
        section: Section | None,
        problems: list[str],
        context: Context,
        *,
        name: str = "",
    ) -> None:
        self.path = path
        self.name = name
        self.context = context
        self.defaults: dict[str, object] = {}
        self._keys: Mapping[str, Key] = {} if section is None else section.keys
        self._problems = problems
        self._taken: dict[str, Any] = {}
        self._data: dict[str, object] = data if isinstance(data, dict) else {}
        self._is_table = isinstance(data, dict)
        if not self._is_table:
            problems.append(f"{path}: expected a table, got {kind(data)}")
        for key in self._data:
            if section is not None and (objection := section.objection(key, name)):
                self.problem(key, objection)

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def is_string(self, key: str) -> bool:
        """Tell whether ``key`` holds a string."""
        return isinstance(self._data.get(key), str)

    def is_table(self, key: str) -> bool:
        """Tell whether ``key`` holds a table."""
        return isinstance(self._data.get(key), dict)

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

    def struct(self, struct: type[S], **values: object) -> S:
        """Return the ``struct`` of this table's section.

        Fields that ``values`` does not hold are taken from the table, in the order of the struct.
        """
        for name, key in keys_of(struct).items():
            if key.field not in values:
                values[key.field] = self.take(name)
        return struct(**values)

    def take(self, name: str) -> Any:
        """Return what the key ``name`` of the section holds, read as it is declared, once.

        That is its default where it is absent or wrong, and ``None`` or ``()`` where it has no
        default; in the last two cases a problem is reported.
        """
        if name not in self._taken:
            key = self._keys[name]
            if key.needed:
                self.need(name)
            self._taken[name] = key.kind.read(self, key)
        return self._taken[name]

    def need(self, name: str, hint: str = "") -> None:
        """Report the key ``name`` where it is absent."""
        if self.lacks(name):
            self.problem(name, f"expected this key, but it is missing{hint}")

    def default(self, key: Key) -> Any:
        """Return the default of ``key``: this table's own in ``defaults``, or the declared one."""
        if key.name in self.defaults:
            return self.defaults[key.name]
        return None if key.make is None else key.make()

    def read(self, key: str, reader: Reader[T], default: D) -> T | D:
        """Return what ``key`` holds, or ``default`` where it is absent or wrong (and reported)."""
        if key not in self._data:
            return default
        return self._read(self.at(key), self._data[key], reader, default)

    def array(
        self, key: str, reader: Reader[T], default: D, *, may_be_empty: bool = False
    ) -> tuple[T, ...] | D:
        """Return what the array ``key`` holds, each item read by ``reader``."""
        return self.mixed(key, reader, None, default, may_be_empty=may_be_empty)

    def mixed(
        self,
        key: str,
        reader: Reader[T],
        table: Callable[[Table], T] | None,
        default: D,
        *,
        section: Section | None = None,
        may_be_empty: bool = False,
    ) -> tuple[T, ...] | D:
        """Return what the array ``key`` holds, each item read by ``reader``.

        Args:
            table: reads an item that is a table, of ``section``; None leaves it to ``reader``.
        """
        if key not in self._data:
            return default
        items = self._data[key]
        if not isinstance(items, list) or not (items or may_be_empty):
            got = "an empty one" if isinstance(items, list) else kind(items)
            self.problem(key, f"expected an array with at least one item, got {got}")
            return default
        missing = object()
        read: list[object] = []
        for at, one in enumerate(items):
            path = f"{self.at(key)}[{at}]"
            if table is not None and isinstance(one, dict):
                read.append(table(self._below(one, path, section, name=self.name)))
            else:
                read.append(self._read(path, one, reader, missing))
        return tuple(one for one in read if one is not missing)  # type: ignore[misc]  # the filter tells

    def table(self, key: str, section: Section | None) -> Table:
        """Return the table ``key``, an empty one where it is absent."""
        return self._below(self._data.get(key, {}), self.at(key), section, name=key)

    def tables(self, key: str, section: Section) -> list[Table]:
        """Return the tables of the array ``key``, written ``[[key]]``."""
        items = self._data.get(key, [])
        if not isinstance(items, list):
            self.problem(key, f"expected [[{key}]], an array of tables, got {kind(items)}")
            return []
        return [self._below(one, f"{self.at(key)}[{at}]", section) for at, one in enumerate(items)]

    def named(self, key: str, section: Section, name: Reader[str]) -> dict[str, Table]:
        """Return the tables below ``key`` by their names, which ``name`` checks."""
        parent = self.table(key, None)
        for one in parent:
            parent._read(parent.at(one), one, name, None)
        return {one: parent.table(one, section) for one in parent}

    def _below(self, data: object, path: str, section: Section | None, *, name: str = "") -> Table:
        return Table(data, path, section, self._problems, self.context, name=name)

    def _read(self, path: str, value: object, reader: Reader[T], default: D) -> T | D:
        try:
            return reader(value)
        except Wrong as wrong:
            got = "" if wrong.hidden else f", got {show(value)}"
            self._problems.append(f"{path}: expected {wrong.expected}{got}")
            return default


def _default_of(one: msgspec.structs.FieldInfo) -> Callable[[], object] | None:
    if one.default is not msgspec.NODEFAULT:
        default = one.default
        return lambda: default
    return None if one.default_factory is msgspec.NODEFAULT else one.default_factory


def _close_to(key: str, known: Collection[str]) -> list[str]:
    return difflib.get_close_matches(key[:80].lower(), known, n=1)


def _hint(key: str, known: Collection[str]) -> str:
    close = _close_to(key, known)
    if close:
        return f"did you mean {json.dumps(close[0])}?"
    return "expected one of " + ", ".join(known)
