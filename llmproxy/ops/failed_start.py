"""A start that fails, and where an operator finds the reason.

The reason is the last thing that the process writes, and the status line that ``systemctl status``
shows.  The exit code says whether another start could succeed: the units do not start a process
again whose configuration has a mistake (ADR-0023).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from llmproxy.ops.notify import send_status
from llmproxy.record.journal import is_journal
from llmproxy.record.log import plain_line

MISTAKE = 78
"""The exit code if the configuration has a mistake, as ``EX_CONFIG`` of sysexits(3)."""

FAILED = 1
"""The exit code if something else fails, such as an address that is taken."""

_LEAD = "llmproxy cannot start: "
_STDERR = 2


def report_mistakes(
    problems: Sequence[str], environ: Mapping[str, str], *, wall: Callable[[], float]
) -> None:
    """Write what is wrong with the configuration, before there is a log.

    Each problem is a line of standard error.  Where the journal reads that, it is a line as the log
    would have it.

    Args:
        problems: one sentence each, at least one.
        environ: where the service manager says how to reach it, and its journal.
        wall: seconds since the epoch.
    """
    if is_journal(_STDERR, environ):
        for problem in problems:
            line = plain_line(wall(), "error", __name__, f"{_LEAD}{problem}", journal=True)
            os.write(_STDERR, line)
    else:
        sys.stderr.write("".join(f"{problem}\n" for problem in problems))
    rest = f" (and {len(problems) - 1} more, see the log)" if len(problems) > 1 else ""
    send_status(environ, f"cannot start: {problems[0]}{rest}")


def report_failure(why: str, environ: Mapping[str, str]) -> None:
    """Write why the process cannot start, when standard error is the log already."""
    sys.stderr.write(f"{_LEAD}{why}\n")
    send_status(environ, f"cannot start: {why}")
