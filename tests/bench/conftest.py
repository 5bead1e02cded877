"""The benchmark is in no sdist, and where it is not there is nothing to test."""

from __future__ import annotations

from pathlib import Path

collect_ignore_glob = [] if (Path(__file__).parents[2] / "bench").is_dir() else ["test_*.py"]
