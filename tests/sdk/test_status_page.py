"""The operators' page in a real Chromium: what it shows, what it changes, and who can use it.

With ``LLMPROXY_TEST_SHOTS=FOLDER`` it leaves pictures there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench import build
from tests.support.chromium import Chromium
from tests.support.daemon import ROOT, Daemon, provider_table, route_table
from tests.support.live_proxy import LiveProxy, client_config, post, until, write_credential
from tests.support.page import CHROMIUM
from tests.support.programs import free_port
from tests.support.scripts import OK, SSE, event
from tests.support.sockets import Wire, chunked

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

AXE = ROOT / "tests" / "browser" / "node_modules" / "axe-core" / "axe.min.js"
SHOTS = os.environ.get("LLMPROXY_TEST_SHOTS")
TOKEN = "admin-TOKEN"
STREAMS = 50
HOSTILE = "<img src=x onerror=alert(1)>\u202e"
"""What a caller may put into the name of a model."""


def script(wire: Wire) -> None:
    """Stream to whoever asks for that, without an end; refuse everybody else."""
    asked = json.loads(wire.read_request().body)
    if not asked["stream"]:
        wire.send(OK.replace(b"200 OK", b"500 No"))
        return
    wire.send(SSE, chunked(event(0)) * (asked["n"] + 1))
    wire.wait_closed()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveProxy]:
    """A daemon with two providers and two clients, one of which has limits."""
    live = LiveProxy()
    live.script = script
    config = provider_table("alpha", "max_streams = 100", url=live.provider.url)
    config += provider_table("beta", url=live.provider.url)
    config += route_table("/a", "alpha") + route_table("/b", "beta")
    config += client_config("team-a", "key-a", "max_streams = 200\n")
    config += client_config("team-b", "key-b")
    config += write_credential(tmp_path, "admin-token", TOKEN)
    proxy = 'drain_timeout = "3s"'
    with (
        live.provider,
        Daemon(tmp_path, config, proxy=proxy, admin='token = "admin-token"') as live.daemon,
    ):
        yield live


@pytest.fixture
def streams(live: LiveProxy) -> Iterator[LiveProxy]:
    """The same with streams of both clients."""
    with ExitStack() as clients:
        for number in range(STREAMS):
            which = "ab"[number % 2]
            model = HOSTILE if number == 7 else f"model-{number % 3}"
            body = json.dumps({"model": model, "stream": True, "n": number}).encode()
            key = f"x-api-key: key-{which}"
            clients.enter_context(live.begin(f"/{which}/v1/chat/completions", body, key))
        body = b'{"model":"model-0","stream":false}'
        live.get(post("/a/v1/chat/completions", body, "x-api-key: key-a"))
        yield live


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chromium]:
    """A browser, which may have complained of nothing in the end."""
    with Chromium(tmp_path) as browser:
        browser.look(width=1400, scheme="light")
        yield browser


def site(live: LiveProxy) -> str:
    """Return where the page is."""
    return f"http://127.0.0.1:{live.daemon.admin_port}/"


def rows(browser: Chromium, table: str) -> list[list[str]]:
    """Return the texts of a table's cells."""
    body = f"document.querySelector('#{table} tbody')"
    found: list[list[str]] = browser.evaluate(
        f"[...{body}.rows].map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    return found


def text(browser: Chromium, name: str) -> str:
    """Return the text of an element."""
    found: str = browser.evaluate(f"document.getElementById('{name}').textContent")
    return found


def shows(browser: Chromium, table: str, count: int) -> None:
    """Wait until a table has so many rows."""
    wanted = f"document.querySelector('#{table} tbody').rows.length === {count}"
    browser.wait(wanted, f"{count} rows of {table}")


def picture(browser: Chromium, name: str) -> None:
    """Keep what the page looks like, if somebody wants to look at it."""
    for scheme, width in (("light", 1400), ("dark", 1400), ("light", 390)) if SHOTS else ():
        browser.look(width=width, scheme=scheme)
        browser.screenshot(Path(str(SHOTS)) / f"{name}-{scheme}-{width}.png")
    browser.look(width=1400, scheme="light")


def test_the_page_shows_what_runs(streams: LiveProxy, browser: Chromium) -> None:
    """All tables; it asks its own site alone, and what callers write is text and nothing else."""
    browser.open(site(streams))
    shows(browser, "streams", STREAMS)
    picture(browser, "status")
    assert text(browser, "total") == str(STREAMS)
    assert text(browser, "state") == ""
    cells = rows(browser, "streams")
    assert sorted({row[1] for row in cells}) == ["team-a", "team-b"]
    assert {row[5] for row in cells} == {"streaming"}
    assert [row[4] for row in cells].count(HOSTILE) == 1
    assert [row[:2] for row in rows(browser, "providers")] == [["alpha", "on"], ["beta", "on"]]
    (limited, _) = rows(browser, "clients")
    assert limited == ["team-a", "25", "max_streams: 25 of 200"]
    (ended,) = rows(browser, "ended")
    assert ended[2:8] == ["upstream_refused", "", "team-a", "alpha", "model-0", "500"]
    assert browser.faults == []
    assert {url.removeprefix(site(streams)).partition("?")[0] for url in browser.asked} == {
        *("", "status.css", "status.mjs", "events")
    }


def test_streams_are_sorted_and_filtered_by_the_server(
    streams: LiveProxy, browser: Chromium
) -> None:
    """By a heading, and by a form; the counts say of how many."""
    browser.open(site(streams))
    shows(browser, "streams", STREAMS)
    heading = "[...document.querySelectorAll('#streams th button')]"
    browser.evaluate(f"{heading}.find((one) => one.textContent === 'Events').click()")
    first = "document.querySelector('#streams tbody').rows[0].cells[8].textContent"
    browser.wait(f"{first} === '{STREAMS}'", "the one with the most events is first")
    browser.evaluate(f"{heading}.find((one) => one.textContent === 'Events').click()")
    browser.wait(f"{first} === '1'", "the one with the fewest events is first")
    sort = "document.querySelector('#streams th[aria-sort]')"
    assert browser.evaluate(f"{sort}.textContent + {sort}.ariaSort") == "Eventsascending"
    browser.evaluate("document.getElementById('client').value = 'team-b'")
    browser.evaluate("document.getElementById('filters').requestSubmit()")
    shows(browser, "streams", STREAMS // 2)
    assert text(browser, "window") == f"1 to 25 of 25 streams (of {STREAMS} in all)"
    browser.evaluate("document.getElementById('clear').click()")
    shows(browser, "streams", STREAMS)
    assert browser.faults == []


def confirm(browser: Chromium, button: str) -> None:
    """Press a button of a row, and say yes, by keyboard."""
    browser.evaluate(f"{button}.focus()")
    browser.press("Enter")
    browser.wait("document.getElementById('sure').open", "the page asks")
    browser.press("Enter")


def type_token(browser: Chromium, token: str) -> None:
    """Type the admin token."""
    browser.evaluate("document.getElementById('token').focus()")
    browser.evaluate("document.getElementById('token').select()")
    browser.type(token)


def test_a_stream_is_ended_from_the_page(streams: LiveProxy, browser: Chromium) -> None:
    """With the token alone; it is broken off, and the others go on."""
    browser.open(site(streams))
    shows(browser, "streams", STREAMS)
    button = "document.querySelector('#streams tbody').rows[3].querySelector('button')"
    name = browser.evaluate("document.querySelector('#streams tbody').rows[3].cells[0].textContent")
    type_token(browser, "wrong")
    confirm(browser, button)
    browser.wait("!document.getElementById('alert').hidden", "it says why not")
    assert text(browser, "alert") == "A change needs the admin token, as a Bearer."
    assert browser.evaluate("document.activeElement.id") == "token"
    assert len(rows(browser, "streams")) == STREAMS
    type_token(browser, TOKEN)
    confirm(browser, button)
    browser.evaluate("document.activeElement.blur()")
    shows(browser, "streams", STREAMS - 1)
    browser.wait("document.getElementById('alert').hidden", "nothing is wrong any more")
    browser.wait("document.querySelector('#ended tbody').rows.length === 2", "it has ended")
    assert [row[2] for row in rows(browser, "ended") if row[0] == name] == ["killed"]
    killed = until(
        lambda: [one for one in streams.daemon.traces() if one["id"] == name], "it is recorded"
    )
    assert killed[0]["end_reason"] == "killed"
    assert [fault for fault in browser.faults if "401" not in fault] == []


def test_a_provider_is_switched_from_the_page(live: LiveProxy, browser: Chromium) -> None:
    """Off and on again; the table says so."""
    browser.open(site(live))
    shows(browser, "providers", 2)
    row = "document.querySelector('#providers tbody').rows[0]"
    type_token(browser, TOKEN)
    confirm(browser, f"{row}.querySelector('button')")
    browser.wait(f"{row}.cells[1].dataset.word === 'off'", "it is off")
    confirm(browser, f"{row}.querySelector('button')")
    browser.wait(f"{row}.cells[1].dataset.word === 'on'", "it is on")
    assert browser.faults == []


def end_stream(live: LiveProxy, name: str) -> None:
    """End a stream, as another operator would."""
    url, bearer = f"{site(live)}streams/{name}", {"Authorization": f"Bearer {TOKEN}"}
    asked = urllib.request.Request(url, method="DELETE", headers=bearer)  # noqa: S310 - it is http
    with urllib.request.urlopen(asked, timeout=10) as response:  # noqa: S310 - it is http
        assert response.status == 200


def test_focus_stays_where_it_is(streams: LiveProxy, browser: Chromium) -> None:
    """While rows change; a stream that has ended meanwhile is struck out, and goes later."""
    browser.open(site(streams))
    shows(browser, "streams", STREAMS)
    last = "document.querySelector('#streams tbody').lastElementChild"
    name = browser.evaluate(f"{last}.cells[0].textContent")
    browser.evaluate(f"{last}.querySelector('button').focus()")
    end_stream(streams, browser.evaluate(f"{last}.parentNode.rows[0].cells[0].textContent"))
    browser.wait("document.querySelectorAll('#streams tr.over').length === 1", "one has ended")
    assert browser.evaluate("document.activeElement.closest('tr').cells[0].textContent") == name
    end_stream(streams, name)
    browser.wait("document.querySelectorAll('#streams tr.over').length === 2", "so has this one")
    assert browser.evaluate("document.activeElement.closest('tr').cells[0].textContent") == name
    browser.evaluate("document.activeElement.blur()")
    shows(browser, "streams", STREAMS - 2)


def test_the_page_says_what_the_process_does(streams: LiveProxy, browser: Chromium) -> None:
    """A reload that failed, a shutdown, and a daemon that is gone."""
    browser.open(site(streams))
    shows(browser, "streams", STREAMS)
    text_of = "document.getElementById('state').textContent"
    path = streams.daemon.config_path
    whole = path.read_text()
    path.write_text(whole + "\n[nonsense]\n")
    streams.daemon.process.send_signal(1)
    browser.wait(f"{text_of}.startsWith('The last reload failed')", "it says so")
    streams.daemon.take_errors()
    path.write_text(whole)
    streams.daemon.process.send_signal(1)
    browser.wait(f"{text_of} === ''", "it went well")
    browser.evaluate("document.getElementById('pause').click()")
    browser.wait(f"{text_of} === 'Updates are paused.'", "it stands still")
    browser.evaluate("document.getElementById('pause').click()")
    streams.daemon.terminate()
    browser.wait(f"{text_of}.startsWith('The proxy shuts down')", "it says so")
    browser.wait(f"{text_of}.startsWith('The connection to the proxy is lost')", "it is gone")


@pytest.mark.skipif(not AXE.exists(), reason="needs axe-core, which `make peers` installs")
@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 1400), ("light", 390)])
def test_everybody_can_use_the_page(
    streams: LiveProxy, browser: Chromium, scheme: str, width: int
) -> None:
    """axe-core finds nothing that is wrong, with an open dialog neither."""
    browser.look(width=width, scheme=scheme)
    browser.open(site(streams))
    shows(browser, "streams", STREAMS)
    browser.evaluate(AXE.read_text() + ";0")
    for what in ("0", "document.querySelector('#providers tbody button').click()"):
        browser.evaluate(what)
        found: list[dict[str, Any]] = browser.evaluate(
            "axe.run().then((found) => found.violations.map((one) => ({id: one.id,"
            " impact: one.impact, where: one.nodes.map((node) => node.html).slice(0, 3)})))"
        )
        assert found == []
    narrow = "document.documentElement.scrollWidth <= window.innerWidth"
    assert browser.evaluate(narrow), "the page itself is not wider than the window"


