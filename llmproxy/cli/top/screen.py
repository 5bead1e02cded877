"""One picture of a state, for a terminal.

Everything that came from a daemon goes through :func:`llmproxy.cli.table.shown` and becomes a
``Text``: callers choose the names of models, and no escape sequence or markup may come through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from llmproxy.cli.table import shown
from llmproxy.cli.top.site import State

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
_FIXED = 14
"""Lines for the head, a note, and the title, heading and rule of each table."""


class View(msgspec.Struct):
    """What is shown beside the state.

    Attributes:
        sort: as ``/streams`` takes it.
        selected: the id of the stream that is selected, or None.
        note: a sentence at the bottom.
        height: lines of the terminal; 0 for as many as it takes.
    """

    sort: str = "-age"
    selected: str | None = None
    note: str = ""
    height: int = 0


def picture(state: State, view: View) -> Group:
    """Return the picture of a state."""
    parts: list[Any] = [_head(state)]
    if view.note:  # not below: a small terminal cuts what is there
        parts.append(Text(view.note, style="bold"))
    providers, streams, ended = _room(state, view)
    parts.append(_providers(state["providers"], providers))
    parts.append(_streams(state["streams"][:streams], state, view))
    parts.append(_ended(state["ended"][:ended]))
    return Group(*parts)


def _room(state: State, view: View) -> tuple[int, int, int]:
    """Return how many providers, streams and ends have a row; streams have what is left."""
    providers, ended = len(state["providers"]), min(_FEW, len(state["ended"]))
    if not view.height:
        return providers, len(state["streams"]), ended
    left = max(0, view.height - _FIXED)
    providers, ended = min(providers, max(2, left // 3)), min(ended, left // 4)
    return providers, min(len(state["streams"]), max(3, left - providers - ended)), ended


def visible(state: State, view: View) -> int:
    """Return how many streams have a row."""
    return _room(state, view)[1]


def _head(state: State) -> Text:
    process = state["process"]
    words = [
        f"llmproxy {shown(process['version'])}",
        f"instance {shown(process['instance'])}",
        f"up {duration(process['uptime_s'])}",
        f"{state['total']} streams",
        f"{process['connections']} connections",
    ]
    text = Text(", ".join(words), style="bold")
    if (draining := process["draining"]) is not None:
        left = duration(draining["cut_in_s"])
        text.append(f"  shuts down: {draining['remaining']} left, cut in {left}", "bold yellow")
    if not process["reload"]["succeeded"]:
        text.append("  the last reload FAILED: see the log", "bold red")
    return text


def _streams(rows: Sequence[dict[str, Any]], state: State, view: View) -> Table:
    title = f"streams {state['offset'] + 1}-{state['offset'] + len(rows)} of {state['matching']}"
    title += f" by {view.sort}" if rows else ""
    table = _table(
        title, "id client route provider model phase", "age bytes events tokens last held"
    )
    for row in rows:
        phase = row["phase"] if row["ahead"] is None else f"{row['phase']} ({row['ahead']})"
        cells = [_cell(row[name]) for name in ("id", "client", "route", "provider", "model")]
        cells.append(Text(phase, _WORDS.get(row["phase"], "")))
        figures = (duration(row["age_s"]), size(row["bytes"]), row["events"], row["tokens"])
        cells += map(_cell, (*figures, duration(row["last_chunk_s"]), duration(row["paused_s"])))
        table.add_row(*cells, style="reverse" if row["id"] == view.selected else "")
    return table


def _providers(rows: Sequence[dict[str, Any]], most: int) -> Table:
    title = "providers" if len(rows) <= most else f"providers {most} of {len(rows)}, not on first"
    if len(rows) > most:
        rows = sorted(rows, key=lambda row: _state_of(row)[0] == "on")[:most]
    table = _table(title, "name state", "active idle connecting busy waiting")
    for row in rows:
        state, style = _state_of(row)
        connections, places = row["connections"], row["places"]
        of = "" if places["most"] is None else f"/{places['most']}"
        table.add_row(
            _cell(row["name"]),
            Text(state, style),
            *(_cell(connections[name]) for name in ("active", "idle", "connecting")),
            _cell(f"{places['busy']}{of}"),
            _cell(places["waiting"]),
        )
    return table


def _state_of(row: dict[str, Any]) -> tuple[str, str]:
    if row["state"] == "off":
        return "off", "red"
    if row["circuits"]:
        return f"failing, asked in {duration(row['circuits'][0]['seconds'])}", "red"
    if row["cooldowns"]:
        longest = max(one["seconds"] for one in row["cooldowns"])
        return f"cooling for {duration(longest)}", "yellow"
    if row["switched_off"]:
        return f"{len(row['switched_off'])} models off", "yellow"
    return "on", "green"


def _ended(rows: Sequence[dict[str, Any]]) -> Table:
    table = _table("abnormal ends", "id began end cause client provider model", "status lasted")
    for row in rows:
        words = ("id", "time", "end_reason", "cause", "client", "provider", "model", "status")
        table.add_row(*(_cell(row[name]) for name in words), _cell(duration(row["duration_s"])))
    return table


def _table(title: str, words: str, figures: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title=title, title_justify="left")
    for name in words.split():
        table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=_LONGEST)
    for name in figures.split():
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cell(value: object) -> Text:
    return Text("" if value is None else shown(str(value))[: 2 * _LONGEST])


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
