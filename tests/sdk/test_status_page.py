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
from llmproxy.admin.events import MOST_VIEWERS
from llmproxy.dialects.json_body import MODEL_BYTES
from tests.support.chromium import Chromium
from tests.support.daemon import ROOT, Daemon, provider_table, route_table
from tests.support.live_proxy import LiveProxy, client_config, post, until, write_credential
from tests.support.page import CHROMIUM
from tests.support.programs import free_port
from tests.support.scripts import OK, SSE, event
from tests.support.sockets import Wire, chunked, connect, request

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

AXE = ROOT / "tests" / "browser" / "node_modules" / "axe-core" / "axe.min.js"
SHOTS = os.environ.get("LLMPROXY_TEST_SHOTS")
TOKEN = "admin-TOKEN"
STREAMS = 50
HOSTILE = "<img src=x onerror=alert(1)>\u202e\u200b\U000e0041\u00a0"
"""What a caller may put into the name of a model."""
HOSTILE_SHOWN = r"<img src=x onerror=alert(1)>\u202e\u200b\u{e0041}\u00a0"
STATE = "document.getElementById('state').textContent"
HEADINGS = "[...document.querySelectorAll('#streams th button')]"


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


def at(browser: Chromium, table: str, title: str) -> int:
    """Return the place of a column."""
    titles = f"[...document.querySelector('#{table}').tHead.rows[0].cells]"
    found: int = browser.evaluate(f"{titles}.findIndex((one) => one.textContent === '{title}')")
    assert found >= 0
    return found


def column(browser: Chromium, table: str, title: str) -> list[str]:
    """Return the texts of a column."""
    place = at(browser, table, title)
    return [row[place] for row in rows(browser, table)]


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
    titles = "[...document.getElementById('streams').tHead.rows[0].cells].map((c) => c.textContent)"
    assert browser.evaluate(titles)[:4] == ["Client", "Model", "Phase", "Age"]
    assert set(column(browser, "streams", "Client")) == {"team-a", "team-b"}
    assert set(column(browser, "streams", "Phase")) == {"streaming"}
    assert column(browser, "streams", "Model").count(HOSTILE_SHOWN) == 1
    assert [row[:2] for row in rows(browser, "providers")] == [["alpha", "on"], ["beta", "on"]]
    (limited, _) = rows(browser, "clients")
    assert limited == ["team-a", "25", "max_streams: 25 of 200"]
    (ended,) = rows(browser, "ended")
    assert ended[1:7] == ["upstream_refused", "", "team-a", "model-0", "alpha", "500"]
    assert browser.faults == []
    assert {url.removeprefix(site(streams)).partition("?")[0] for url in browser.asked} == {
        *("", "status.css", "status.mjs", "events")
    }


def sort_by(browser: Chromium, title: str) -> None:
    """Press a heading."""
    browser.evaluate(f"{HEADINGS}.find((one) => one.textContent === '{title}').click()")


def first_row(browser: Chromium, title: str) -> str:
    """Return an expression for the text that the first stream's row has in a column."""
    place = at(browser, "streams", title)
    return f"document.querySelector('#streams tbody').rows[0].cells[{place}].textContent"


def test_streams_are_sorted_and_filtered_by_the_server(
    streams: LiveProxy, browser: Chromium
) -> None:
    """By a heading, and by a form; the counts say of how many."""
    browser.open(site(streams))
    shows(browser, "streams", STREAMS)
    sort_by(browser, "Events")
    first = first_row(browser, "Events")
    browser.wait(f"{first} === '{STREAMS}'", "the one with the most events is first")
    sort_by(browser, "Events")
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


def confirm(browser: Chromium, button: str, token: str = "") -> None:
    """Press a button of a row, and say yes, by keyboard; type the token if the page asks for it."""
    browser.evaluate(f"{button}.focus()")
    browser.press("Enter")
    browser.wait("document.getElementById('sure').open", "the page asks")
    if token:
        say_yes(browser, token)
    else:
        assert browser.evaluate("document.activeElement.id") == "sure-yes"
        browser.press("Enter")


def say_yes(browser: Chromium, token: str) -> None:
    """Type the token into the open dialog, and go on."""
    assert browser.evaluate("document.activeElement.id") == "token"
    browser.type(token)
    browser.press("Enter")


