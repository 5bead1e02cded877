"""What the tests of the configuration share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.configs import vault


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory for credential files that is closed to everybody else, with one in it."""
    return vault(tmp_path)
