"""What the tests of listeners are given: an authority, and a listener's TLS or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmproxy.server.tls import ListenerTls
from tests.support.keypairs import Vault


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    """An authority, and what it issues."""
    return Vault(tmp_path)


@pytest.fixture(params=["plain", "tls"])
def tls(request: Any, vault: Vault) -> ListenerTls | None:
    """The TLS of a listener; None where it is plain."""
    return ListenerTls(vault.issue().keypair()) if request.param == "tls" else None