def is_refused(browser: Chromium, why: str) -> None:
    """Wait until the dialog is there again and says why."""
    wrong = "document.getElementById('sure-wrong')"
    browser.wait(
        f"document.getElementById('sure').open && {wrong}.textContent === '{why}'", "it asks again"
    )
    assert browser.evaluate(f"!{wrong}.hidden")


def test_a_stream_is_ended_from_the_page(streams: LiveProxy, browser: Chromium) -> None:
    """With the token alone; it is broken off, and the others go on."""
    browser.open(site(streams))
    shows(browser, "streams", STREAMS)
    button = "document.querySelector('#streams tbody').rows[3].querySelector('button')"
    name = column(browser, "streams", "Id")[3]
    confirm(browser, button, "wrong")
    is_refused(browser, "A change needs the admin token, as a Bearer.")
    assert len(rows(browser, "streams")) == STREAMS
    say_yes(browser, TOKEN)
    browser.wait("!document.getElementById('sure').open", "it is done")
    browser.evaluate("document.activeElement.blur()")
    shows(browser, "streams", STREAMS - 1)
    browser.wait("document.getElementById('alert').hidden", "nothing is wrong any more")
    browser.wait("document.querySelector('#ended tbody').rows.length === 2", "it has ended")
    ends = zip(column(browser, "ended", "Id"), column(browser, "ended", "End"), strict=True)
    assert (name, "killed") in ends
    killed = until(
        lambda: [one for one in streams.daemon.traces() if one["id"] == name], "it is recorded"
    )
    assert killed[0]["end_reason"] == "killed"
    assert [fault for fault in browser.faults if "401" not in fault] == []


@pytest.mark.parametrize("token", ["schlüssel", "ключ", "to\u200bken"])
def test_a_token_that_cannot_be_one_is_not_sent(
    live: LiveProxy, browser: Chromium, token: str
) -> None:
    """The page says what is wrong with it, and takes the right one."""
    browser.open(site(live))
    shows(browser, "providers", 2)
    row = "document.querySelector('#providers tbody').rows[0]"
    confirm(browser, f"{row}.querySelector('button')", token)
    is_refused(browser, "The token has characters that no token has.")
    picture(browser, "dialog")
    say_yes(browser, TOKEN)
    browser.wait(f"{row}.cells[1].dataset.word === 'off'", "it is off")
    assert browser.faults == []


def test_the_token_is_kept_by_the_open_page_alone(live: LiveProxy, browser: Chromium) -> None:
    """It is asked for once, until it is forgotten; no storage has it, and no field."""
    browser.open(site(live))
    shows(browser, "providers", 2)
    button = "document.querySelector('#providers tbody button')"
    forget = "document.getElementById('forget')"
    assert browser.evaluate(f"{forget}.hidden")
    confirm(browser, button, f" {TOKEN} ")
    browser.wait(f"{button}.textContent === 'Enable'", "it is off")
    confirm(browser, button)
    browser.wait(f"{button}.textContent === 'Disable'", "it is on")
    assert browser.evaluate("localStorage.length + sessionStorage.length") == 0
    assert browser.evaluate("document.cookie + document.getElementById('token').value") == ""
    assert TOKEN not in browser.evaluate("document.documentElement.outerHTML")
    browser.evaluate(f"{forget}.click()")
    assert browser.evaluate(f"{forget}.hidden")
    confirm(browser, button, TOKEN)
    browser.wait(f"{button}.textContent === 'Enable'", "it is off again")
    browser.open(site(live))
    shows(browser, "providers", 2)
    confirm(browser, button, TOKEN)
    browser.wait(f"{button}.textContent === 'Disable'", "the page asked again")
    assert browser.faults == []


