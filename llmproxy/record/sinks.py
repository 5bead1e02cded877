"""The sinks that a configuration asks for, behind one object that outlives each configuration.

The file and the ledger in a file share a queue and a thread.  A collector has its own, and so has
PostgreSQL, because they can hang (ADR-0013, ADR-0042).  After a reload, a thread goes on if the new
configuration names the same files, collector or server.  The other threads write what they have and
end; nothing waits for them (ADR-0014).  Nothing here knows how a record is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

from llmproxy.config import Trace as TraceConfig
from llmproxy.config import Url
from llmproxy.record.jsonl import JsonLines
from llmproxy.record.sink_queue import Output
from llmproxy.record.trace import Trace
from llmproxy.record.writer import QUEUE, Writer
from llmproxy.version import version

CLOSING_S = 5.0
"""Seconds for which the end of the process waits for what is not written."""

TOKENS_S = 2.0
"""Seconds for which a start waits for what PostgreSQL knows of clients."""

Writers = dict[Hashable, Writer]
"""Writers by what they write to."""


class Sinks:
    """All sinks of a process; this is a :class:`~llmproxy.record.trace.Sink` itself.

    Args:
        clock: monotonic seconds.
        wall: seconds since the epoch.
        instance: this process's name among several.
        queue: most traces that wait for each thread.

    Attributes:
        write: takes one trace; never blocks and never raises.  Without any sink, the trace is
            forgotten.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        instance: str,
        queue: int = QUEUE,
    ) -> None:
        self._clock = clock
        self._queue = queue
        self._wall = wall
        self._instance = instance
        self._open: Writers = {}
        self._writers: list[Writer] = []
        self._leaving: list[Writer] = []
        self._lost_before: Counter[str] = Counter()
        self.write: Callable[[Trace], None] = self._write_all

    # -- from one configuration to the next -----------------------------------------------------

    def prepare(self, config: TraceConfig) -> Writers:
        """Open what ``config`` names and is not open yet; write nothing there yet.

        This may block, and may be called on any thread.

        Raises:
            OSError: a file cannot be opened, or is no ledger; or what speaks to PostgreSQL is not
                installed.  What this call had opened is closed.
        """
        writers: Writers = {}
        try:
            if config.jsonl is not None or config.ledger is not None:
                key = (config.jsonl, config.ledger, config.ledger and config.keep)
                writers[key] = self._open.get(key) or self._for_files(config)
            if config.otlp is not None:
                writers[config.otlp] = self._open.get(config.otlp) or self._for(config.otlp)
            if config.postgres is not None:
                server = (config.postgres, config.postgres_credential, config.keep)
                writers[server] = self._open.get(server) or self._for_server(config)
        except BaseException:
            self.abandon(writers)
            raise
        return writers

    def abandon(self, writers: Writers) -> None:
        """Close what :meth:`prepare` has opened, because it will not be used."""
        for writer in writers.values():
            if writer not in self._writers:
                writer.finish()

    def use(self, writers: Writers) -> None:
        """Write every trace there from now on; writers that are not among them any more end."""
        self._forget_ended()
        before, self._open = self._writers, writers
        self._writers = list(writers.values())
        for writer in before:
            if writer not in self._writers:
                writer.finish()
                self._leaving.append(writer)
        self.write = self._writers[0].write if len(self._writers) == 1 else self._write_all

    def _for_files(self, config: TraceConfig) -> Writer:
        outputs: list[Output] = []
        try:
            if config.jsonl is not None:
                outputs.append(JsonLines(config.jsonl))
            if config.ledger is not None:
                from llmproxy.record.ledger import Ledger  # SQLite, for a ledger alone

                outputs.append(Ledger(config.ledger, keep_s=config.keep, wall=self._wall))
        except BaseException:
            for output in outputs:
                output.close()
            raise
        return Writer(outputs, clock=self._clock, queue=self._queue)

    def _for(self, collector: Url) -> Writer:
        from llmproxy.record import otlp

        resource = {
            "service.name": "llmproxy",
            "service.version": version(),
            "service.instance.id": self._instance,
        }
        return Writer(
            [otlp.Otlp(collector, resource)],
            clock=self._clock,
            gather_s=otlp.GATHER_S,
            batch=otlp.BATCH,
            queue=self._queue,
        )

    def _for_server(self, config: TraceConfig) -> Writer:
        conninfo = conninfo_of(config)  # first, because it says what to install
        from llmproxy.record import postgres

        return Writer(
            [postgres.Postgres(conninfo, keep_s=config.keep, wall=self._wall)],
            clock=self._clock,
            gather_s=postgres.GATHER_S,
            batch=postgres.BATCH,
            queue=self._queue,
        )

    def tokens_since(self, config: TraceConfig, since: str) -> dict[str, int]:
        """Return the tokens of each client that a ledger of ``config`` knows of this process.

        The file is asked, and PostgreSQL only where there is no file.

        Args:
            config: has one of the two at least.
            since: RFC 3339 in UTC.

        Raises:
            LedgerError: it cannot be read, or PostgreSQL says nothing in time.
        """
        from llmproxy.record.ledger_report import tokens_by_client  # SQLite, for a ledger alone

        if config.ledger is not None:
            from llmproxy.record.ledger_source import Files

            return tokens_by_client(Files([config.ledger]), since)
        from llmproxy.record.postgres_ledger import PostgresLedger, within

        source = PostgresLedger(conninfo_of(config), is_ours=True)
        return within(TOKENS_S, lambda: tokens_by_client(source, since, self._instance))

    # -- what is open ---------------------------------------------------------------------------

    def losses(self) -> dict[str, int]:
        """Return how many traces each sink has lost, by its name; also sinks that are gone."""
        self._forget_ended()
        lost = self._lost_before.copy()
        for writer in (*self._leaving, *self._writers):
            lost.update(writer.losses())
        return dict(lost)

    def _forget_ended(self) -> None:
        for writer in [one for one in self._leaving if one.ended]:
            self._leaving.remove(writer)
            self._lost_before.update(writer.losses())

    def reopen(self) -> None:
        """Open files again that logrotate has renamed; nothing is lost by this."""
        for writer in self._writers:
            writer.reopen()

    def close(self) -> None:
        """Write what waits, for at most five seconds, and stop; the rest is lost and logged."""
        writers = (*self._leaving, *self._writers)
        for writer in writers:
            writer.finish()
        deadline = self._clock() + CLOSING_S
        for writer in writers:
            writer.join(max(0.0, deadline - self._clock()))

    def _write_all(self, trace: Trace) -> None:
        for writer in self._writers:
            writer.write(trace)


def conninfo_of(config: TraceConfig) -> str:
    """Return what libpq connects with.

    Raises:
        OSError: what speaks to PostgreSQL is not installed, or libpq does not take the URL.
    """
    from llmproxy.record import postgres_ledger

    secret = config.postgres_credential
    password = None if secret is None else secret.reveal()
    return postgres_ledger.conninfo_of(config.postgres or "", password)
