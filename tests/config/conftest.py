"""What the tests of the configuration share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.configs import SECRET


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory for credential files that is closed to everybody else, with one in it."""
    directory = tmp_path / "credentials"
    directory.mkdir(mode=0o700)
    (directory / "key").write_text(SECRET + "\n")
    return directory
