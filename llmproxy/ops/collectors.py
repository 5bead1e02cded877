"""Metrics whose values other parts hold, under the names that Prometheus knows (ADR-0003).

Each value is read when it is scraped.  The parts do not know that they are watched.
"""

from __future__ import annotations

from collections.abc import Callable

from llmproxy.gateway.connect import Ways
from llmproxy.gateway.detached import DetachedStreams
from llmproxy.ops.drain import Drain
from llmproxy.ops.process import Process
from llmproxy.ops.reload import Reload
from llmproxy.ops.setup import Setup
from llmproxy.policy.auth import soonest_ends
from llmproxy.policy.limits import ClientLimits
from llmproxy.policy.standing import Standing
from llmproxy.record.log_writer import LogWriter
from llmproxy.record.metrics import Metrics
from llmproxy.record.sinks import Sinks
from llmproxy.server.leaves import Leaves
from llmproxy.server.site import Site
from llmproxy.upstream.credential import Credentials


def expose(
    metrics: Metrics,
    *,
    site: Site,
    setup: Setup,
    detached: DetachedStreams,
    standing: Standing,
    limits: ClientLimits,
    credentials: Credentials,
    leaves: Leaves,
    sink: Sinks,
    drain: Drain,
    reload: Reload,
    log: LogWriter | None,
    process: Process,
    ways: Ways,
    wall: Callable[[], float],
) -> None:
    """Let ``metrics`` show what these parts hold, and what ``setup`` has in use.

    Args:
        wall: seconds since the epoch.
    """
    metrics.registry.register(process)
    gauge, count = metrics.watch, metrics.watch_count
    gauge("client_connections", "Open client connections.", [], lambda: {(): len(site.connections)})
    gauge(
        "upstream_connections",
        "Connections to providers.",
        ["provider", "state"],
        lambda: {labels: float(n) for labels, n in setup.upstream.counts().items()},
    )
    gauge(
        "buffered_bytes",
        "Bytes written that clients' kernels did not take yet.",
        [],
        lambda: {(): site.pending_bytes()},
    )
    gauge("request_bytes_held", "Request bodies in memory.", [], lambda: {(): site.memory.held})
    gauge("drains", "Responses read on for their usage alone.", [], lambda: {(): len(detached)})
    gauge(
        "tunnels",
        "Open tunnels, and those that are being opened.",
        [],
        lambda: {(): len(ways.tunnels)},
    )
    gauge(
        "intercepted_connections",
        "Open client connections behind a CONNECT that was intercepted.",
        [],
        lambda: {(): sum(one.inside is not None for one in site.connections)},
    )
    gauge(
        "provider_up",
        "0 while a circuit of the provider is open, for any client.",
        ["provider"],
        lambda: {(name,): standing.health.is_up(name) for name in setup.config.providers},
    )
    gauge(
        "provider_cooldown_seconds",
        "How long the provider is to be left alone, for some client or model.",
        ["provider"],
        lambda: {(name,): standing.health.cooldown_s(name) for name in setup.config.providers},
    )
    gauge(
        "queued_requests",
        "Requests that wait for a place at a provider with a queue.",
        ["provider"],
        lambda: {(name,): float(n) for name, n in standing.places.queued().items()},
    )
    gauge("draining", "1 while the process shuts down.", [], lambda: {(): drain.begun})
    gauge("drain_remaining_requests", "What a drain waits for.", [], lambda: {(): drain.remaining})
    gauge(
        "drain_remaining_seconds",
        "Until a drain cuts what is left; 0 where there is none.",
        [],
        lambda: {(): drain.remaining_s},
    )
    gauge(
        "config_last_reload_successful",
        "Whether the last reload went well.",
        [],
        lambda: {(): reload.succeeded},
    )
    gauge(
        "config_last_reload_success_timestamp_seconds",
        "When the last reload that went well did.",
        [],
        lambda: {(): reload.succeeded_at},
    )
    gauge(
        "certificate_not_after_timestamp_seconds",
        "When a certificate expires.",
        ["certificate"],
        lambda: {
            **({} if setup.tls is None else {("listen_tls",): setup.tls.not_after}),
            **{(name,): end for name, end in leaves.expiries().items()},
        },
    )
    gauge(
        "client_key_expires_timestamp_seconds",
        "When the next key of a client expires.",
        ["client"],
        lambda: {(name,): end for name, end in soonest_ends(setup.config, wall()).items()},
    )
    gauge(
        "credential_age_seconds",
        "How old the credential is that a provider's command printed last.",
        ["provider"],
        lambda: {(name,): age for name, age in credentials.ages().items()},
    )
    count(
        "credential_failures",
        "Runs of a provider's command that printed no credential.",
        ["provider"],
        lambda: {(name,): float(n) for name, n in credentials.failures.items()},
    )
    count(
        "limited",
        "What was refused because of a limit.",
        ["client", "limit"],
        lambda: {
            **{("", limit): float(n) for limit, n in site.limiter.refused.items()},
            **{labels: float(n) for labels, n in limits.refused.items()},
        },
    )
    gauge(
        "limit_remaining",
        "What is left of a client's limit.",
        ["client", "limit"],
        lambda: {labels: float(n) for labels, n in limits.remaining().items()},
    )
    count(
        "records_lost",
        "Records that were not written.",
        ["sink"],
        lambda: {(name,): float(lost) for name, lost in sink.losses().items()},
    )
    count(
        "stale_lookups",
        "Lookups that failed or hung, where addresses of before were used.",
        [],
        lambda: {(): float(setup.upstream.stale_lookups)},
    )
    count(
        "log_lines_lost",
        "Lines of the log that were not written.",
        [],
        lambda: {(): 0.0 if log is None else float(log.lost)},
    )
