"""When to come again, in every form that providers send."""

from __future__ import annotations

import pytest

from llmproxy.dialects.retry_after import retry_after

NOW = 1_700_000_000.0  # 2023-11-14T22:13:20Z


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({}, None),
        ({b"retry-after": b"7"}, 7),
        ({b"retry-after": b"0"}, 0),
        ({b"retry-after": b"1.5"}, 1.5),
        ({b"retry-after": b"Tue, 14 Nov 2023 22:14:20 GMT"}, 60),
        ({b"retry-after": b"Tue, 14 Nov 2023 22:12:20 GMT"}, 0),
        ({b"retry-after": b"soon"}, None),
        ({b"retry-after": b"-1"}, None),
        ({b"retry-after": b"\xff"}, None),
        ({b"retry-after-ms": b"900", b"retry-after": b"1"}, 0.9),
        ({b"retry-after-ms": b"x", b"retry-after": b"3"}, 3),
        ({b"x-ratelimit-reset-requests": b"1s"}, 1),
        ({b"x-ratelimit-reset-tokens": b"6m0s"}, 360),
        ({b"x-ratelimit-reset-tokens": b"1h2m3.5s"}, 3723.5),
        ({b"x-ratelimit-reset-tokens": b"20ms"}, 0.02),
        ({b"x-ratelimit-reset-tokens": b"1m20ms"}, 60.02),
        ({b"x-ratelimit-reset-tokens": b"2d"}, 172_800),
        ({b"x-ratelimit-reset-tokens": b""}, None),
        ({b"x-ratelimit-reset": b"12"}, 12),
        ({b"x-ratelimit-reset": b"1700000030"}, 30),
        ({b"x-ratelimit-reset": b"1700000030500"}, 30.5),
        ({b"x-ratelimit-reset-requests": b"2023-11-14T22:13:30Z"}, 10),
        ({b"anthropic-ratelimit-requests-reset": b"2023-11-14T22:13:25Z"}, 5),
        ({b"anthropic-ratelimit-requests-reset": b"2023-11-14T22:13:25"}, None),
        ({b"x-ratelimit-reset-requests": b"1s", b"x-ratelimit-reset-tokens": b"9s"}, 1),
        ({b"retry-after": b"2", b"x-ratelimit-reset-requests": b"50s"}, 2),
    ],
)
def test_one_form(fields: dict[bytes, bytes], seconds: float | None) -> None:
    """What is no form of these says nothing."""
    found = retry_after(fields, NOW)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_the_limit_that_is_spent_counts() -> None:
    """Of several limits it is the one of which nothing is left."""
    fields = {
        b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"1s",
        b"x-ratelimit-remaining-tokens": b"0",
        b"x-ratelimit-reset-tokens": b"40s",
        b"anthropic-ratelimit-tokens-remaining": b"5",
        b"anthropic-ratelimit-tokens-reset": b"2023-11-14T23:13:20Z",
    }
    assert retry_after(fields, NOW) == 40
