"""When a provider that refused a request says to come again.

``retry-after`` is HTTP's (RFC 9110, section 10.2.3): seconds, or a date.  ``retry-after-ms`` is
what OpenAI's SDKs look at first.  Where neither is there, the limits say when they are full again:
OpenAI and those who do as it does send ``x-ratelimit-reset-requests: 6m0s``, Anthropic sends
``anthropic-ratelimit-requests-reset`` with a time (RFC 3339).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime

_NUMBER = re.compile(rb"[0-9]{1,15}(\.[0-9]{1,9})?")
_GO_DURATION = re.compile(
    rb"(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m(?!s))?"
    rb"(?:([0-9]{1,9}(?:\.[0-9]{1,9})?)s)?(?:([0-9]{1,9}(?:\.[0-9]{1,9})?)ms)?"
)
_UNITS_S = (86400.0, 3600.0, 60.0, 1.0, 0.001)
_Reader = Callable[[str], datetime]
_EPOCH_S = 1_000_000_000.0
"""A number of seconds from here on is a time and no duration."""


def retry_after(first: Mapping[bytes, bytes], now: float) -> float | None:
    """Return in how many seconds to come again, or None where the response does not say.

    Args:
        first: the first value of each header field of the response.
        now: seconds since the epoch, for those that say a time.
    """
    if (value := first.get(b"retry-after-ms")) is not None and _NUMBER.fullmatch(value):
        return float(value) / 1000
    if (value := first.get(b"retry-after")) is not None:
        seconds = float(value) if _NUMBER.fullmatch(value) else _until(_http_date, value, now)
        if seconds is not None:
            return seconds
    resets = list(_resets(first, now))
    spent = [seconds for seconds, left in resets if left == b"0"]
    if spent:
        return max(spent)
    return min((seconds for seconds, _ in resets), default=None)


def _resets(first: Mapping[bytes, bytes], now: float) -> Iterator[tuple[float, bytes | None]]:
    """Yield when each limit is full again, and what is left of it now."""
    for name, value in first.items():
        if name.startswith(b"x-ratelimit-reset"):
            left = first.get(name.replace(b"reset", b"remaining", 1))
            seconds = _duration(value, now)
        elif name.startswith(b"anthropic-ratelimit-") and name.endswith(b"-reset"):
            left = first.get(name.removesuffix(b"reset") + b"remaining")
            seconds = _until(_rfc3339, value, now)
        else:
            continue
        if seconds is not None:
            yield seconds, left


def _duration(value: bytes, now: float) -> float | None:
    if _NUMBER.fullmatch(value):
        seconds = float(value)
        return seconds if seconds < _EPOCH_S else _since(seconds, now)
    found = _GO_DURATION.fullmatch(value)
    if found is None or not value:
        return _until(_rfc3339, value, now)
    return sum(float(part or 0) * unit for part, unit in zip(found.groups(), _UNITS_S, strict=True))


def _since(epoch: float, now: float) -> float:
    if epoch >= _EPOCH_S * 1000:
        epoch /= 1000  # in milliseconds
    return max(0.0, epoch - now)


def _until(read: _Reader, value: bytes, now: float) -> float | None:
    try:
        return max(0.0, read(value.decode("ascii")).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def _http_date(value: str) -> datetime:
    return parsedate_to_datetime(value)


def _rfc3339(value: str) -> datetime:
    found = datetime.fromisoformat(value)
    if found.tzinfo is None:
        raise ValueError("a time without its offset")
    return found
