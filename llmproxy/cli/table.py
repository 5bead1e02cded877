"""How a table is printed: as wide as the terminal, or in full where none is there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 100_000  # columns where the output is no terminal: nothing is cut or wrapped


def print_table(
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    footer: Sequence[str] = (),
    figures: Sequence[str] = (),
) -> None:
    """Print a table.

    Args:
        names: of the columns of words.
        rows: cells, of all columns.
        footer: the last line's, or nothing.
        figures: of the columns of figures, which stand behind those of words.
    """
    # Not at the top: no other command, and none that prints JSON, has to load it.
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, show_footer=bool(footer), footer_style="bold"
    )
    for at, name in enumerate((*names, *figures)):
        table.add_column(
            name.removesuffix("_tokens").replace("_", " "),
            Text(footer[at] if footer else ""),
            justify="left" if at < len(names) else "right",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    console().print(table)


def console() -> Console:
    """Return the terminal; where there is none, nothing is cut or wrapped."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_WIDE)


def shown(value: str | None) -> str:
    """Return a caller's word as a terminal may see it; a dash where there was none."""
    if value is None:
        return "-"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in value)