MANY = 5000


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, for the load generator")
@pytest.mark.timeout(180)
def test_the_page_is_quick_where_thousands_of_streams_run(
    tmp_path: Path, browser: Chromium
) -> None:
    """It gets a window of them; what it does for one update is a matter of milliseconds."""
    port = free_port()
    config = provider_table("p", url=f"http://127.0.0.1:{port}") + route_table("/p", "p")
    config += client_config("many", "bench-key")
    options = "--mode stream --events 90 --interval-us 1000000 --ramp 10 --timeout 150"
    with (
        subprocess.Popen([build.tool("mock"), str(port)]) as provider,
        Daemon(tmp_path, config, proxy='drain_timeout = "100ms"') as daemon,
    ):
        load = [build.tool("load"), *options.split(), "--conns", str(MANY)]
        load += ["--port", str(daemon.port), "--path", "/p/v1/chat/completions"]
        with subprocess.Popen([*load, "--key", "bench-key"], stdout=subprocess.DEVNULL) as clients:
            browser.open(f"http://127.0.0.1:{daemon.admin_port}/")
            browser.wait("+document.getElementById('total').textContent >= 4900", "many run")
            shown: list[float] = []
            for _ in range(5):
                updated = "document.getElementById('uptime').textContent"
                before = browser.evaluate(updated)
                browser.wait(f"{updated} !== '{before}'", "there is an update")
                shown.append(float(browser.evaluate("document.body.dataset.shownIn")))
            assert len(rows(browser, "streams")) == 50
            clients.kill()
        provider.kill()
    assert min(shown) < 50, shown
