"""Two kinds of picture, as SVG: bars beside names, and lines over a number.

A picture has a ground of its own and two sets of colours: a browser takes the dark ones where its
user wants them.  What is drawn is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from typing import NamedTuple

WIDTH = 760
_ROW = 26
_NAMES = 84
_VALUES = 58
_HEAD = 52
_GAP = 24
_PLOT = 300
_LEFT, _RIGHT, _FOOT = 62, 96, 46
_ROOM, _BOTTOM = WIDTH - _LEFT - _RIGHT, _HEAD + 10 + _PLOT
_NEAR = 6

_STYLE = """\
.ground{fill:#fff}.ink{fill:#1f2328}.faint{fill:#59636e}.grid{stroke:#d1d9e0;stroke-width:1}
.ours{fill:#0969da}.theirs{fill:#9aa4af}text{font:13px system-ui,sans-serif}
.title{font-size:15px;font-weight:600}.faint,.tick{font-size:12px}
@media(prefers-color-scheme:dark){.ground{fill:#0d1117}.ink{fill:#f0f6fc}.faint{fill:#9198a1}
.grid{stroke:#3d444d}.ours{fill:#4493f8}.theirs{fill:#656c76}}
"""


class Bar(NamedTuple):
    """A name and its value; ``ours`` is the one that all others are beside."""

    name: str
    value: float
    ours: bool = False


class Bars(NamedTuple):
    """A panel of bars.  A bar longer than ``most`` is cut, and shows that."""

    title: str
    below: str
    bars: Sequence[Bar]
    most: float


class Line(NamedTuple):
    """A line's name, colour and points, by their first number."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]


class Lines(NamedTuple):
    """Lines over a number; on a logarithmic scale each decade has the same height."""

    title: str
    below: str
    unit: str
    lines: Sequence[Line]
    logarithmic: bool = False


def short(value: float) -> str:
    """Return a value with as many digits as a picture needs."""
    if value >= 10 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def draw_bars(panels: Sequence[Bars]) -> str:
    """Return a picture of panels beside each other."""
    width = (WIDTH - _GAP * (len(panels) + 1)) / len(panels)
    height = _HEAD + _ROW * max(len(panel.bars) for panel in panels) + 14
    parts: list[str] = []
    for at, panel in enumerate(panels):
        parts += _panel(panel, _GAP + at * (width + _GAP), width)
    return _picture(height, parts, "; ".join(panel.title for panel in panels))


def _panel(panel: Bars, left: float, width: float) -> Iterable[str]:
    room = width - _NAMES - _VALUES
    yield _text(left, 24, panel.title, "ink title")
    yield _text(left, 42, panel.below, "faint")
    for at, bar in enumerate(panel.bars):
        top, is_cut = _HEAD + at * _ROW, bar.value > panel.most
        size = room * min(1.0, bar.value / panel.most)
        kind = "ours" if bar.ours else "theirs"
        yield _text(left + _NAMES - 8, top + 17, bar.name, "ink", "end")
        start = left + _NAMES
        yield f'<rect class="{kind}" x="{start:.1f}" y="{top + 4}" width="{size:.1f}" height="17"/>'
        if is_cut:
            x = start + size - 22
            yield (f'<path class="ground" d="M{x:.1f} {top + 22}l6 -19h6l-6 19z"/>')
        yield _text(start + size + 6, top + 17, short(bar.value), "ink")


class _Scale(NamedTuple):
    """Where a point stands in the plot."""

    right: float
    lowest: float
    highest: float
    logarithmic: bool

    def across(self, x: float) -> float:
        return _LEFT + _ROOM * x / self.right

    def up(self, y: float) -> float:
        share = y / self.highest
        if self.logarithmic:
            share = log10(y / self.lowest) / log10(self.highest / self.lowest)
        return _BOTTOM - _PLOT * share

    def levels(self) -> list[float]:
        if not self.logarithmic:
            return _ticks(self.highest)
        decades = round(log10(self.highest / self.lowest))
        return [self.lowest * 10.0**at for at in range(decades + 1)]


def _scale(picture: Lines) -> _Scale:
    xs = [x for line in picture.lines for x, _ in line.points]
    ys = [y for line in picture.lines for _, y in line.points]
    if not picture.logarithmic:
        return _Scale(_nice(max(xs)), 0.0, _nice(max(ys)), logarithmic=False)
    decades = floor(log10(min(ys))), ceil(log10(max(ys)))
    lowest, highest = (10.0**decade for decade in decades)
    return _Scale(_nice(max(xs)), lowest, max(highest, 10 * lowest), logarithmic=True)


def draw_lines(picture: Lines) -> str:
    """Return a picture of lines, each with its name at its end."""
    scale = _scale(picture)
    places = _apart({line.name: scale.up(line.points[-1][1]) for line in picture.lines})
    parts = [
        _text(_GAP, 24, picture.title, "ink title"),
        _text(_GAP, 42, picture.unit, "faint"),
        _text(_LEFT + _ROOM / 2, _BOTTOM + 38, picture.below, "faint", "middle"),
    ]
    for y in scale.levels():
        parts.append(f'<path class="grid" d="M{_LEFT} {scale.up(y):.1f}h{_ROOM}"/>')
        parts.append(_text(_LEFT - 8, scale.up(y) + 4, short(y), "faint", "end"))
    for x in _ticks(scale.right):
        parts.append(_text(scale.across(x), _BOTTOM + 18, short(x), "faint", "middle"))
    for line in picture.lines:
        parts += _line(line, scale, places[line.name])
    return _picture(_BOTTOM + _FOOT, parts, picture.title)


def _line(line: Line, scale: _Scale, place: float) -> Iterable[str]:
    """Draw a line, and its name at ``place``, to which a stroke leads where that is not near."""
    points = [(scale.across(x), scale.up(y)) for x, y in line.points]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    stroke = f'fill="none" stroke="{line.colour}" stroke-width="2.2"'
    yield f'<polyline points="{joined}" {stroke}/>'
    for x, y in points:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.colour}"/>'
    x, y = points[-1]
    if abs(place - y) > _NEAR:
        yield f'<path d="M{x:.1f} {y:.1f}L{x + 8:.1f} {place:.1f}" {stroke} opacity=".5"/>'
    label = f'x="{x + 10:.1f}" y="{place + 4:.1f}" fill="{line.colour}"'
    yield f"<text {label}>{escape(line.name)}</text>"


def _picture(height: float, parts: Iterable[str], title: str) -> str:
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    ground = f'<rect class="ground" width="{WIDTH}" height="{height}" rx="8"/>'
    body = "\n".join(
        (f"<title>{escape(title)}</title>", f"<style>{_STYLE}</style>", ground, *parts)
    )
    return f"{head}\n{body}\n</svg>\n"


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    at = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {at}>{escape(text)}</text>'


def _step(most: float) -> float:
    """Return the distance of four to ten ticks: 1, 2 or 5, ten times that, and so on."""
    size = 10.0 ** floor(log10(most / 4))
    return next(size * by for by in (5, 2, 1) if most / (size * by) >= 4)


def _nice(most: float) -> float:
    return ceil(most / _step(most)) * _step(most)


def _ticks(most: float) -> list[float]:
    return [at * _step(most) for at in range(round(most / _step(most)) + 1)]


def _apart(wanted: Mapping[str, float], distance: float = 15) -> dict[str, float]:
    """Return a place for each name, near the one that it wants, none upon another."""
    found: dict[str, float] = {}
    last = -distance
    for name, place in sorted(wanted.items(), key=lambda each: each[1]):
        last = found[name] = max(place, last + distance)
    return found
