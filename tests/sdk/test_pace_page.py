"""The page of the paced stream in a real browser, before and behind hops that hold streams back."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.chromium import Chromium
from tests.support.daemon import Daemon, provider_config
from tests.support.live_proxy import client_config, until
from tests.support.page import CHROMIUM
from tests.support.sockets import WAIT

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

KEY = "sk-team"
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
SETTINGS = {"n": "12", "interval": "100", "bytes": "400", "silence": "0", "format": "sse"}
SHOTS = os.environ.get("LLMPROXY_TEST_SHOTS")
"""A folder for pictures of what the tests saw, for somebody to look at."""

NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host $http_host;
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass http://127.0.0.1:{behind}; }}
        location /held/ {{
            proxy_pass http://127.0.0.1:{behind}/;
            proxy_ignore_headers X-Accel-Buffering;
            proxy_http_version 1.0;
            proxy_buffers 8 64k;
        }}
        location /gzip/ {{
            proxy_pass http://127.0.0.1:{behind}/;
            gzip on;
            gzip_types text/event-stream;
            gzip_min_length 0;
        }}
        location /both/ {{
            proxy_pass http://127.0.0.1:{behind}/;
            proxy_ignore_headers X-Accel-Buffering;
            gzip on;
            gzip_types text/event-stream;
            gzip_min_length 0;
        }}
        location /cut/ {{
            proxy_pass http://127.0.0.1:{behind}/;
            proxy_read_timeout 2s;
        }}
    }}
}}
"""

HAPROXY = """
defaults
    mode http
    option http-no-delay
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend front
    bind 127.0.0.1:{port}
    default_backend back
backend back
    server a 127.0.0.1:{behind}
"""

CADDY = """
{{
	admin off
	auto_https off
}}
http://127.0.0.1:{port} {{
	reverse_proxy 127.0.0.1:{behind}
}}
"""

CORKED = HAPROXY.replace("    option http-no-delay\n", "")
"""HAProxy's default: what is less than a segment waits for 200 ms."""