def test_a_provider_is_switched_from_the_page(live: LiveProxy, browser: Chromium) -> None:
    """Off and on again; the table says so."""
    browser.open(site(live))
    shows(browser, "providers", 2)
    row = "document.querySelector('#providers tbody').rows[0]"
    confirm(browser, f"{row}.querySelector('button')", TOKEN)
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
    """While rows change; a stream that ends with the focus on it is struck out, and goes later."""
    browser.open(site(streams))
    shows(browser, "streams", STREAMS)
    names = column(browser, "streams", "Id")
    place = at(browser, "streams", "Id")
    last = "document.querySelector('#streams tbody').lastElementChild"
    focused = f"document.activeElement.closest('tr').cells[{place}].textContent"
    browser.evaluate(f"{last}.querySelector('button').focus()")
    for name in names[:3]:
        end_stream(streams, name)
    shows(browser, "streams", STREAMS - 3)
    assert browser.evaluate(focused) == names[-1]
    end_stream(streams, names[-1])
    over = "document.querySelectorAll('#streams tr.over').length"
    browser.wait(f"{over} === 1", "this one has ended")
    end_stream(streams, names[4])
    shows(browser, "streams", STREAMS - 4)
    assert (browser.evaluate(focused), browser.evaluate(over)) == (names[-1], 1)
    browser.evaluate("document.getElementById('pause').click()")  # no update takes the row away
    browser.evaluate("document.getElementById('pause').focus()")
    shows(browser, "streams", STREAMS - 5)
    assert browser.faults == []


def test_a_stream_that_ends_while_the_page_asks_about_it(
    streams: LiveProxy, browser: Chromium
) -> None:
    """Its row stays for the focus to come back to, and the page says that there is none."""
    browser.open(site(streams))
    shows(browser, "streams", STREAMS)
    name = column(browser, "streams", "Id")[5]
    browser.evaluate(
        "document.querySelector('#streams tbody').rows[5].querySelector('button').focus()"
    )
    browser.press("Enter")
    browser.wait("document.getElementById('sure').open", "the page asks")
    end_stream(streams, name)
    browser.wait("document.querySelectorAll('#streams tr.over').length === 1", "it has ended")
    say_yes(browser, TOKEN)
    browser.wait("!document.getElementById('alert').hidden", "it says so")
    assert text(browser, "alert") == "No request with this id is being served."
    assert browser.evaluate("document.activeElement.closest('tr').className") == "over"


def test_a_name_hides_nothing(streams: LiveProxy, browser: Chromium) -> None:
    """What cannot be seen of it, or turns text round, is written out: in cells, dialog, labels."""
    browser.open(site(streams))
    shows(browser, "streams", STREAMS)
    model = column(browser, "streams", "Model").index(HOSTILE_SHOWN)
    row = f"document.querySelector('#streams tbody').rows[{model}]"
    browser.evaluate(f"{row}.querySelector('button').click()")
    browser.wait("document.getElementById('sure').open", "the page asks")
    assert HOSTILE_SHOWN in text(browser, "sure-text")
    hidden = r"/[\u200b-\u200f\u202a-\u202e\u{e0000}-\u{e007f}]/u"
    assert not browser.evaluate(f"{hidden}.test(document.documentElement.outerHTML)")
    assert browser.faults == []


def test_the_longest_name_takes_little_room(live: LiveProxy, browser: Chromium) -> None:
    """Its beginning and its end are shown."""
    model = "x" * (MODEL_BYTES - 4) + "-end"
    body = json.dumps({"model": model, "stream": True, "n": 1}).encode()
    with live.begin("/a/v1/chat/completions", body, "x-api-key: key-a"):
        browser.open(site(live))
        browser.wait("document.getElementById('total').textContent === '1'", "it runs")
        (shown,) = column(browser, "streams", "Model")
        assert (shown[:3], shown[-4:]) == ("xxx", "-end")
        assert len(shown) <= 300
        width = "document.querySelector('#streams tbody td:nth-child(2)').offsetWidth"
        assert browser.evaluate(width) < 320
        browser.look(width=390, scheme="light")
        assert browser.evaluate(width) < 130


def follow_events(live: LiveProxy) -> Wire:
    """Return a connection that follows the events."""
    wire = connect(live.daemon.admin_port)
    wire.send(request("GET", "/events"))
    assert wire.read_head()[0] == b"HTTP/1.1 200 OK"
    return wire


def let_pass(live: LiveProxy, count: int) -> None:
    """Wait until the proxy has sent so many events, one a second, to somebody else."""
    with follow_events(live) as wire:
        for _ in range(count + 1):  # the first chunk says how soon to come again
            wire.read_chunk()


