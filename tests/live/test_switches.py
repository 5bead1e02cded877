"""Providers that an operator switches off on the admin site of a running daemon."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.live_proxy import LiveProxy, post, read_response, until, write_credential
from tests.support.reloads import reload
from tests.support.scripts import KEPT
from tests.support.sockets import Wire, connect, request

TOKEN = "admin-TOKEN-secret"


class Switched(LiveProxy):
    """A daemon with two providers, one of which gets a model of its own."""

    def ask_admin(
        self, path: str, *, token: str | None = None, method: str = "GET"
    ) -> tuple[int, Any]:
        """Send a request to the admin site; return its status and what it says."""
        fields = () if token is None else (f"Authorization: Bearer {token}",)
        with connect(self.daemon.admin_port) as operator:
            operator.send(request(method, path, *fields))
            got = read_response(operator)
        return got.status, got.json()

    def change(self, path: str, *, token: str | None = TOKEN) -> tuple[int, Any]:
        """Change something."""
        return self.ask_admin(path, token=token, method="POST")

    def error(self, path: str = "/p/x", model: str = "m") -> str | None:
        """Return the reason why a request is refused, or None where it is served."""
        got = self.get(post(path, json.dumps({"model": model}).encode()))
        assert (got.status == 200) is (got.error is None)
        return got.error


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Switched]:
    """Such a daemon, with an admin token."""
    live = Switched()

    def script(wire: Wire) -> None:
        while True:
            wire.read_request()
            wire.send(KEPT)

    live.script = script
    config = provider_table("p") + provider_table("q")
    config += route_table("/p", "p") + route_table(
        "/q", "q", 'override = { q = { model = "own" } }'
    )
    config = config.replace("URL", live.provider.url)
    config += write_credential(tmp_path, "admin-token", TOKEN)
    with live.provider, Daemon(tmp_path, config, admin='token = "admin-token"') as live.daemon:
        yield live
    shown = json.dumps(live.daemon.log) + live.daemon.errors + live.daemon.trace_path.read_text()
    assert "TOKEN" not in shown


def test_requests_to_a_provider_that_is_off_are_refused(live: Switched) -> None:
    """The error is ours, with a reason of its own; other providers serve on."""
    assert live.error() is None
    assert live.change("/providers/p/disable")[0] == 200
    before = live.provider.accepted
    got = live.get(request("GET", "/p/x"))
    assert (got.status, got.error) == (503, "provider_disabled")
    assert got.values(b"retry-after") == [b"60"]
    record = live.trace(got)
    assert (record["provider"], record["error"]) == ("p", "provider_disabled")
    skipped = [(one["outcome"], one["cause"]) for one in record["attempts"]]
    assert (record["end_reason"], skipped) == ("rejected", [("skipped", "disabled")])
    assert live.provider.accepted == before
    assert live.error("/q/x") is None
    assert live.change("/providers/p/enable")[0] == 200
    assert live.error() is None
    lines = [live.daemon.wait_log(f"provider p is switched {state}") for state in ("off", "on")]
    assert all(line["message"].endswith(", by 127.0.0.1") for line in lines)


def test_a_model_of_a_provider_is_off(live: Switched) -> None:
    """It is the model as the provider gets it: behind an override, the route's own."""
    live.change("/providers/p/disable?model=m")
    live.change("/providers/q/disable?model=own")
    assert [live.error(model=name) for name in ("m", "m2")] == ["provider_disabled", None]
    assert live.get(request("GET", "/p/x")).status == 200
    assert live.error("/q/x", "m2") == "provider_disabled"
    live.change("/providers/q/enable?model=own")
    assert live.error("/q/x", "m2") is None


def test_what_is_off_comes_back_after_its_time(live: Switched) -> None:
    """Without anybody's doing; who asks meanwhile hears when."""
    live.change("/providers/p/disable?for=3s")
    got = live.get(request("GET", "/p/x"))
    (told,) = got.values(b"retry-after")
    assert (got.status, 1 <= int(told) <= 3) == (503, True)
    until(lambda: live.error() is None, "it is on again")


def test_a_reload_keeps_what_is_off_and_config_shows_it(live: Switched) -> None:
    """It is not of the file; the configuration is shown with what it does not say."""
    live.change("/providers/p/disable?for=1h")
    reload(live.daemon, ('path = "/q"', 'path = "/q2"'))
    assert live.error() == "provider_disabled"
    config = live.ask_admin("/config")[1]
    assert config["admin"]["token"] is True
    (switch,) = config["switched_off"]
    assert (switch["provider"], switch["model"], switch["by"]) == ("p", None, "127.0.0.1")
    assert switch["since"] < switch["until"]
    rows = live.ask_admin("/providers")[1]
    assert [(row["name"], row["state"]) for row in rows] == [("p", "off"), ("q", "on")]
    assert rows[0]["switched_off"] == config["switched_off"]
    assert live.error("/q2/x") is None
    assert live.ask_admin("/providers")[1][1]["connections"]["idle"] == 1


def test_nothing_changes_without_the_token(live: Switched) -> None:
    """Another one is a 401; when the file has none, every one is a 403."""
    assert live.change("/providers/p/disable", token=None)[0] == 401
    assert live.change("/providers/p/disable", token="wrong")[0] == 401
    reload(live.daemon, ('token = "admin-token"', ""))
    assert live.change("/providers/p/disable")[0] == 403
    assert live.error() is None
