"""How a line tells systemd's journal its priority (sd-daemon(3), ADR-0023).

A line that begins with ``<3>`` is an error.  The journal takes the prefix away, so that what stands
behind it is what ``journalctl -o cat`` shows.  Nobody else takes it away: it is written only where
the journal reads.  A line without a prefix is information.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

PRIORITIES = {"critical": b"<2>", "error": b"<3>", "warn": b"<4>", "debug": b"<7>"}
"""The prefix of each level that has one; ``info`` is what the journal takes a line for."""


def is_journal(descriptor: int, environ: Mapping[str, str]) -> bool:
    """Return whether the journal reads what is written to ``descriptor`` (systemd.exec(5)).

    Args:
        descriptor: open for writing.
        environ: where ``JOURNAL_STREAM`` may stand, the device and the inode of a stream.
    """
    stream = environ.get("JOURNAL_STREAM")
    if not stream:
        return False
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"
