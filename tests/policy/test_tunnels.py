"""Which tunnels may be opened, in which words others are refused, and how many there may be."""

from __future__ import annotations

import pytest

from llmproxy.config import Tunnel
from llmproxy.config.tunnel_target import tunnel_target
from llmproxy.errors import ProxyError
from llmproxy.policy.tunnels import OpenTunnels, Tunnels

ALLOW = ["git.example.org:443", "*.example.com:443", "any.example.org:*", "[2606:4700::1]:443"]
ALLOW += ["1.1.1.1:853", "git.example.org:22"]


def tunnels(*allow: str, observe: bool = False, allow_private: bool = False) -> Tunnels:
    """Return what a configuration with this list says."""
    targets = tuple(map(tunnel_target, allow))
    return Tunnels(Tunnel(allow=targets, observe=observe, allow_private=allow_private))


def refusal(asked: Tunnels, host: str, port: int = 443) -> ProxyError:
    """Return how a tunnel is refused."""
    with pytest.raises(ProxyError) as caught:
        asked.permit(host, port)
    return caught.value


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("git.example.org", 443),
        ("git.example.org", 22),
        ("GIT.Example.ORG.", 443),
        ("a.example.com", 443),
        ("a.b.Example.com", 443),
        ("any.example.org", 1),
        ("any.example.org", 65535),
        ("[2606:4700:0::1]", 443),
        ("2606:4700::1", 443),
        ("1.1.1.1", 853),
    ],
)
def test_what_is_listed_passes(host: str, port: int) -> None:
    """Names, names below a domain, addresses, and every port if the list says so."""
    assert tunnels(*ALLOW).is_listed(host, port)
    assert tunnels(*ALLOW).permit(host, port) is False


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("git.example.org", 80, "Port not on the tunnel list for this host."),
        ("a.example.com", 80, "Port not on the tunnel list for this host."),
        ("1.1.1.1", 443, "Port not on the tunnel list for this host."),
        ("example.com", 443, "Host not on the tunnel list."),
        ("git.example.org.evil.example", 443, "Host not on the tunnel list."),
        ("2606:4700::2", 443, "Host not on the tunnel list."),
        ("16843009", 853, "Host not on the tunnel list."),  # 1.1.1.1, but the list has it so
        ("1.2.3.4.5", 443, "Host not on the tunnel list."),
        ("", 443, "Host not on the tunnel list."),
    ],
)
def test_what_is_not_listed_is_refused(host: str, port: int, words: str) -> None:
    """People see which of the two is not listed; the reason is one word."""
    assert not tunnels(*ALLOW).is_listed(host, port)
    error = refusal(tunnels(*ALLOW), host, port)
    assert (error.status, error.reason, error.message) == (403, "tunnel_refused", words)
    assert error.cause == ("port" if words.startswith("Port") else "host")


def test_without_a_list_everything_is_refused() -> None:
    """The words say so."""
    assert refusal(tunnels(), "git.example.org").message == "No host is on the tunnel list."


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LocalHost.", "a.localhost", "127.0.0.1", "127.1", "2130706433"),
        *("[::1]", "::1", "0", "0.0.0.0", "[::ffff:127.0.0.1]"),
    ],
)
@pytest.mark.parametrize("observe", [False, True])
def test_the_callers_own_machine_is_reached_past_the_proxy(host: str, observe: bool) -> None:
    """Most clients send localhost to the proxy by default: the refusal says what to set."""
    error = refusal(tunnels(*ALLOW, observe=observe), host, 11434)
    assert "NO_PROXY" in error.message
    assert error.cause == "localhost"


def test_the_proxys_machine_may_be_listed_on_purpose() -> None:
    """Then its name is as any other."""
    asked = tunnels("localhost:11434", allow_private=True)
    assert asked.permit("localhost", 11434) is False
    assert refusal(asked, "localhost", 22).message == "Port not on the tunnel list for this host."


@pytest.mark.parametrize("allow", [(), ("git.example.org:443",)])
def test_a_machine_of_ones_own_is_told_of_no_proxy_where_it_could_be_listed(
    allow: tuple[str, ...],
) -> None:
    """Also where private addresses may be listed, the caller is told how to reach its own."""
    assert "NO_PROXY" in refusal(tunnels(*allow, allow_private=True), "localhost").message


def test_what_is_observed_passes_and_is_marked() -> None:
    """Only what the list would refuse."""
    asked = tunnels(*ALLOW, observe=True)
    assert asked.permit("other.example", 443) is True
    assert asked.permit("git.example.org", 80) is True
    assert asked.permit("git.example.org", 443) is False
    assert tunnels(observe=True).permit("other.example", 443) is True


# --- how many -------------------------------------------------------------------------------------


def test_a_client_has_so_many_tunnels_at_once() -> None:
    """One that ends makes room; another client has its own."""
    counted = OpenTunnels()
    counted.enter("a", 2)
    counted.enter("a", 2)
    with pytest.raises(ProxyError) as caught:
        counted.enter("a", 2)
    assert (caught.value.status, caught.value.reason) == (429, "too_many_tunnels")
    assert dict(caught.value.fields)[b"x-llmproxy-limit"] == b"max_per_client"
    assert (len(counted), counted.refused) == (2, 1)
    counted.enter("b", 2)
    counted.leave("a")
    counted.enter("a", 2)
    assert len(counted) == 3


def test_zero_is_no_limit_and_nothing_is_kept_of_who_left() -> None:
    """A client without tunnels costs nothing."""
    counted = OpenTunnels()
    for _ in range(500):
        counted.enter("a", 0)
    for _ in range(500):
        counted.leave("a")
    assert len(counted) == 0
    assert not counted._by_client
