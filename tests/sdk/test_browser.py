"""Web pages with the real SDKs, in a real browser: what reaches a page, and what it may not do."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.sdk.sdks import KEY
from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.demo import Demo
from tests.support.live_proxy import client_config
from tests.support.page import BUNDLER, CHROMIUM, PAGE, PageServer, report_of, serving

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or not BUNDLER.exists(), reason="needs chromium and the packages of the page"
)


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    """The page's own server."""
    options = [
        "--bundle",
        "--keep-names",
        "--format=esm",
        "--platform=browser",
        "--log-level=error",
    ]
    bundled = subprocess.run(
        [BUNDLER, PAGE / "page.mjs", *options], check=True, capture_output=True
    )
    with serving(bundled.stdout) as server:
        yield server


@pytest.fixture(scope="module")
def anonymous(tmp_path_factory: pytest.TempPathFactory, demo: Demo) -> Iterator[Daemon]:
    """A proxy that asks nobody for a key."""
    config = provider_table("openai", url=demo.url) + route_table("/openai", "openai")
    with Daemon(tmp_path_factory.mktemp("anonymous"), config, proxy="anonymous = true") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, demo: Demo, server: PageServer, anonymous: Daemon
) -> dict[str, Any]:
    """What the page found, by the name of each call."""
    allowed = f'allowed_origins = ["{server.origin}"]'
    config = client_config("team", KEY)
    for sdk in ("openai", "anthropic"):
        config += provider_table(sdk, url=demo.url, dialect=sdk)
        config += route_table(f"/{sdk}", sdk, allowed)
    config += route_table("/closed", "openai")
    folder = tmp_path_factory.mktemp("browser")
    with Daemon(folder, config, proxy="") as proxy:
        server.config = {
            "proxy": f"http://127.0.0.1:{proxy.port}",
            "anonymous": f"http://127.0.0.1:{anonymous.port}",
            "key": KEY,
        }
        return report_of(server, folder)


@pytest.mark.parametrize("sdk", ["openai", "anthropic"])
def test_a_stream_reaches_the_page(found: dict[str, Any], sdk: str) -> None:
    """The browser asks first, and is granted all that the SDK sends."""
    assert "hi" in found[sdk]["value"]


def test_the_page_can_read_our_errors(found: dict[str, Any]) -> None:
    """With their words, their id and whether to ask again."""
    wrong = found["wrong"]
    assert (wrong["error"], wrong["status"], wrong["retry"]) == (
        "AuthenticationError",
        401,
        "false",
    )
    assert "client keys" in wrong["message"]
    assert len(wrong["id"]) == 24


def test_where_no_page_may_call_the_browser_keeps_the_response(found: dict[str, Any]) -> None:
    """The SDK sees no more than that there was no connection."""
    assert found["closed"]["error"] == "APIConnectionError"


def test_a_form_of_a_stranger_s_page_does_no_work(found: dict[str, Any], anonymous: Daemon) -> None:
    """It leaves the browser without a preflight; the provider is not asked."""
    assert found["form"] == {"value": "opaque"}
    (record,) = anonymous.traces()
    assert (record["error"], record["status"], record["attempts"]) == ("origin", 403, [])
