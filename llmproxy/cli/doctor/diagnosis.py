"""A whole run without a word printed: examine every URL, judge each, and name the guilty hop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from llmproxy.cli.doctor.advice import Advice, advice
from llmproxy.cli.doctor.examination import Checks, Observations, examine
from llmproxy.cli.doctor.exchange import Trust
from llmproxy.cli.doctor.target import Target
from llmproxy.cli.doctor.verdict import Guilt, State, Verdict, blame, judge_all

_CODES = {State.HEALTHY: 0, State.BUFFERED: 1, State.UNREACHABLE: 2}


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """What a run has found.

    Attributes:
        seen: what was seen at each URL, from the client's side to the provider's.
        verdicts: what is thought of each.
        guilts: each finding that is a hop's doing, with what to change about it.
    """

    seen: list[Observations]
    verdicts: list[Verdict]
    guilts: list[tuple[Guilt, list[Advice]]]

    @property
    def code(self) -> int:
        """The exit code: 0 healthy, 1 buffered, 2 unreachable; the worst of all URLs."""
        return max(_CODES[verdict.state] for verdict in self.verdicts)


def diagnose(
    targets: Sequence[Target],
    *,
    checks: Checks | None = None,
    trust: Trust | None = None,
    progress: Callable[[int, str], None] = lambda number, words: None,
) -> Diagnosis:
    """Examine URLs, one after the other, and say what is wrong and where.

    Args:
        targets: at least one, from the client's side to the provider's.
        checks: how long may be waited for what.
        trust: whom to believe.
        progress: called with the number of a URL and what is tried with it next.
    """
    seen = []
    for number, target in enumerate(targets):

        def tell(words: str, number: int = number) -> None:
            progress(number, words)

        seen.append(examine(target, checks or Checks(), trust or Trust(), tell))
    return conclude(seen)


def conclude(seen: list[Observations]) -> Diagnosis:
    """Say what is wrong and where, of URLs that were examined."""
    verdicts = judge_all(seen)
    guilts = [(guilt, advice(guilt)) for guilt in blame(verdicts)]
    return Diagnosis(seen=seen, verdicts=verdicts, guilts=guilts)
