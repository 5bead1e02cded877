"""What the live tests are given: an authority, a demo provider, both ways to reach a provider."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.collector import OtlpCollector
from tests.support.demo import Demo
from tests.support.live_proxy import PLAIN, Link, tls_link
from tests.support.tls import Authority


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority of the tests' own."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module", params=["plain", "tls"])
def link(request: pytest.FixtureRequest, authority: Authority) -> Link:
    """How the provider is reached: every promise about connections is kept both ways."""
    return PLAIN if request.param == "plain" else tls_link(authority)


@pytest.fixture(scope="session")
def demo() -> Iterator[Demo]:
    """The demo provider."""
    with Demo() as demo:
        yield demo


@pytest.fixture
def collector() -> Iterator[OtlpCollector]:
    """An OpenTelemetry collector without TLS."""
    collector = OtlpCollector()
    yield collector
    collector.close()
