"""The sinks that a configuration asks for, behind one door.

File and ledger share a queue and a thread; a collector has its own, because it can hang (ADR-0013).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmproxy.config import Trace as TraceConfig
from llmproxy.record import otlp
from llmproxy.record.ledger import Ledger
from llmproxy.record.lines import JsonLines
from llmproxy.record.output import Output
from llmproxy.record.trace import Trace
from llmproxy.record.writer import Writer
from llmproxy.version import version

CLOSING_S = 5.0
"""Seconds for which the end of the process waits for what is not written."""


class Sinks:
    """Every sink of a process; it is a :class:`~llmproxy.record.trace.Sink` itself.

    Args:
        writers: each gets every trace; without any, traces are forgotten.
        clock: monotonic seconds.

    Attributes:
        write: takes one trace; never blocks and never raises.
    """

    def __init__(self, writers: Sequence[Writer], *, clock: Callable[[], float]) -> None:
        self._writers = writers
        self._clock = clock
        self.write: Callable[[Trace], None] = (
            writers[0].write if len(writers) == 1 else self._write_all
        )

    def losses(self) -> dict[str, int]:
        """Return how many traces each sink has not kept, by its name."""
        return {name: lost for one in self._writers for name, lost in one.losses().items()}

    def reopen(self) -> None:
        """Open files anew that logrotate has renamed; nothing is lost by that."""
        for writer in self._writers:
            writer.reopen()

    def close(self) -> None:
        """Write what waits, for at most five seconds, and stop; the rest is lost and told."""
        for writer in self._writers:
            writer.finish()
        deadline = self._clock() + CLOSING_S
        for writer in self._writers:
            writer.join(max(0.0, deadline - self._clock()))

    def _write_all(self, trace: Trace) -> None:
        for writer in self._writers:
            writer.write(trace)


def open_sinks(
    config: TraceConfig,
    *,
    clock: Callable[[], float],
    wall: Callable[[], float],
    instance: str,
) -> Sinks:
    """Open the sinks that ``[trace]`` names.

    Args:
        clock: monotonic seconds.
        wall: seconds since the epoch.
        instance: this process's name among several.

    Raises:
        OSError: a file cannot be opened, or is no ledger.
    """
    outputs: list[Output] = []
    collectors: list[Output] = []
    if config.jsonl is not None:
        outputs.append(JsonLines(config.jsonl))
    if config.ledger is not None:
        outputs.append(Ledger(config.ledger, keep_s=config.keep, wall=wall))
    if config.otlp is not None:
        resource = {
            "service.name": "llmproxy",
            "service.version": version(),
            "service.instance.id": instance,
        }
        collectors.append(otlp.Otlp(config.otlp, resource))
    writers = [Writer(outputs, clock=clock)] if outputs else []
    for one in collectors:
        writers.append(Writer([one], clock=clock, gather_s=otlp.GATHER_S, batch=otlp.BATCH))
    return Sinks(writers, clock=clock)
