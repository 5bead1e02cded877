"""Patterns of hosts: how each is read, and which hosts it stands for."""

from __future__ import annotations

from ipaddress import IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.config.host_pattern import (
    HostPatterns,
    as_compared,
    host_name_pattern,
    host_pattern,
)
from llmproxy.config.values import Wrong

LABELS = st.lists(st.sampled_from(["a", "b", "xn--p1ai", "w-1"]), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("api.example.com", "api.example.com"),
        ("API.Example.COM", "api.example.com"),
        ("localhost", "localhost"),
        ("_dmarc.example", "_dmarc.example"),
        ("*.example.com", "*.example.com"),
        ("*.Example.com", "*.example.com"),
        ("*.local", "*.local"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("*.bücher.example", "*.xn--bcher-kva.example"),
        ("10.1.2.3", "10.1.2.3"),
        ("[FD12:0:0::1]", "fd12::1"),
        # The shortest spelling of this one is not the same in every CPython.
        ("[::ffff:10.1.2.3]", str(IPv6Address("::ffff:a01:203"))),
    ],
)
def test_a_pattern_is_read_into_one_spelling(written: str, read: str) -> None:
    """Lower case, A-labels, and the shortest spelling of an IPv6 address."""
    assert host_pattern(written) == read


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (7, "a host's name"),
        ("", "a host's name"),
        ("*", "no pattern stands for all hosts"),
        ("*.", "no pattern stands for all hosts"),
        ("**.example.com", "only at the beginning"),
        ("*.*.example.com", "only at the beginning"),
        ("api.*.com", "only at the beginning"),
        ("*example.com", "only at the beginning"),
        ("example.com:443", "without a port"),
        ("*.example.com:443", "without a port"),
        ("[fd12::1]:443", "a host's name"),
        ("fd12::1", "a host's name"),
        ("example.com.", "a host's name"),
        (".example.com", "a host's name"),
        ("a b", "a host's name"),
        ("https://example.com", "a host's name"),
        ("*.10.1.2.3", "an address has no names below it"),
        ("*.[fd12::1]", "an address has no names below it"),
        ("10.1.2", "a host's name"),
        ("[fe80::1%eth0]", "a host's name"),
        ("a" * 64, "a host's name"),
    ],
)
def test_what_is_no_pattern_is_refused_with_the_reason(written: object, says: str) -> None:
    """The reason names the mistake where there is one that people make."""
    with pytest.raises(Wrong) as caught:
        host_pattern(written)
    assert says in caught.value.expected


@pytest.mark.parametrize("written", ["10.1.2.3", "[fd12::1]"])
def test_a_list_of_names_takes_no_address(written: str) -> None:
    """The error says so."""
    with pytest.raises(Wrong) as caught:
        host_name_pattern(written)
    assert "an address cannot stand here" in caught.value.expected


@pytest.mark.parametrize(
    ("name", "pattern", "matches"),
    [
        ("api.example.com", "api.example.com", True),
        ("API.Example.com.", "api.example.com", True),
        ("api.example.com..", "api.example.com", False),
        ("example.com", "api.example.com", False),
        ("api.example.com.evil.example", "api.example.com", False),
        ("a.example.com", "*.example.com", True),
        ("a.b.c.example.com", "*.example.com", True),
        ("A.EXAMPLE.COM.", "*.example.com", True),
        ("example.com", "*.example.com", False),
        (".example.com", "*.example.com", False),
        ("notexample.com", "*.example.com", False),
        ("a.example.com.evil.example", "*.example.com", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.30", "10.1.2.3", False),
        ("[FD12:0::1]", "[fd12::1]", True),
        ("fd12::1", "[fd12::1]", True),
        ("[fd12::1", "[fd12::1]", False),
        ("::", "[fd12::1]", False),
        (":", "[fd12::1]", False),
        ("", "*.example.com", False),
    ],
)
def test_a_host_is_compared_in_the_patterns_own_spelling(
    name: str, pattern: str, matches: bool
) -> None:
    """Case, one last dot and the spelling of an IPv6 address make no difference."""
    patterns = HostPatterns([host_pattern(pattern), "other.example", "*.other.example"])
    assert patterns.match(as_compared(name)) is matches


def test_an_empty_list_matches_nothing_and_is_false() -> None:
    """So a caller can tell at once that nothing is listed."""
    assert not HostPatterns([])
    assert not HostPatterns([]).match("a.example")
    assert HostPatterns(["a.example"])
    assert HostPatterns(["*.example"])


@given(domain=LABELS, below=LABELS)
def test_a_domain_stands_for_every_name_below_it_and_not_for_itself(
    domain: list[str], below: list[str]
) -> None:
    """At any depth; and no name that merely ends in the same letters."""
    patterns = HostPatterns(["*." + ".".join(domain)])
    assert patterns.match(".".join([*below, *domain]))
    assert not patterns.match(".".join(domain))
    assert not patterns.match("x" + ".".join(domain))


class _Counted(frozenset[str]):
    """A set that counts how often it is asked."""

    asked = 0

    def __contains__(self, name: object) -> bool:
        _Counted.asked += 1
        return super().__contains__(name)


def test_a_question_costs_as_much_as_the_host_has_labels() -> None:
    """A thousand patterns are not looked through, and an endless name is not taken apart."""
    patterns = HostPatterns(f"*.d{number}.example" for number in range(1000))
    patterns._domains = _Counted(patterns._domains)
    assert not patterns.match("a.b.c.d.example.org")
    assert _Counted.asked == 5
    assert not patterns.match("a." * 10_000 + "d1.example")
    assert _Counted.asked == 5
