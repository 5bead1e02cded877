"""One bounded queue, one thread, and the outputs that the thread writes to.

A request that ends appends its trace to the queue and never waits.  The thread takes traces in
batches and gives each batch to every output in turn.  What one output does not keep is lost for
that output alone, and the output's own queue (``sink_queue.py``) counts it.  After a failure
everything goes on by itself; nothing needs a restart (ADR-0013).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from math import inf

import msgspec
from msgspec import UNSET

from llmproxy.record.sink_queue import Output, SinkQueue
from llmproxy.record.trace import Trace, content_size, without_content

QUEUE = 10_000
"""Most traces that wait for the thread, and again for each output; about 10 MB each."""

BATCH = 256
"""Most traces that an output gets at once: while they are encoded, the reactor waits."""

CONTENT = 64 * 1024**2
"""Most characters of responses that wait; beyond that, records are kept without them."""

_BATCH_CONTENT = 1024**2
"""A batch with so many characters of responses ends, however few traces it has."""

GATHER_S = 0.02
"""Seconds for which the thread waits for more traces: to wake it costs more than a trace."""


class Writer:
    """The queue and its thread, which starts at once.

    Args:
        outputs: each gets every trace, in this order.
        clock: monotonic seconds; called by the thread, too.
        gather_s: seconds for which the thread waits for more, once there is a trace.
        batch: most traces that an output gets at once.
        queue: most traces that wait.
        content: most characters of responses that wait.
    """

    def __init__(
        self,
        outputs: Sequence[Output],
        *,
        clock: Callable[[], float],
        gather_s: float = GATHER_S,
        batch: int = BATCH,
        queue: int = QUEUE,
        content: int = CONTENT,
    ) -> None:
        self._queues = [SinkQueue(output, clock, batch, queue) for output in outputs]
        self._clock = clock
        self._gather_s = gather_s
        self._batch = batch
        self._most = queue
        self._most_content = content if any(one.keeps_content for one in outputs) else -1
        self._content_in = 0  # the reactor's count
        self._content_out = 0  # the thread's: neither writes the other's
        self._waiting: deque[Trace] = deque()
        self._overflowed = 0
        self._wake = threading.Event()
        self._finishing = threading.Event()
        self._reopening = False
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)
        self._thread.start()

    def write(self, trace: Trace) -> None:
        """Queue one trace; if the queue is full, the trace is lost."""
        waiting = self._waiting
        if len(waiting) >= self._most:
            self._overflowed += 1
            return
        if trace.text is not UNSET:
            trace = self._with_room(trace)
        waiting.append(trace)
        if len(waiting) == 1:
            self._wake.set()

    def _with_room(self, trace: Trace) -> Trace:
        """Return the trace, without its content if too much content waits already."""
        if self._most_content < 0:
            return without_content(trace)
        size = content_size(trace)
        if self._content_in - self._content_out + size > self._most_content:
            degraded = [*trace.degraded, "content"]
            return msgspec.structs.replace(without_content(trace), degraded=degraded)
        self._content_in += size
        return trace

    def losses(self) -> dict[str, int]:
        """Return how many traces each output has not kept, by its name."""
        return {queue.output.name: queue.lost + self._overflowed for queue in self._queues}

    @property
    def ended(self) -> bool:
        """Whether the thread has ended, so that the counts of losses do not change any more."""
        return not self._thread.is_alive()

    def reopen(self) -> None:
        """Let every output open its file again, soon; no waiting trace is lost by this."""
        self._reopening = True
        self._wake.set()

    def finish(self) -> None:
        """Begin to end: what waits is written, without waiting for more."""
        for queue in self._queues:
            queue.leaving = True
        self._finishing.set()
        self._wake.set()

    def join(self, seconds: float) -> None:
        """Wait for the end, at most so long; what is not written by then is lost and logged."""
        self._thread.join(timeout=seconds)
        self._most = 0
        if self._thread.is_alive():
            for queue in self._queues:
                queue.give_up(len(self._waiting))

    def _run(self) -> None:
        while True:
            self._rest()
            if self._reopening:
                self._reopening = False
                for queue in self._queues:
                    queue.reopen()
            batch, content = self._next_batch()
            for queue in self._queues:
                queue.take(batch)
            self._content_out += content
            if self._finishing.is_set() and not self._has_work():
                break
        for queue in self._queues:
            queue.close()

    def _has_work(self) -> bool:
        return bool(self._waiting) or any(queue.held for queue in self._queues)

    def _rest(self) -> None:
        """Wait for traces or until an output is due; then wait a moment for more traces."""
        due = min(queue.due() for queue in self._queues)
        if not self._waiting and not (self._finishing.is_set() and not self._has_work()):
            self._wake.wait(None if due == inf else max(0.0, due - self._clock()))
        self._wake.clear()
        if self._waiting:
            self._finishing.wait(self._gather_s)

    def _next_batch(self) -> tuple[list[Trace], int]:
        """Take traces out of the queue; return them, and the size of their content."""
        waiting = self._waiting
        batch: list[Trace] = []
        content = 0
        while waiting and len(batch) < self._batch and content < _BATCH_CONTENT:
            trace = waiting.popleft()
            batch.append(trace)
            if trace.text is not UNSET:
                content += content_size(trace)
        return batch, content
