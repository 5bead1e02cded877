"""What Prometheus knows of every process, under the names that it expects."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import pytest
from prometheus_client import CollectorRegistry, Metric, ProcessCollector

from llmproxy.ops.process import Process


def families(metrics: Iterable[Metric]) -> dict[str, tuple[str, str]]:
    """Return type and text of metrics, by name."""
    return {metric.name: (metric.type, metric.documentation) for metric in metrics}


def values(metrics: Iterable[Metric]) -> dict[str, float]:
    """Return the samples of metrics, by name."""
    return {sample.name: sample.value for metric in metrics for sample in metric.samples}


def test_the_metrics_are_those_of_the_library() -> None:
    """Names, types, texts and values are those of `prometheus_client`, whose dashboards exist."""
    theirs = ProcessCollector(registry=CollectorRegistry())
    ours = Process(time.time)
    assert families(ours.collect()) == families(theirs.collect())
    found, expected = values(ours.collect()), values(theirs.collect())
    assert found["process_start_time_seconds"] == pytest.approx(
        expected["process_start_time_seconds"], abs=2
    )
    assert found["process_cpu_seconds_total"] == pytest.approx(
        expected["process_cpu_seconds_total"], abs=0.5
    )
    assert found["process_max_fds"] == expected["process_max_fds"]
    for name in ("process_resident_memory_bytes", "process_virtual_memory_bytes"):
        assert found[name] == pytest.approx(expected[name], rel=0.2)


@pytest.mark.parametrize("kernel", ["counts", "lists"])
def test_open_descriptors_are_counted(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a kernel that has to list them."""
    stat = os.stat
    if kernel == "lists":
        monkeypatch.setattr(os, "stat", lambda path: os.stat_result([0] * 10))
    ours = Process(time.time)
    before = values(ours.collect())["process_open_fds"]
    more = [os.open("/dev/null", os.O_RDONLY) for _ in range(7)]
    assert values(ours.collect())["process_open_fds"] == before + 7
    for descriptor in more:
        os.close(descriptor)
    monkeypatch.setattr(os, "stat", stat)
    assert abs(before - len(os.listdir("/proc/self/fd"))) <= 1