def test_paused_updates_show_what_is_asked_for(streams: LiveProxy, browser: Chromium) -> None:
    """A sort or a filter shows the next state once; nothing else does."""
    browser.open(site(streams))
    shows(browser, "streams", STREAMS)
    browser.evaluate("document.getElementById('pause').click()")
    sort_by(browser, "Events")
    browser.wait(f"{first_row(browser, 'Events')} === '{STREAMS}'", "it is sorted")
    names = column(browser, "streams", "Id")
    uptime = text(browser, "uptime")
    end_stream(streams, names[0])
    let_pass(streams, 4)
    assert (column(browser, "streams", "Id"), text(browser, "uptime")) == (names, uptime)
    assert text(browser, "state") == "Updates are paused."
    browser.evaluate("document.getElementById('client').value = 'team-a'")
    browser.evaluate("document.getElementById('filters').requestSubmit()")
    browser.wait(f"{first_row(browser, 'Client')} === 'team-a'", "it is filtered")
    assert set(column(browser, "streams", "Client")) == {"team-a"}
    assert text(browser, "state") == "Updates are paused."


@pytest.mark.parametrize("paused", [False, True])
def test_the_page_goes_on_when_the_daemon_comes_back(
    tmp_path: Path, browser: Chromium, paused: bool
) -> None:
    """It says that the connection is lost for as long as it is, and then shows the new process."""
    config = provider_table("alpha", url="http://127.0.0.1:1") + route_table("/a", "alpha")
    (tmp_path / "next").mkdir()
    with Daemon(tmp_path, config) as daemon:
        browser.open(f"http://127.0.0.1:{daemon.admin_port}/")
        shows(browser, "providers", 1)
        if paused:
            browser.evaluate("document.getElementById('pause').click()")
    browser.wait(f"{STATE}.startsWith('The connection to the proxy is lost')", "it is gone")
    config = config.replace("alpha", "omega")
    following = Daemon(tmp_path / "next", config, instance="next")
    whole = following.config_path.read_text()
    admin, port = '[admin]\nlisten = "tcp:', daemon.admin_port
    following.config_path.write_text(whole.replace(f"{admin}0", f"{admin}{port}"))
    with following:
        said = "Updates are paused." if paused else ""
        browser.wait(f"{STATE} === '{said}'", "it is back")
        assert text(browser, "instance") == ("0" if paused else "next")
        if paused:
            browser.evaluate("document.getElementById('pause').click()")
        browser.wait("document.getElementById('instance').textContent === 'next'", "it is shown")
        assert [row[0] for row in rows(browser, "providers")] == ["omega"]


def test_one_page_too_many_says_so(live: LiveProxy, browser: Chromium) -> None:
    """It tries again when the proxy told it to, and once more at once if the operator acts."""
    with ExitStack() as viewers:
        for _ in range(MOST_VIEWERS):
            viewers.enter_context(follow_events(live))
        browser.open(site(live))
        browser.wait(f"{STATE} !== 'Connecting …'", "it is refused")
        assert text(browser, "state") == (
            "As many pages and programs follow the events as may: 10. The page tries again in 5 s."
        )
    browser.wait(f"{STATE} === ''", "there is room")
    assert len(rows(browser, "providers")) == 2
    assert [fault for fault in browser.faults if "503" not in fault] == []


def test_an_attempt_to_come_is_dropped_where_the_operator_acts(
    live: LiveProxy, browser: Chromium
) -> None:
    """The page has one source of events, and does not open it anew later."""
    with ExitStack() as viewers:
        for _ in range(MOST_VIEWERS):
            viewers.enter_context(follow_events(live))
        browser.open(site(live))
        browser.wait(f"{STATE}.includes('tries again in')", "it is refused")
    browser.evaluate(
        "globalThis.opened = []; globalThis.EventSource = class extends EventSource {"
        " constructor(url) { super(url); opened.push(this); } }; 0"
    )
    until(lambda: live.gauge("client_connections") == 0, "the viewers are gone")
    sort_by(browser, "Events")
    browser.wait(f"{STATE} === ''", "there is room")
    let_pass(live, 8)
    assert browser.evaluate("opened.map((one) => one.readyState)") == [1]


