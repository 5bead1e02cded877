"""What a run prints: tables, a plot of arrivals, what to change; or one object of JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from llmproxy.cli.doctor.advice import Advice
from llmproxy.cli.doctor.diagnosis import Diagnosis
from llmproxy.cli.doctor.examination import SILENCE_AFTER, Observations, Told
from llmproxy.cli.doctor.exchange import End, Seen
from llmproxy.cli.doctor.shape import shape_of
from llmproxy.cli.doctor.verdict import Kind, Level, State, Verdict

_WIDE = 100  # columns where the output is no terminal
_BLOCKS, _ASCII = "▂▄▆█", ".:+#"
_STEPS = (1, 2, 4, 8)
_SECRET_FIELDS = ("set-cookie", "authorization", "proxy-authenticate")
_UNKNOWN = "not known"
_TITLES = {
    Kind.BLOCKS: "held in blocks",
    Kind.BREAK_HIDDEN: "a break is hidden",
    Kind.BREAK_LOST: "a break is not passed on",
    Kind.CANCEL_LOST: "a client that leaves is not noticed",
    Kind.CANCEL_LOST_IN_SILENCE: "a client that leaves in a silence is not noticed",
    Kind.TAKES_MUCH: "takes what nobody reads",
    Kind.LENGTH_KNOWN: "a Content-Length on a stream",
    Kind.ASKED_IN_1_0: "the far end is asked in HTTP/1.0",
}
_STYLES = {
    Level.FATAL: "bold red",
    Level.BAD: "bold red",
    Level.WARNING: "yellow",
    Level.NOTE: "dim",
}


def as_json(found: Diagnosis) -> dict[str, Any]:
    """Return what a program may read."""
    return {
        "code": found.code,
        "urls": [
            msgspec.to_builtins(verdict) | {"seen": _plain(seen)}
            for verdict, seen in zip(found.verdicts, found.seen, strict=True)
        ],
        "guilty": [
            msgspec.to_builtins(guilt) | {"advice": msgspec.to_builtins(lines)}
            for guilt, lines in found.guilts
        ],
    }


def _plain(seen: Observations) -> dict[str, Any]:
    shown: dict[str, Any] = {
        name: _of_exchange(value) if isinstance(value, Seen) else msgspec.to_builtins(value)
        for name, value in msgspec.structs.asdict(seen).items()
    }
    shown["stream"]["events"] = msgspec.to_builtins(seen.stream.events)
    return shown


def _of_exchange(seen: Seen) -> dict[str, Any]:
    shown: dict[str, Any] = msgspec.to_builtins(seen)
    del shown["began"], shown["excerpt"], shown["reads"], shown["events"]
    shown["fields"] = [[k, v] for k, v in seen.fields if k not in _SECRET_FIELDS]
    return shown | {"bytes": seen.size, "coding": seen.coding}


def show(found: Diagnosis) -> None:
    """Print the report."""
    # Not at the top: no other command, and none that prints JSON, has to load it.
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=_WIDE)
    _show_ways(console, found)
    _show_plot(console, found.seen)
    _show_tried(console, found.seen)
    for number, verdict in enumerate(found.verdicts, 1):
        _show_verdict(console, number, verdict)
    _show_guilty(console, found)


# --- tables ---------------------------------------------------------------------------------------


def _table(columns: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _row(table: Any, *cells: str) -> None:
    from rich.text import Text

    table.add_row(*map(Text, cells))


def _show_ways(console: Any, found: Diagnosis) -> None:
    names = ("", "URL", "connect", "TLS", "HTTP", "head", "first", "longest gap", "events")
    table = _table(names)
    for number, seen in enumerate(found.seen, 1):
        stream, shape = seen.stream, shape_of(seen.stream)
        handshake = "" if stream.tls_s is None else f" {_time(stream.tls_s)}"
        version = "" if stream.minor is None else f"1.{stream.minor}"
        _row(
            table,
            str(number),
            seen.target + (" (direct)" if seen.direct else ""),
            _time(stream.connect_s),
            "none" if stream.tls is None else stream.tls.removeprefix("TLSv") + handshake,
            version + (", 2 offered" if seen.protocol == "h2" else ""),
            _time(stream.head_s),
            _time(shape.first_s),
            _time(shape.longest_gap_s),
            str(shape.events or ""),
        )
    console.print(table)


def _show_tried(console: Any, found: Sequence[Observations]) -> None:
    """Print what was tried beside the stream, if anything was."""
    if all(seen.broken is None and seen.unread is None for seen in found):
        if any(seen.stream.status == 200 for seen in found):
            console.print(
                "\nNot known: a broken body, a client that leaves, a slow reader, a silence. Only "
                "llmproxy's paced stream (/-/pace) can show them.",
                style="dim",
                markup=False,
            )
        return
    console.print()
    table = _table(("what happens to", *(str(number) for number in range(1, len(found) + 1))))
    _row(table, "a broken body", *(_broken(seen.broken) for seen in found))
    _row(table, "a client that leaves a busy stream", *(_told(one.cancel_sending) for one in found))
    _row(table, "a client that leaves a silent one", *(_told(one.cancel_silent) for one in found))
    _row(table, "bytes that nobody reads", *(_unread(seen) for seen in found))
    if any(seen.silence_s is not None for seen in found):
        idle_s = max(seen.silence_s or 0 for seen in found)
        _row(table, f"a silence of {idle_s:g} s", *(_silence(seen) for seen in found))
    console.print(table)


def _broken(seen: Seen | None) -> str:
    if seen is None:
        return _UNKNOWN
    if seen.status is None:
        return "does not end" if seen.end is End.OPEN else "stays broken"
    if seen.status != 200:
        return f"becomes a {seen.status}"
    return {
        End.WHOLE: "looks whole",
        End.CLOSED: "looks whole",
        End.OPEN: "does not end",
        End.CUT: "stays broken",
        End.RESET: "stays broken (reset)",
        End.MALFORMED: "stays broken",
    }[seen.end]


def _told(told: Told | None) -> str:
    if told is None:
        return _UNKNOWN
    return "not noticed" if told.seconds is None else f"noticed within {_time(told.seconds)}"


def _unread(seen: Observations) -> str:
    if seen.unread is None:
        return _UNKNOWN
    size = f"{seen.unread.size / 1024**2:.1f} MiB taken"
    return f"{size}, then none" if seen.unread.far_end_waited else f"{size}, no end"


def _silence(seen: Observations) -> str:
    silence = seen.silence
    if silence is None or seen.silence_s is None:
        return _UNKNOWN
    if silence.status != 200:
        return f"ends it after {silence.end_s:.1f} s"
    if silence.end is End.OPEN and len(silence.events) <= SILENCE_AFTER:
        return "is cut, and nobody told"
    if silence.end is End.OPEN or silence.end_s >= seen.silence_s:
        return "passes"
    last = max([read.at for read in silence.reads], default=0.0)
    return f"is cut after {silence.end_s - last:.1f} s"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 0.01:
        return f"{seconds * 1000:.1f} ms"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


# --- the plot -------------------------------------------------------------------------------------


def _show_plot(console: Any, found: Sequence[Observations]) -> None:
    streams = [(number, seen.stream) for number, seen in enumerate(found, 1)]
    shown = [(number, seen) for number, seen in streams if seen.reads and seen.status == 200]
    if not shown:
        return
    longest = max(seen.end_s for _, seen in shown)
    width = max(20, min(80, console.width - 12))
    blocks = _BLOCKS if (console.encoding or "").lower().startswith("utf") else _ASCII
    console.print(f"\nWhen events came, from the request on to {longest:.1f} s", markup=False)
    for number, seen in shown:
        sent = _sent(seen)
        if sent:
            _print_line(console, f"{number} sent", plot(sent, longest, width, blocks))
        label = "  came" if sent else f"{number} came"
        arrivals = [one.at for one in seen.events or seen.reads]
        _print_line(console, label, plot(arrivals, longest, width, blocks))


def _print_line(console: Any, label: str, line: str) -> None:
    console.print(f"{label:<7} |{line}|", markup=False, highlight=False, no_wrap=True)


def _sent(seen: Seen) -> list[float]:
    """Return when events were sent, on the doctor's clock, as if the quickest took no time."""
    if not seen.is_paced:
        return []
    paced = [(event.at, event.sent) for event in seen.events if event.sent is not None]
    offset = min(at - sent for at, sent in paced)
    return [sent + offset for _, sent in paced]


