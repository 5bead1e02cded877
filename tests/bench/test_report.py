"""Results become tables and pictures; what they show is what was kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from bench import report, svg
from bench.build import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def result(**runs: Any) -> dict[str, Any]:
    """Return what a run of these workloads and proxies keeps."""
    machine = {"processor": "X", "processors": 2, "memory_mib": 2048, "kernel": "6.1"}
    return {
        "date": "2026-11-30T00:00:00+00:00",
        "commit": "abc",
        "machine": {**machine, "python": "3.11"},
        "versions": {
            "go": "go version go1.19 linux/amd64",
            "nginx": "/usr/sbin/nginx *1.22.1*",
            "aiohttp": "3.14.5 uvloop 0.23.0",
            "haproxy": "unknown",
        },
        "runs": runs,
    }


COST = result(
    W1={"llmproxy": [{"us_event": 40.0}], "nginx": [{"us_event": 30.0}], "go": []},
    W3={
        "llmproxy": [{"us_request": 200.0}],
        "nginx": [{"us_request": 16.0, "load_share": 99.0}],
        "litellm": [{"us_request": 9000.0}],
        "llmproxy-3.12.1": [{"us_request": 250.0}],
    },
)
STEPS = result(
    STREAMS={
        "llmproxy": [{"max_streams": 500.0, "delay_p99@250": 900.0, "delay_p99@500": 80_000.0}],
        "envoy": [{"max_streams": 250.0, "delay_p99@250": 2000.0, "pss_mib@250": 90.0}],
    },
    START={"llmproxy": [{"idle_mib": 40.0}]},
    W4={"llmproxy": [{"pss_mib": 120.0}]},
)


def parts(picture: str, name: str) -> list[ET.Element]:
    """Return the parts of a kind; the picture is well-formed."""
    return list(ET.fromstring(picture).iter(f"{SVG}{name}"))  # noqa: S314, our own


def texts(picture: str) -> list[str]:
    """Return what can be read in a picture."""
    return [found.text or "" for found in parts(picture, "text")]


def test_rounds_of_several_results_count_together() -> None:
    """The median is of all of them, and other machines or commits do not count together."""
    other = result(W1={"llmproxy": [{"us_event": 50.0}, {"us_event": 60.0}]})
    assert report.joined([COST, other])["W1"]["llmproxy"] == {"us_event": 50.0}
    assert "go" not in report.joined([COST])["W1"]
    with pytest.raises(ValueError, match="one commit"):
        report.joined([COST, {**other, "commit": "abd"}])


def test_a_table_has_a_line_for_each_proxy_that_was_measured() -> None:
    """A busy load generator's figure is in brackets; a figure that is missing is empty."""
    medians = report.joined([COST])
    columns = report.TABLES[0][1]
    found = report.rows(medians, columns, report.proxies_of(medians))
    assert [line[0] for line in found] == ["..", "llmproxy", "nginx", "LiteLLM"]
    assert found[1][1:] == ["40.0", "", "", "200", ""]
    assert found[2][4] == "(16.0)"
    table = report.grid(found).splitlines()
    assert {len(line) for line in (table[0], table[2], table[-1])} == {len(table[0])}
    assert table[1].startswith("..        W1 µs/event  ")


def test_the_page_gets_tables_versions_and_pictures() -> None:
    """All stands between the comments, and other interpreters have a table of their own."""
    page = f"before\n\n{report._BEGIN}\n\nold\n\n{report._END}\n\nafter\n"
    made = report.rewritten(page, report.block([COST], {"benchmark-cost.svg": ""}))
    assert made.startswith("before\n")
    assert made.endswith("\nafter\n")
    assert "old" not in made
    assert ".. image:: benchmark-cost.svg\n   :alt: " in made
    assert "benchmark-delay.svg" not in made
    said = "* Go: 1.19\n* nginx: 1.22.1\n* aiohttp: 3.14.5 uvloop 0.23.0\n* HAProxy: unknown\n"
    assert said in made
    assert "Medians of at least 1 round, 2026-11-30, commit abc, on 2 processors (X),\n" in made
    assert "llmproxy-3.12.1" in made.partition("The daemon by several CPythons:")[2]
    assert "llmproxy-3.12.1" not in made.partition("The daemon by several CPythons:")[0]
    assert report.rewritten(made, report.block([COST], {"benchmark-cost.svg": ""})) == made
    with pytest.raises(ValueError, match="one block"):
        report.rewritten("a page", "a block")


