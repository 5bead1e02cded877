"""The table: a block for each workload, a line for each proxy, and how they compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.works import BUSY, LATE, WORKS, Figures, Work, combine

Runs = Mapping[str, Mapping[str, Sequence[Figures]]]
"""By workload and proxy, the figures of each run."""

OURS = "llmproxy"


def ours_for(proxy: str) -> str:
    """Return which of the daemon's lines a proxy is compared with: by TLS, or plain."""
    return f"{OURS}-tls" if proxy.endswith("-tls") else OURS


def ratio(work: Work, ours: Figures, theirs: Figures) -> float | None:
    """Return how many times the peer's figure ours is, or None where one is missing."""
    mine, other = ours.get(work.main), theirs.get(work.main)
    if mine is None or not other:
        return None
    return mine / other


def ratios(work: Work, runs: Mapping[str, Sequence[Figures]]) -> dict[str, float]:
    """Return the ratio to each peer, of medians."""
    medians = {proxy: combine(seen) for proxy, seen in runs.items() if seen}
    found = {}
    for proxy, theirs in medians.items():
        ours = ours_for(proxy)
        if ours != proxy and ours in medians:
            value = ratio(work, medians[ours], theirs)
            if value is not None:
                found[proxy] = value
    return found


def number(value: float | None) -> str:
    """Return a figure with three digits that mean something."""
    if value is None:
        return "-"
    if not value:
        return "0"
    if abs(value) >= 1e5:
        return f"{value / 1000:.0f}k"
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def spread(work: Work, runs: Sequence[Figures]) -> str:
    """Return the least and the greatest of the main figure."""
    values = [run[work.main] for run in runs if work.main in run]
    return f"{number(min(values))}..{number(max(values))}" if len(values) > 1 else "-"


def remarks(figures: Figures) -> str:
    """Return what makes a line doubtful: failures, and a load generator that was at its end."""
    found = []
    if failed := figures.get("failures", 0):
        found.append(f"{failed:.0f} FAILED")
    if (share := figures.get("load_share", 0)) > BUSY:
        found.append(f"load generator at {share:.0f} %")
    if (share := figures.get("beyond_load_share", 0)) > BUSY:
        found.append(f"at the next step load generator at {share:.0f} %")
    if (late := figures.get("beyond_late_share", 0)) > LATE:
        found.append(f"at the next step {late:.0f} % of events sent late")
    if (late := figures.get("late_share", 0)) > LATE:
        found.append(f"{late:.0f} % of events sent late")
    return ", ".join(found)


def block(work: Work, runs: Mapping[str, Sequence[Figures]]) -> list[str]:
    """Return one workload's lines."""
    titles = [title for title, _ in work.columns]
    rows = [["", *titles, "runs", "PSS MiB", "load %", "ratio", ""]]
    compared = ratios(work, runs)
    for proxy, seen in runs.items():
        if not seen:
            rows.append([proxy, *("-" for _ in rows[0][1:-1]), "did not run"])
            continue
        medians = combine(seen)
        rows.append(
            [
                proxy,
                *(number(medians.get(name)) for _, name in work.columns),
                spread(work, seen),
                number(medians.get("pss_mib")),
                f"{medians.get('load_share', 0):.0f}",
                f"{compared[proxy]:.2f}" if proxy in compared else "",
                remarks(medians),
            ]
        )
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [f"{work.name}  {work.title}"]
    for row in rows:
        figures = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *figures, row[-1]]).rstrip())
    return lines


def table(runs: Runs) -> str:
    """Return everything, a block for each workload."""
    blocks = [block(WORKS[name], seen) for name, seen in runs.items()]
    text = "\n\n".join("\n".join(lines) for lines in blocks)
    return f"{text}\n\nratio: {OURS}'s figure divided by that one's, each pair by the same upstream"