def plot(times: Sequence[float], longest: float, width: int, blocks: str = _BLOCKS) -> str:
    """Return a line of text that shows how many events there are in each part of the time."""
    counts = [0] * width
    for at in times:
        counts[min(width - 1, max(0, int(at / (longest or 1.0) * width)))] += 1
    heights = [sum(count >= step for step in _STEPS) for count in counts]
    return "".join(blocks[height - 1] if height else " " for height in heights)


# --- words ----------------------------------------------------------------------------------------


def _show_verdict(console: Any, number: int, verdict: Verdict) -> None:
    from rich.text import Text

    style = "bold green" if verdict.state is State.HEALTHY else "bold red"
    state = (verdict.state.value, style)
    console.print(Text.assemble(f"\n{number} {verdict.target}: ", state, f": {verdict.words}"))
    if verdict.hops:
        seen = ", ".join(f"{hop.program} ({hop.evidence})" for hop in verdict.hops)
        _print_below(console, Text(f"seen there: {seen}"), 2)
    for finding in verdict.findings:
        if finding.text != verdict.words:
            level = (f"{finding.level.value}: ", _STYLES[finding.level])
            _print_below(console, Text.assemble(level, finding.text), 2)


def _show_guilty(console: Any, found: Diagnosis) -> None:
    from rich.text import Text

    said: set[Advice] = set()
    for guilt, lines in found.guilts:
        title = _TITLES.get(guilt.kind) or guilt.kind.value.replace("_", " ")
        console.print(Text.assemble(f"\n{title}: ", (guilt.words, "bold")))
        for advice in lines:
            _show_advice(console, advice, again=advice in said)
        said.update(lines)


def _show_advice(console: Any, advice: Advice, *, again: bool) -> None:
    from rich.text import Text

    tried = "" if advice.tried else " (not tried here)"
    where = f", {advice.where}" if advice.where else ""
    if again:
        _print_below(console, Text(f"{advice.program}{where}: as above"), 2)
        return
    _print_below(console, Text(f"{advice.program}{where}{tried}:"), 2)
    for line in advice.lines:
        console.print(Text(f"      {line}", "cyan"), soft_wrap=True)
    if advice.note:
        _print_below(console, Text(advice.note), 6)


def _print_below(console: Any, text: Any, indent: int) -> None:
    from rich.padding import Padding

    console.print(Padding(text, (0, 0, 0, indent), expand=False))
