"""What is kept of a measurement: on what machine, of which versions, when, and the figures."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.build import ROOT

RESULTS = ROOT / "bench" / "results"


def machine() -> dict[str, Any]:
    """Return what names this machine."""
    model, memory = platform.machine(), 0
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
        memory = int(Path("/proc/meminfo").read_text().split()[1]) // 1024
    return {
        "processor": model,
        "processors": len(os.sched_getaffinity(0)),
        "memory_mib": memory,
        "kernel": platform.release(),
        "python": " ".join(sys.version.split()),  # two builds of one version differ by a tenth
    }


def describe(what: Mapping[str, Any]) -> str:
    """Return a machine in one line."""
    return (
        f"{what['processors']} x {what['processor']}, {what['memory_mib']} MiB,"
        f" Linux {what['kernel']}, Python {what['python']}"
    )


def commit() -> str:
    """Return the commit of the tree, with ``+`` where files differ from it; empty without git."""
    try:
        head = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
        changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed else "")


def version_of(command: list[str]) -> str:
    """Return the first line that a program says of its version, wherever it says it."""
    with suppress(OSError, subprocess.CalledProcessError):
        return _output(*command).partition("\n")[0]
    return "unknown"


def now() -> datetime:
    """Return the time, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def keep(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def _output(*command: str) -> str:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    return (done.stdout or done.stderr).strip()
