"""Which requests have an access line in the log, and that a reload changes it."""

from __future__ import annotations

from pathlib import Path

from tests.support.daemon import Daemon, provider_config
from tests.support.live_proxy import read_response, until
from tests.support.reloads import reload
from tests.support.scripts import OK, reply
from tests.support.sockets import Provider, connect, request


def ask(daemon: Daemon, path: str) -> None:
    """Send a request, and wait until it is recorded."""
    with connect(daemon.port) as client:
        client.send(request("GET", path))
        read_response(client)
    until(lambda: any(trace["path"] == path for trace in daemon.traces()), "it is recorded")


def test_access_lines_can_be_switched_off(tmp_path: Path) -> None:
    """All of them, or those of what ended well; the records stay."""
    config = "[log]\naccess = true\n"
    with (
        Provider(reply(OK)) as provider,
        Daemon(tmp_path, provider_config(provider.url) + config) as daemon,
    ):
        ask(daemon, "/p/1")
        changed = reload(daemon, ("access = true", 'access = "errors"'))
        assert changed["changed"] == ["log"]
        ask(daemon, "/p/2")
        ask(daemon, "/none/3")
        reload(daemon, ('access = "errors"', "access = false"))
        ask(daemon, "/p/4")
        ask(daemon, "/none/5")
        reload(daemon, ("access = false", "access = true"))
        ask(daemon, "/p/6")
        daemon.wait_log("/p/6")
        lines = [line["path"] for line in daemon.log if line["logger"] == "llmproxy.access"]
        assert lines == ["/p/1", "/none/3", "/p/6"]
        assert len(daemon.traces()) == 6
