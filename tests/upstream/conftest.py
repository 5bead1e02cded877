"""What the tests of the upstream side are given."""

from __future__ import annotations

import pytest

from tests.support.tls import Authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that issues the certificates of providers."""
    return Authority(tmp_path_factory.mktemp("ca"))
