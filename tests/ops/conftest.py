"""What the tests of the operator's side are given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher

Listening = list[LogEvent]


@pytest.fixture
def logged() -> Iterator[Listening]:
    """What is logged meanwhile."""
    events: Listening = []
    observer = cast(ILogObserver, events.append)
    globalLogPublisher.addObserver(observer)
    yield events
    globalLogPublisher.removeObserver(observer)
