"""What Prometheus knows of every process: memory, descriptors, CPU time, start.

The names are those of ``prometheus_client``'s own collector.  That one needs ``/proc/stat``, which
the sandbox of the units hides, and lists all descriptors at each scrape: with 18,000 of them no
stream moves for 30 ms and more.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_DESCRIPTORS = "/proc/self/fd"


class Process(Collector):
    """The metrics of this process, read at each scrape.

    Args:
        wall: seconds since the epoch.
    """

    def __init__(self, wall: Callable[[], float]) -> None:
        self._started = wall() - time.clock_gettime(time.CLOCK_BOOTTIME) + _started_after_boot()
        self._page = resource.getpagesize()

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, as ``prometheus_client`` asks for them."""
        with open("/proc/self/statm", "rb") as file:
            size, resident = file.read().split()[:2]
        gauges = (
            ("virtual_memory_bytes", "Virtual memory size in bytes.", int(size) * self._page),
            ("resident_memory_bytes", "Resident memory size in bytes.", int(resident) * self._page),
            (
                "start_time_seconds",
                "Start time of the process since unix epoch in seconds.",
                self._started,
            ),
            (
                "max_fds",
                "Maximum number of open file descriptors.",
                resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            ),
            ("open_fds", "Number of open file descriptors.", _open_descriptors()),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"process_{name}", text, value=value)
        yield CounterMetricFamily(
            "process_cpu_seconds_total",
            "Total user and system CPU time spent in seconds.",
            value=time.process_time(),
        )


def _started_after_boot() -> float:
    """Return when this process was started, in seconds since the boot (proc(5))."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _open_descriptors() -> int:
    """Return how many descriptors are open; before Linux 6.2, they have to be listed."""
    return os.stat(_DESCRIPTORS).st_size or len(os.listdir(_DESCRIPTORS))