HOPS = {
    "corked": (CORKED, ("-db", "-f")),
    "nginx": (NGINX, ("-e", "stderr", "-c")),
    "haproxy": (HAPROXY, ("-db", "-f")),
    "caddy": (CADDY, ("run", "--adapter", "caddyfile", "--config")),
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A proxy with one client."""
    config = provider_config("http://127.0.0.1:1") + client_config("team", KEY)
    with Daemon(tmp_path_factory.mktemp("daemon"), config, proxy="") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """One browser for all tests."""
    with Chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


@contextmanager
def hop(name: str, folder: Path, behind: int) -> Iterator[int]:
    """Run a hop before ``behind``; yield its port."""
    command = "haproxy" if name == "corked" else name
    program = shutil.which(command, path=_PATH)
    if program is None:
        pytest.skip(f"{command} is not installed")
    text, options = HOPS[name]
    port = free_port()
    file = folder / f"{name}.conf"
    file.write_text(text.format(folder=folder, port=port, behind=behind))
    environment = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder)}
    with subprocess.Popen(
        [program, *options, str(file)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:

        def listens() -> bool:
            assert process.poll() is None, process.communicate()[1].decode()
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), WAIT):
                return True
            return False

        try:
            until(listens, f"{name} listens")
            yield port
        finally:
            process.terminate()
            process.communicate(timeout=WAIT)


@pytest.fixture(scope="module")
def nginx(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an nginx before the daemon."""
    with hop("nginx", tmp_path_factory.mktemp("nginx"), daemon.port) as port:
        yield port


def measure(browser: Chromium, url: str, *, key: str = KEY, **settings: str) -> dict[str, Any]:
    """Measure on the page at ``url``; return what it says."""
    browser.faults.clear()
    browser.asked.clear()
    browser.open(url)
    fields = {**SETTINGS, **settings, **({"key": key} if key else {})}
    for name, value in fields.items():
        browser.evaluate(f"document.getElementById({name!r}).value = {value!r}")
    browser.evaluate("document.getElementById('start').click()")
    browser.wait("document.getElementById('title').textContent !== ''", "there is a verdict")
    found: dict[str, Any] = browser.evaluate(
        """({
            word: document.getElementById('result').dataset.word,
            title: document.getElementById('title').textContent,
            text: document.getElementById('sentences').innerText,
            advice: document.getElementById('advice').innerText,
            progress: document.getElementById('progress').textContent,
            lines: document.querySelectorAll('#chart .way').length,
        })"""
    )
    return found


def picture(browser: Chromium, name: str) -> None:
    """Keep what the page looks like, if somebody wants to look at it."""
    if SHOTS is None:
        return
    for scheme, width in (("light", 1000), ("dark", 1000), ("light", 390)):
        browser.look(width=width, scheme=scheme)
        browser.screenshot(Path(SHOTS) / f"{name}-{scheme}-{width}.png")
    browser.look(width=1000, scheme="light")


@pytest.mark.parametrize("form", ["sse", "ndjson"])
def test_without_a_hop_it_streams(browser: Chromium, daemon: Daemon, form: str) -> None:
    """The page asks its own site alone, nothing is blocked, and each event is drawn."""
    origin = f"http://127.0.0.1:{daemon.port}"
    found = measure(browser, f"{origin}/-/pace/", format=form)
    assert (found["word"], found["title"]) == ("streams", "It streams.")
    assert found["progress"] == "12 of 12 events arrived."
    assert (found["lines"], found["advice"]) == (12, "")
    assert browser.evaluate("document.getElementById('rows').rows.length") == 12
    assert "request there" in browser.evaluate("document.getElementById('fields').textContent")
    assert browser.faults == []
    assert all(url.startswith(f"{origin}/-/pace") for url in browser.asked)
    assert not any(KEY in url for url in browser.asked)
    picture(browser, f"streams-{form}")


def test_a_hop_that_buffers_holds_it_to_the_end(browser: Chromium, nginx: int) -> None:
    """It is named, with the line to change."""
    found = measure(browser, f"http://127.0.0.1:{nginx}/held/-/pace/", bytes="200")
    assert (found["word"], found["title"]) == ("held_to_end", "Held until the end.")
    assert "On the way is nginx." in found["text"]
    assert "nginx: proxy_http_version 1.1;" in found["advice"]
    assert "nginx: proxy_buffering off;" in found["advice"]
    assert "1.0" in browser.evaluate("document.getElementById('fields').textContent")
    picture(browser, "held")


def test_a_hop_that_buffers_holds_blocks_where_there_is_more(browser: Chromium, nginx: int) -> None:
    """Of the size of its buffers."""
    found = measure(browser, f"http://127.0.0.1:{nginx}/held/-/pace/", n="40", bytes="10000")
    assert found["word"] == "held_in_blocks", found
    assert re.fullmatch(r"Held in blocks of 6\d KiB\.", found["title"])
    assert "blocks, one every" in found["text"]
    picture(browser, "blocks")


def test_a_hop_that_compresses_is_seen(browser: Chromium, nginx: int) -> None:
    """Also where it passes on each event at once."""
    found = measure(browser, f"http://127.0.0.1:{nginx}/gzip/-/pace/")
    assert (found["word"], found["title"]) == ("compressed", "Compressed with gzip.")
    assert "nginx: gzip off;" in found["advice"]
    picture(browser, "compressed")


def test_a_hop_that_compresses_and_buffers(browser: Chromium, nginx: int) -> None:
    """Both are said."""
    found = measure(browser, f"http://127.0.0.1:{nginx}/both/-/pace/")
    assert found["word"] == "held_to_end", found
    assert "compressed with gzip, too" in found["text"]
    assert "proxy_buffering off;" in found["advice"]
    assert "gzip off;" in found["advice"]


def test_a_hop_that_cuts_a_silence(browser: Chromium, nginx: int) -> None:
    """After how long, and what helps."""
    found = measure(browser, f"http://127.0.0.1:{nginx}/cut/-/pace/", silence="30")
    assert found["word"] == "cut", found
    # nginx may ring 0.3 s early, as it does not set a timer anew for less.
    assert re.fullmatch(r"Cut after (1\.[6-9]|2\.\d) s of silence\.", found["title"])
    assert "6 of 12 events arrived." in found["text"]
    assert 'heartbeat = "15s"' in found["advice"]
    assert found["progress"] == "6 of 12 events arrived. Then it was cut."
    picture(browser, "cut")


@pytest.mark.parametrize("name", ["nginx", "haproxy", "caddy"])
def test_hops_that_pass_it_on(browser: Chromium, daemon: Daemon, tmp_path: Path, name: str) -> None:
    """With their defaults, or with what the docs say."""
    with hop(name, tmp_path, daemon.port) as port:
        found = measure(browser, f"http://127.0.0.1:{port}/-/pace/")
    assert (found["word"], found["title"]) == ("streams", "It streams.")


def test_a_hop_that_waits_for_more(browser: Chromium, daemon: Daemon, tmp_path: Path) -> None:
    """For a fifth of a second; it names itself nowhere, so that several lines are shown."""
    with hop("corked", tmp_path, daemon.port) as port:
        found = measure(browser, f"http://127.0.0.1:{port}/-/pace/", n="20")
    assert found["word"] == "held_in_blocks", found
    assert "HAProxy: option http-no-delay" in found["advice"]


@pytest.mark.parametrize(
    ("key", "title", "text"),
    [
        ("", "Refused with status 401.", "No key was given."),
        ("other", "Refused with status 401.", "client keys"),
    ],
)
def test_a_wrong_key_is_told(
    browser: Chromium, daemon: Daemon, key: str, title: str, text: str
) -> None:
    """In the words of the proxy."""
    found = measure(browser, f"http://127.0.0.1:{daemon.port}/-/pace/", key=key)
    assert (found["word"], found["title"]) == ("refused", title)
    assert text in found["text"]
    assert found["lines"] == 0
    picture(browser, f"refused-{key}")


def test_stopping_ends_the_stream(browser: Chromium, daemon: Daemon) -> None:
    """At the proxy, too; the form can be used again."""

    def left() -> int:
        return sum(record["end_reason"] == "client_gone" for record in daemon.traces())

    before = left()
    browser.open(f"http://127.0.0.1:{daemon.port}/-/pace/")
    for name, value in {**SETTINGS, "key": KEY, "silence": "600"}.items():
        browser.evaluate(f"document.getElementById({name!r}).value = {value!r}")
    browser.evaluate("document.getElementById('start').click()")
    browser.wait("document.getElementById('bar').value === 6", "half of it is there")
    assert browser.evaluate("document.getElementById('start').disabled")
    assert left() == before
    browser.evaluate("document.getElementById('stop').click()")
    browser.wait("document.getElementById('title').textContent !== ''", "there is a verdict")
    until(lambda: left() == before + 1, "the proxy has noticed")
    assert browser.evaluate("document.getElementById('stop').disabled")
    assert not browser.evaluate("document.getElementById('start').disabled")


def test_the_keyboard_is_enough(browser: Chromium, daemon: Daemon) -> None:
    """From the key to the verdict; each field has a name, and the verdict is announced."""
    browser.open(f"http://127.0.0.1:{daemon.port}/-/pace/")
    browser.evaluate("document.getElementById('n').value = '12'")
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.id") == "key"
    browser.type(KEY)
    order = []
    for _ in range(6):
        browser.press("Tab")
        order.append(browser.evaluate("document.activeElement.id"))
    assert order == ["n", "interval", "bytes", "silence", "format", "start"]
    browser.press("Enter")
    browser.wait("document.getElementById('title').textContent !== ''", "there is a verdict")
    nodes = browser.accessible()
    names = {(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes}
    assert {
        ("textbox", "Client key"),
        ("spinbutton", "Events"),
        ("spinbutton", "Interval in ms"),
        ("spinbutton", "Size in bytes"),
        ("spinbutton", "Silence in s"),
        ("combobox", "Format"),
        ("button", "Measure"),
        ("heading", "It streams."),
    } <= names
    (image,) = (name for role, name in names if role == "image")
    assert image is not None
    assert "12 events" in image
    assert browser.evaluate("document.getElementById('result').ariaLive") == "polite"


def test_the_admin_site_measures_itself_and_leads_on(browser: Chromium, daemon: Daemon) -> None:
    """Without a key; the page at the clients' address is a link away."""
    origin = f"http://127.0.0.1:{daemon.admin_port}"
    found = measure(browser, f"{origin}/pace", key="")
    assert (found["word"], found["title"]) == ("streams", "It streams.")
    assert browser.faults == []
    assert all(url.startswith(f"{origin}/pace") for url in browser.asked)
    assert not browser.evaluate("document.getElementById('key').checkVisibility()")
    picture(browser, "admin")
    link = "document.getElementById('go').getAttribute('href')"
    for typed, leads in (
        ("https://llm.example.com", "https://llm.example.com/-/pace/"),
        ("https://llm.example.com/proxy/?x#y", "https://llm.example.com/proxy/-/pace/"),
        ("javascript:alert(1)", None),
        ("llm.example.com", None),
    ):
        browser.evaluate(
            f"document.getElementById('there').value = {typed!r};"
            "document.getElementById('there').dispatchEvent(new Event('input'))"
        )
        assert browser.evaluate(link) == leads
    browser.look(width=1000, scheme="dark")
    assert _is_dark(browser)
    browser.look(width=1000, scheme="light")
    assert not _is_dark(browser)


def _is_dark(browser: Chromium) -> bool:
    """Return whether the page's ground is darker than its text."""
    colours = browser.evaluate(
        "(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))"
    )
    ground, text = (sum(map(int, one[4:-1].split(","))) for one in colours)
    return ground < text
