"""One picture of a state, for a terminal.

Everything that came from a daemon goes through :func:`llmproxy.cli.table.shown` and becomes a
``Text``: callers choose the names of models, and no escape sequence or markup may come through.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import msgspec
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmproxy.admin.clients import ClientRow
from llmproxy.admin.overview import EndedRow, State
from llmproxy.admin.providers import ProviderRow
from llmproxy.cli.table import shown

SORTS = {
    "a": "age",
    "b": "bytes",
    "e": "events",
    "l": "last_chunk",
    "p": "paused",
    "c": "client",
    "m": "model",
    "o": "provider",
}
"""The keys that sort, and by what."""

_WORDS = {"paused": "yellow", "queued": "yellow", "streaming": "green"}
_LONGEST = 40
_FEW = 5
_FRAME = 3
"""Lines of a table that are no rows: title, heading and rule."""

_LEAST = 3
"""How many streams have a row in the smallest terminal."""

_STREAMS = ("id client route provider model phase", "age bytes events tokens last held")
_ENDED = ("id began end cause client provider model", "status lasted")
_FROM = {
    "bytes": 100,
    "cause": 100,
    "provider": 110,
    "events": 120,
    "last": 130,
    "began": 140,
    "held": 140,
    "route": 150,
}
"""How wide a terminal must be for the less useful columns."""

_KEPT = ("phase", "end")
"""Columns of words that are never cut in favour of others."""

_LIMITS = {
    "requests_per_minute": "requests/min",
    "tokens_per_minute": "tokens/min",
    "tokens_per_day": "tokens/day",
}
"""The limits that are columns; the one of streams stands beside those that there are."""


class View(msgspec.Struct):
    """What is shown beside the state.

    Attributes:
        sort: as ``/streams`` takes it.
        filter: which streams are asked for, as it is typed.
        selected: the id of the stream that is selected, or None.
        note: sentences below the first line.
        height: lines of the terminal; 0 for as many as it takes.
        width: its columns; 0 for as many as it takes.
        is_clients_first: clients have room before abnormal ends.
    """

    sort: str = "-age"
    filter: str = ""
    selected: str | None = None
    note: str = ""
    height: int = 0
    width: int = 0
    is_clients_first: bool = False


class _Room(msgspec.Struct):
    """How many rows each table has; of clients and ends, one without rows is left out."""

    providers: int
    streams: int
    clients: int
    ended: int


def picture(state: State, view: View) -> Group:
    """Return the picture of a state."""
    room = _room(state, view)
    parts: list[RenderableType] = [_head(state)]
    # The note is not at the bottom: a small terminal cuts what is there.
    parts += [_line(line, "bold") for line in _noted(view)]
    parts += _providers(state.providers, room.providers)
    parts += _streams(state, view, room.streams)
    lower = [
        _ended(state.ended, room.ended, view),
        _clients(state.clients, room.clients),
    ]
    for part in reversed(lower) if view.is_clients_first else lower:
        parts += part
    return Group(*parts)


def _room(state: State, view: View) -> _Room:
    """Return how the lines are shared out; streams have what is left."""
    found = _Room(len(state.providers), len(state.streams), len(state.clients), len(state.ended))
    if not view.height:
        found.ended = min(_FEW, found.ended)
        return found
    left = max(0, view.height - 1 - len(_noted(view)) - 2 * _FRAME)
    found.providers = min(found.providers, max(2, left // 4))
    left -= found.providers
    first, second = ("clients", "ended") if view.is_clients_first else ("ended", "clients")
    for name in (first, second):
        spare = left - max(_LEAST, found.streams)
        if name == first:
            spare = spare * 2 // 3
        rows = max(0, min(getattr(found, name), max(left // 3, spare) - _FRAME))
        setattr(found, name, rows)
        left -= rows + _FRAME if rows else 0
    found.streams = min(found.streams, max(_LEAST, left))
    return found


def _noted(view: View) -> list[str]:
    """Return the lines of the note."""
    lines = view.note.splitlines()
    if not view.width:
        return lines
    return [part for line in lines for part in textwrap.wrap(line, view.width)]


def visible(state: State, view: View) -> int:
    """Return how many streams have a row."""
    return _room(state, view).streams


def _head(state: State) -> Text:
    process = state.process
    text = _line(f"llmproxy {shown(process.version)}", "bold")
    # Before what can be cut.
    if not process.reload.succeeded:
        text.append("  the last reload FAILED: see the log", "bold red")
    if (draining := process.draining) is not None:
        left = duration(draining.cut_in_s)
        text.append(f"  shuts down: {draining.remaining} left, cut in {left}", "bold yellow")
    words = (
        f"instance {shown(process.instance)}",
        f"up {duration(process.uptime_s)}",
        f"{state.total} streams",
        f"{process.connections} connections",
    )
    return text.append(f"  {', '.join(words)}")


def _streams(state: State, view: View, most: int) -> list[RenderableType]:
    rows = state.streams[:most]
    title = f"streams {state.offset + 1}-{state.offset + len(rows)} of {state.matching}"
    title += f" by {view.sort}" if rows else ""
    title += f", {view.filter}" if view.filter else ""
    table = _table(*_STREAMS, view.width)
    for row in rows:
        phase = row.phase if row.ahead is None else f"{row.phase} ({row.ahead})"
        cells: dict[str, object] = {
            **{name: getattr(row, name) for name in ("id", "client", "route", "provider", "model")},
            "phase": _cell(phase, _WORDS.get(row.phase, "")),
            "age": duration(row.age_s),
            "bytes": size(row.bytes),
            "events": row.events,
            "tokens": row.tokens,
            "last": duration(row.last_chunk_s),
            "held": duration(row.paused_s),
        }
        _add(table, cells, "reverse" if row.id == view.selected else "")
    return [_line(title, "italic"), table]


def _providers(rows: Sequence[ProviderRow], most: int) -> list[RenderableType]:
    title = "providers"
    if len(rows) > most:
        title = f"providers {most} of {len(rows)}, not on first"
        rows = sorted(rows, key=lambda row: _state_of(row)[0] == "on")[:most]
    table = _table("name state", "active idle connecting busy waiting")
    for row in rows:
        state, style = _state_of(row)
        connections, places = row.connections, row.places
        table.add_row(
            _cell(row.name),
            _cell(state, style),
            _cell(connections.active),
            _cell(connections.idle),
            _cell(connections.connecting),
            _cell(_of(places.busy, places.most)),
            _cell(places.waiting),
        )
    return [_line(title, "italic"), table]


def _state_of(row: ProviderRow) -> tuple[str, str]:
    if row.state == "off":
        return "off", "red"
    if row.circuits:
        return f"failing, asked in {duration(row.circuits[0].seconds)}", "red"
    if row.cooldowns:
        longest = max(one.seconds for one in row.cooldowns)
        return f"cooling for {duration(longest)}", "yellow"
    if row.switched_off:
        return f"{len(row.switched_off)} models off", "yellow"
    return "on", "green"


def _ended(rows: Sequence[EndedRow], most: int, view: View) -> list[RenderableType]:
    if not most:
        return []
    table = _table(*_ENDED, view.width)
    for row in rows[:most]:
        same = ("id", "cause", "client", "provider", "model", "status")
        cells: dict[str, object] = {
            **{name: getattr(row, name) for name in same},
            "began": row.time,
            "end": row.end_reason,
            "lasted": duration(row.duration_s),
        }
        _add(table, cells)
    return [_line("abnormal ends", "italic"), table]


def _clients(rows: Sequence[ClientRow], most: int) -> list[RenderableType]:
    """Return the clients, those with the most streams first."""
    if not most:
        return []
    title = "clients" if len(rows) <= most else f"clients {most} of {len(rows)}"
    table = _table("client", f"streams {' '.join(_LIMITS.values())}")
    for row in rows[:most]:
        streams = row.limits.get("max_streams")
        cells = [_used(row.streams, None if streams is None else streams.limit)]
        for name in _LIMITS:
            use = row.limits.get(name)
            cells.append(Text() if use is None else _used(use.used, use.limit))
        table.add_row(_cell(row.client), *cells)
    return [_line(title, "italic"), table]


def _used(used: int, most: int | None) -> Text:
    """Return how much is used of what is allowed; a client that has no more is refused."""
    return _cell(_of(used, most), "yellow" if most is not None and used >= most else "")


def _of(used: int, most: int | None) -> str:
    return str(used) if most is None else f"{used}/{most}"


def _table(words: str, figures: str, width: int = 0) -> Table:
    """Return a table without rows.

    Args:
        words: the names of its columns, of which the longest are cut where there is no room.
        figures: the names of those behind them.
        width: of the terminal; 0 for as wide as it takes.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in f"{words} {figures}".split():
        if 0 < width < _FROM.get(name, 0):
            continue
        is_figure = name in figures.split()
        table.add_column(
            _cell(name),
            justify="right" if is_figure else "left",
            no_wrap=is_figure or name in _KEPT,  # the others are narrowed first
            max_width=None if is_figure else _LONGEST,
        )
    return table


def _add(table: Table, cells: dict[str, object], style: str = "") -> None:
    """Add a row of those cells whose columns there are."""
    row = (cells[str(column.header)] for column in table.columns)
    table.add_row(*(cell if isinstance(cell, Text) else _cell(cell) for cell in row), style=style)


def _cell(value: object, style: str = "") -> Text:
    text = "" if value is None else shown(str(value))[: 2 * _LONGEST]
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _line(text: str, style: str) -> Text:
    """Return a line that is cut where it is too long, and not wrapped."""
    return Text(shown(text), style, no_wrap=True, overflow="ellipsis")


def duration(seconds: float | None) -> str:
    """Return seconds as they are read at a glance."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f}s"
    if seconds < 120:
        return f"{seconds:.0f}s"
    if seconds < 7200:
        return f"{seconds // 60:.0f}m"
    return f"{seconds // 3600:.0f}h" if seconds < 172_800 else f"{seconds // 86_400:.0f}d"


def size(count: int) -> str:
    """Return bytes as they are read at a glance."""
    if count < 10_000:
        return str(count)
    return f"{count // 1000}k" if count < 10_000_000 else f"{count // 1_000_000}M"
