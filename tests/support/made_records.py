"""Records of all kinds, as Hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st

from llmproxy.record.ledger_steps import TOKENS
from llmproxy.record.trace import Attempt, Trace
from tests.support.records import trace


def words(*choices: str) -> st.SearchStrategy[str | None]:
    """Choose one of these, or None."""
    return st.sampled_from((None, *choices))


COUNTS = st.none() | st.just(0) | st.integers(0, 10**12)
TRACES = st.lists(
    st.builds(
        lambda number, **fields: trace(number, **fields),
        st.integers(0, 10**6),
        time=st.sampled_from([f"2026-11-0{day}T12:00:00.00{day}Z" for day in range(1, 5)]),
        client=words("a", "b"),
        model=words("m", "n"),
        provider=words("p"),
        method=st.sampled_from(["POST", "OPTIONS"]),
        session=words("s", "t", ""),
        is_complete=st.booleans(),
        usage=words("reported", "partial", "none"),
        end_reason=st.sampled_from(["complete", "client_gone", "rejected", "upstream_refused"]),
        **dict.fromkeys(TOKENS, COUNTS),
    ),
    max_size=30,
)
"""Requests to providers."""

OTHERS = st.lists(
    st.builds(
        lambda **fields: trace(**fields),
        time=st.sampled_from([f"2026-11-0{day}T12:00:00.00{day}Z" for day in range(1, 5)]),
        client=words("a", "b"),
        session=words("s"),
        route=words("r"),
        provider=words("p"),
        path=st.sampled_from(["/", "a.example:443", "http://A.example/x?y", "http://b.example:81"]),
        tunnel=words("tunnelled", "refused"),
        error=words("no_key"),
        responses=st.sampled_from([None, 0, 2]),
        counted_tokens=COUNTS,
        input_tokens=COUNTS,
        status=st.sampled_from([None, 101, 200]),
        bytes_in=st.integers(0, 2**40),
        end_reason=st.sampled_from(["complete", "client_gone", "upstream_broken"]),
        duration_s=st.sampled_from([0.0, 1.5, 60.25]),
        last_chunk_s=st.sampled_from([None, 1.0]),
        attempts=st.lists(
            st.builds(
                Attempt,
                provider=st.sampled_from(["p", "q"]),
                outcome=st.sampled_from(["ok", "upstream_broken"]),
                seconds=st.sampled_from([0.5, 60.0]),
            ),
            max_size=2,
        ),
    ),
    max_size=30,
)
"""Tunnels, WebSockets, requests that were cut."""


def numbered(*batches: list[list[Trace]]) -> list[Trace]:
    """Give each of these traces an id of its own; return all of them."""
    every = [trace for of_one in batches for batch in of_one for trace in batch]
    for number, one in enumerate(every):
        one.id = str(number)
    return every
