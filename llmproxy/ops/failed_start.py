"""A start that fails, and where an operator finds the reason.

The reason is the last thing that the process writes, and the status line that ``systemctl status``
shows.  The exit code says whether another start could succeed: the units do not start a process
again whose configuration has a mistake (ADR-0023).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from llmproxy.ops.notify import send_status

MISTAKE = 78
"""The exit code if the configuration has a mistake, as ``EX_CONFIG`` of sysexits(3)."""

FAILED = 1
"""The exit code if something else fails, such as an address that is taken."""


def report(problems: Sequence[str], environ: Mapping[str, str], *, lead: str = "") -> None:
    """Write why the process cannot start; each problem is a line of standard error.

    Args:
        problems: one sentence each, at least one.
        environ: where the service manager says how to reach it.
        lead: stands before each line.
    """
    sys.stderr.write("".join(f"{lead}{problem}\n" for problem in problems))
    rest = f" (and {len(problems) - 1} more, see the log)" if len(problems) > 1 else ""
    send_status(environ, f"cannot start: {problems[0]}{rest}")
