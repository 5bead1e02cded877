"""The demo provider, proxies in front of it, and a provider that does what a test says."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sdk.directed_provider import DirectedProvider
from tests.sdk.sdks import KEY, SDKS
from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.demo import Demo
from tests.support.live_proxy import client_config
from tests.support.sockets import Provider
from tests.support.tls import Authority

NARROW_KEY = "narrow-client-key"
"""The key of a client that may use one model, on the routes named after the SDKs."""


@pytest.fixture(scope="session")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One authority to trust: the SDKs load all of the world's for each client, 20 ms each time."""
    return Authority(tmp_path_factory.mktemp("trusted")).ca_path


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, trusted: Path) -> None:
    """The SDKs go straight to loopback, with the keys that the tests give them and no others."""
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "ANTHROPIC_", "OLLAMA_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="session")
def demo() -> Iterator[Demo]:
    """A demo provider in a process of its own."""
    with Demo() as provider:
        yield provider


@pytest.fixture(scope="session")
def closed_url() -> Iterator[str]:
    """A URL at which nothing listens; the port stays taken, so that nothing can come there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(scope="session")
def proxy(
    tmp_path_factory: pytest.TempPathFactory, demo: Demo, closed_url: str
) -> Iterator[Daemon]:
    """A proxy in front of the demo provider; who calls must show a key.

    For each SDK it has a route ``NAME``; ``event-NAME``, which reports a break in an event;
    ``small-NAME``, which takes 1 KiB; ``kept-NAME``, whose content is recorded; ``drained-NAME``,
    which reads on for a caller that leaves; ``gone-NAME``, whose provider is not there.  On
    ``counted-openai`` every stream is asked for its counts.
    """
    config = client_config("team", KEY) + client_config("narrow", NARROW_KEY)
    config += f"routes = {list(SDKS)}\nmodels = ['demo-fast']\n"
    for sdk in SDKS:
        config += provider_table(sdk, url=demo.url, dialect=sdk) + provider_table(
            f"gone-{sdk}", url=closed_url, dialect=sdk
        )
        config += route_table(f"/{sdk}", sdk) + route_table(f"/gone-{sdk}", f"gone-{sdk}")
        config += route_table(f"/event-{sdk}", sdk) + "error_event = true\n"
        config += route_table(f"/kept-{sdk}", sdk) + 'capture = "content"\n'
        config += route_table(f"/drained-{sdk}", sdk) + 'on_disconnect = "drain"\n'
        config += route_table(f"/small-{sdk}", sdk) + 'request_body = "1KiB"\n'
    config += route_table("/counted-openai", "openai") + 'include_usage = "inject"\n'
    with Daemon(tmp_path_factory.mktemp("proxy"), config, proxy="") as daemon:
        yield daemon


@pytest.fixture(scope="session")
def open_proxy(tmp_path_factory: pytest.TempPathFactory, demo: Demo) -> Iterator[Daemon]:
    """A proxy for everybody, which holds 16 KiB of request bodies."""
    config = client_config("team", KEY) + '[limits]\nrequest_memory = "16KiB"\n'
    for sdk in SDKS:
        config += provider_table(sdk, url=demo.url, dialect=sdk) + route_table(f"/{sdk}", sdk)
    with Daemon(tmp_path_factory.mktemp("open_proxy"), config) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def directed_for_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DirectedProvider]:
    """A provider that tests direct, and a proxy in front of it.

    For each SDK the proxy has a route ``NAME``, whose provider has no credential; ``keyed-NAME``,
    whose provider has ``provider-key-of-NAME``; ``passing-NAME``, on which the callers' own keys
    cross.
    """
    directed = DirectedProvider()
    folder = tmp_path_factory.mktemp("directed_pair")
    secrets = folder / "credentials"
    secrets.mkdir(mode=0o700)
    with Provider(directed.play) as provider:
        url = provider.url
        config = client_config("team", KEY) + f'[credentials]\ndirectory = "{secrets}"\n'
        for sdk in SDKS:
            (secrets / sdk).write_text(f"provider-key-of-{sdk}\n")
            config += provider_table(sdk, url=url, dialect=sdk)
            config += (
                provider_table(f"keyed-{sdk}", url=url, dialect=sdk) + f'credential = "{sdk}"\n'
            )
            config += (
                provider_table(f"passing-{sdk}", url=url, dialect=sdk) + "pass_credential = true\n"
            )
            for name in (sdk, f"keyed-{sdk}", f"passing-{sdk}"):
                config += route_table(f"/{name}", name)
        with Daemon(folder, config, proxy="") as directed.proxy:
            yield directed


@pytest.fixture
def directed(directed_for_all: DirectedProvider) -> Iterator[DirectedProvider]:
    """The provider that does what the test says; at first it gives short, whole responses."""
    directed_for_all.reset()
    yield directed_for_all
    directed_for_all.reset()
