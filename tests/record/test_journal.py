"""Whether systemd's journal reads what a process writes."""

from __future__ import annotations

import os

from llmproxy.record.journal import is_journal


def test_the_journal_is_known_by_device_and_inode() -> None:
    """As the service manager writes them into the environment, which children inherit."""
    journal, other = os.memfd_create("journal"), os.memfd_create("other")
    status = os.fstat(journal)
    environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    assert is_journal(journal, environ)
    assert not is_journal(other, environ)
    for none in ({}, {"JOURNAL_STREAM": ""}, {"JOURNAL_STREAM": "journal"}):
        assert not is_journal(journal, none)
    os.close(other)
    assert not is_journal(other, environ)
    os.close(journal)