def test_the_picture_of_costs_cuts_what_is_much_longer() -> None:
    """Every proxy has its value; a bar of many times ours ends at the panel's end."""
    picture = report.pictures(report.joined([COST]))["benchmark-cost.svg"]
    assert {"llmproxy", "nginx", "LiteLLM", "40", "16", "9,000"} <= set(texts(picture))
    by_kind = [(one.get("class"), float(one.get("width", 0))) for one in parts(picture, "rect")]
    by_kind = [each for each in by_kind if each[0] != "ground"]
    (ours,) = [width for kind, width in by_kind[2:] if kind == "ours"]
    assert max(width for _, width in by_kind) == pytest.approx(4 * ours, abs=0.5)


def test_lines_end_with_the_last_step_that_held() -> None:
    """Each proxy with steps has a line; memory begins at the start and ends with W4."""
    made = report.pictures(report.joined([STEPS]))
    assert set(made) == {"benchmark-delay.svg", "benchmark-memory.svg"}
    delay = parts(made["benchmark-delay.svg"], "polyline")
    lines = [one.get("points", "").split() for one in delay]
    assert [len(points) for points in lines] == [2, 1]
    memory, _ = parts(made["benchmark-memory.svg"], "polyline")
    assert len(memory.get("points", "").split()) == 2
    assert {"llmproxy", "Envoy", "5,000"} <= set(texts(made["benchmark-memory.svg"]))


def test_a_picture_has_colours_for_light_and_dark() -> None:
    """It has a ground of its own, whose colour follows the reader's."""
    bars = svg.Bars("a < b", "c", [svg.Bar("x & y", 1.0)], 1.0)
    picture = svg.draw_bars([bars])
    assert {"a < b", "x & y"} <= set(texts(picture))
    light, dark = picture.split("@media(prefers-color-scheme:dark)")
    assert ".ground{fill:#fff}" in light
    assert ".ground{fill:#0d1117}" in dark


def test_names_at_the_ends_of_lines_are_not_upon_each_other() -> None:
    """They keep their order and a distance, and one that stands alone stays where it is."""
    places = svg._apart({"a": 100.0, "b": 101.0, "c": 102.0, "d": 300.0})
    assert places == {"a": 100.0, "b": 115.0, "c": 130.0, "d": 300.0}


@pytest.mark.parametrize(
    ("most", "ticks"),
    [(2500.0, [0, 500, 1000, 1500, 2000, 2500]), (350.0, [0, 50, 100, 150, 200, 250, 300, 350])],
)
def test_ticks_are_round_numbers(most: float, ticks: list[float]) -> None:
    """Four to ten of them."""
    assert svg._ticks(most) == ticks


def test_results_are_written_into_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page and its pictures, or nothing where results are not of one machine."""
    kept = [tmp_path / "one.json", tmp_path / "two.json"]
    kept[0].write_text(json.dumps(COST))
    kept[1].write_text(json.dumps({**STEPS, "commit": "other"}))
    page = tmp_path / report.PAGE
    page.write_text(f"{report._BEGIN}\n{report._END}\n")
    assert report.main([*map(str, kept), "--docs", str(tmp_path)]) == 1
    assert "nothing is written: the results are not of one commit" in capsys.readouterr().out
    kept[1].write_text(json.dumps(STEPS))
    assert report.main([*map(str, kept), "--docs", str(tmp_path)]) == 0
    shown = page.read_text()
    names = [line.partition(":: ")[2] for line in shown.splitlines() if ".. image" in line]
    assert names == list(report._PICTURES)
    assert all((tmp_path / name).is_file() for name in names)


def test_the_page_of_this_tree_can_be_written() -> None:
    """It has the one block that is written anew."""
    page = (ROOT / "docs" / report.PAGE).read_text()
    assert "\nX\n" in report.rewritten(page, "X")