def test_the_page_says_why_the_proxy_refuses(live: LiveProxy, browser: Chromium) -> None:
    """In the words of the proxy, whatever the status is; another filter mends it at once."""
    browser.open(site(live))
    shows(browser, "providers", 2)
    browser.evaluate("document.getElementById('client').value = 'x'.repeat(100_000)")
    browser.evaluate("document.getElementById('filters').requestSubmit()")
    browser.wait(f"{STATE}.includes('tries again in')", "it is refused")
    assert "too long" in text(browser, "state")
    browser.evaluate("document.getElementById('clear').click()")
    browser.wait(f"{STATE} === ''", "that was it")


def test_a_narrow_window_has_what_is_done_in_reach(streams: LiveProxy, browser: Chromium) -> None:
    """Without scrolling sideways, and with the client and the model beside it."""
    browser.look(width=390, scheme="light")
    browser.open(site(streams))
    shows(browser, "streams", STREAMS)
    for table in ("streams", "providers"):
        button = f"document.querySelector('#{table} tbody button')"
        browser.evaluate(f"{button}.scrollIntoView({{block: 'center', inline: 'nearest'}})")
        assert browser.evaluate(f"{button}.closest('.scroll').scrollLeft") == 0
        assert browser.evaluate(
            f"(() => {{ const box = {button}.getBoundingClientRect(); return box.left >= 0"
            " && box.right <= window.innerWidth && document.elementFromPoint(box.left +"
            f" box.width / 2, box.top + box.height / 2) === {button}; }})()"
        ), table
    row = "document.querySelector('#streams tbody').rows[7]"
    phase, end = at(browser, "streams", "Phase"), at(browser, "streams", "End it")
    right = f"{row}.cells[{phase}].getBoundingClientRect().right"
    left = f"{row}.cells[{end}].getBoundingClientRect().left"
    assert browser.evaluate(f"{right} <= {left}"), "client, model and phase are to be seen"


def test_all_of_it_works_by_keyboard(streams: LiveProxy, browser: Chromium) -> None:
    """With Tab and Enter alone: filter, sort, end a stream, type the token, and the rest behind."""

    def go_to(what: str) -> None:
        for _ in range(200):
            browser.press("Tab")
            if browser.evaluate(f"document.activeElement.matches('{what}')"):
                return
        raise AssertionError(f"Tab does not lead to {what}")

    browser.open(site(streams))
    shows(browser, "streams", STREAMS)
    go_to("#pause")
    go_to("#providers button")
    go_to("#client")
    browser.type("team-b")
    browser.press("Enter")
    shows(browser, "streams", STREAMS // 2)
    go_to("#streams th:nth-child(4) button")
    browser.press("Enter")
    browser.wait("document.querySelector('th[aria-sort]').ariaSort === 'ascending'", "it is sorted")
    go_to("#streams td button")
    browser.press("Enter")
    browser.wait("document.getElementById('sure').open", "the page asks")
    say_yes(browser, TOKEN)
    browser.wait("document.querySelectorAll('#streams tr.over').length === 1", "it has ended")
    assert browser.evaluate("document.activeElement.closest('tr').className") == "over"
    go_to("#streams td button")
    shows(browser, "streams", STREAMS // 2 - 1)
    go_to("#ended a")
    assert browser.faults == []


def test_the_page_says_what_the_process_does(streams: LiveProxy, browser: Chromium) -> None:
    """A reload that failed, a shutdown, and a daemon that is gone."""
    browser.open(site(streams))
    shows(browser, "streams", STREAMS)
    path = streams.daemon.config_path
    whole = path.read_text()
    path.write_text(whole + "\n[nonsense]\n")
    streams.daemon.process.send_signal(1)
    browser.wait(f"{STATE}.startsWith('The last reload failed')", "it says so")
    streams.daemon.take_errors()
    path.write_text(whole)
    streams.daemon.process.send_signal(1)
    browser.wait(f"{STATE} === ''", "it went well")
    browser.evaluate("document.getElementById('pause').click()")
    browser.wait(f"{STATE} === 'Updates are paused.'", "it stands still")
    browser.evaluate("document.getElementById('pause').click()")
    streams.daemon.terminate()
    browser.wait(f"{STATE}.startsWith('The proxy shuts down')", "it says so")
    browser.wait(f"{STATE}.startsWith('The connection to the proxy is lost')", "it is gone")


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
