"""What is promised about versions, what is pinned, and the two commands of the README."""

from __future__ import annotations

import re
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def promised() -> list[Requirement]:
    """Every requirement of setup.cfg, those of the extras included, but for our own name."""
    setup = ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    lines = [line for text in texts for line in text.splitlines() if line]
    return [wanted for line in lines if (wanted := Requirement(line)).name != "llmproxy"]


def pins(text: str) -> dict[str, str]:
    """The versions of a constraints file, by canonical name.

    Raises:
        ValueError: a line is not ``name==version``.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        pin = re.fullmatch(r"([\w.-]+)==([\w.!+]+)", line)
        if pin is None:
            raise ValueError(line)
        found[canonicalize_name(pin[1])] = pin[2]
    return found


def unmet(wanted: list[Requirement], pinned: dict[str, str]) -> list[str]:
    """The requirements that have no pin, or one that does not satisfy them."""
    return [
        str(requirement)
        for requirement in wanted
        if not requirement.specifier.contains(pinned.get(canonicalize_name(requirement.name), "0"))
        or canonicalize_name(requirement.name) not in pinned
    ]


def closure(names: list[Requirement]) -> list[Requirement]:
    """These requirements and all that the installed distributions among them require in turn."""
    todo = list(names)
    done: dict[str, Requirement] = {}
    while todo:
        wanted = todo.pop()
        if str(wanted) in done:
            continue
        done[str(wanted)] = wanted
        try:
            further = requires(wanted.name) or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, further):
            extras = [{"extra": extra} for extra in ("", *wanted.extras)]
            if requirement.marker is None or any(map(requirement.marker.evaluate, extras)):
                todo.append(requirement)
    return list(done.values())


def test_every_promise_is_pinned() -> None:
    """Each requirement of setup.cfg has a pin inside its range."""
    wanted = promised()
    assert {"twisted", "treq", "pytest", "ruff"} <= {requirement.name for requirement in wanted}
    assert unmet(wanted, pins((ROOT / "constraints.txt").read_text())) == []


def test_a_default_install_reads_all_codings() -> None:
    """What opens brotli and zstd is no extra; the extra of old is still a name, of nothing."""
    setup = ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")
    markers = {wanted.name: str(wanted.marker) for wanted in map(Requirement, filter(None, lines))}
    assert markers["brotli"] == "None"
    assert markers["backports-zstd"] == 'python_version < "3.14"'
    assert setup["options.extras_require"]["codings"] == ""


def test_every_promise_is_a_range() -> None:
    """Each requirement of setup.cfg says from which version on."""
    assert [str(r) for r in promised() if not any(s.operator == ">=" for s in r.specifier)] == []


def test_what_the_promises_need_is_pinned_too() -> None:
    """What the installed requirements require in turn has a pin that satisfies them."""
    assert unmet(closure(promised()), pins((ROOT / "constraints.txt").read_text())) == []


@pytest.mark.parametrize(
    "pin", ["", "twisted==25.5.0", "twisted==27.1.0", "treq==26.10.0"], ids=str
)
def test_a_missing_or_a_wrong_pin_is_found(pin: str) -> None:
    """A requirement without a pin, or with one below or above its range, is found."""
    wanted = [Requirement("twisted[tls]>=26.10,<27")]
    assert unmet(wanted, pins(pin)) == ["twisted[tls]<27,>=26.10"]


@pytest.mark.parametrize(
    "line", ["treq", "treq>=26.7", "treq==26.7,<27", "treq @ https://example.com/treq.whl"]
)
def test_a_line_that_pins_nothing_is_found(line: str) -> None:
    """A constraints file holds plain pins: no range, no place, no bare name."""
    with pytest.raises(ValueError, match=re.escape(line)):
        pins(line)


@pytest.mark.parametrize("command", ["make run", "make test"])
def test_the_readme_names_the_two_commands(command: str) -> None:
    """A reader of the README learns how to see the program and how to test it."""
    assert command in (ROOT / "README.rst").read_text(encoding="utf-8")
