"""Metrics whose values other parts hold, under the names that Prometheus knows (ADR-0003).

Each value is read when it is scraped.  The parts do not know that they are watched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmproxy.gateway.connect import Ways
from llmproxy.gateway.detached import DetachedStreams
from llmproxy.ops.drain import Drain
from llmproxy.ops.process import Process
from llmproxy.ops.reload import Reload
from llmproxy.ops.setup import Setup
from llmproxy.policy.auth import soonest_ends
from llmproxy.policy.standing import Standing
from llmproxy.record.log_writer import LogWriter
from llmproxy.record.metrics import Metrics, Source
from llmproxy.record.sinks import Sinks
from llmproxy.server.leaves import Leaves
from llmproxy.server.site import Site
from llmproxy.shared.client_limits import SharedLimits
from llmproxy.shared.sharing import Sharing
from llmproxy.upstream.credential import Credentials


def expose(
    metrics: Metrics,
    *,
    site: Site,
    setup: Setup,
    detached: DetachedStreams,
    standing: Standing,
    limits: SharedLimits,
    sharing: Sharing,
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
    _expose_connections(metrics, site, setup, detached, ways)
    _expose_providers(metrics, setup, standing, credentials)
    _expose_clients(metrics, setup, site, limits, wall)
    _expose_sharing(metrics, sharing, limits)
    _expose_certificates(metrics, setup, leaves)
    _expose_life(metrics, drain, reload)
    _expose_losses(metrics, sink, log)


def _expose_connections(
    metrics: Metrics, site: Site, setup: Setup, detached: DetachedStreams, ways: Ways
) -> None:
    gauge = metrics.watch
    gauge(
        "client_connections",
        "Open client connections; max_connections in [proxy] bounds them.",
        [],
        _one(lambda: len(site.connections)),
    )
    gauge(
        "intercepted_connections",
        "Open client connections behind a CONNECT that was intercepted.",
        [],
        _one(lambda: sum(one.inside is not None for one in site.connections)),
    )
    gauge(
        "tunnels",
        "Open tunnels, and those that are being opened.",
        [],
        _one(lambda: len(ways.tunnels)),
    )
    gauge(
        "upstream_connections",
        "Connections to providers.",
        ["provider", "state"],
        lambda: {labels: float(n) for labels, n in setup.upstream.counts().items()},
    )
    gauge(
        "buffered_bytes",
        "Bytes written that clients' kernels did not take yet; bounded for each stream.",
        [],
        _one(site.pending_bytes),
    )
    gauge(
        "request_bytes_held",
        "Request bodies in memory, in bytes; request_memory in [limits] bounds them.",
        [],
        _one(lambda: site.memory.held),
    )
    gauge(
        "drains",
        (
            "Responses read on for their usage alone, after their clients left; drains in "
            "[limits] bounds them."
        ),
        [],
        _one(lambda: len(detached)),
    )


def _expose_providers(
    metrics: Metrics, setup: Setup, standing: Standing, credentials: Credentials
) -> None:
    gauge, count, health = metrics.watch, metrics.watch_count, standing.health
    gauge(
        "provider_up",
        (
            "0 while the provider is left alone for its failures, by any client. /providers says "
            "by whom."
        ),
        ["provider"],
        _by(lambda: {name: health.is_up(name) for name in setup.config.providers}),
    )
    gauge(
        "provider_cooldown_seconds",
        (
            "How long the provider is to be left alone, for some client or model: it has "
            "refused. /providers shows what it says of its limits."
        ),
        ["provider"],
        _by(lambda: {name: health.cooldown_s(name) for name in setup.config.providers}),
    )
    gauge(
        "route_ready_providers",
        (
            "Providers of the route that everybody may ask: on, not failing, not cooling for any "
            "model. 0: requests are refused, or go to a provider that asked to be left alone."
        ),
        ["route"],
        _by(lambda: {one.name: standing.ready(one.providers) for one in setup.config.routes}),
    )
    gauge(
        "queued_requests",
        (
            "Requests that wait for a place at a provider with a queue; /streams?phase=queued "
            "lists them."
        ),
        ["provider"],
        _by(standing.places.queued),
    )
    gauge(
        "credential_age_seconds",
        (
            "How old the credential is that a provider's command printed last. Older than it "
            "lasts: see credential_failures_total."
        ),
        ["provider"],
        _by(credentials.ages),
    )
    count(
        "credential_failures",
        "Runs of a provider's command that printed no credential; the log has what it said.",
        ["provider"],
        _by(lambda: credentials.failures),
    )
    count(
        "stale_lookups",
        (
            "Lookups that failed or hung, where addresses of before were used: look at the "
            "machine's resolver."
        ),
        [],
        _one(lambda: setup.upstream.stale_lookups),
    )


def _expose_clients(
    metrics: Metrics, setup: Setup, site: Site, limits: SharedLimits, wall: Callable[[], float]
) -> None:
    metrics.watch_count(
        "limited",
        (
            "What was refused because of a limit; without a client it is a limit of the "
            "listener's. /clients shows what is used."
        ),
        ["client", "limit"],
        lambda: {
            **{("", limit): float(n) for limit, n in site.limiter.refused.items()},
            **{labels: float(n) for labels, n in limits.refused.items()},
        },
    )
    metrics.watch(
        "limit_allowed",
        "What a client's limit allows.",
        ["client", "limit"],
        lambda: {labels: float(n) for labels, n in limits.allowed().items()},
    )
    metrics.watch(
        "limit_remaining",
        "What is left of a client's limit; compare with limit_allowed.",
        ["client", "limit"],
        lambda: {labels: float(n) for labels, n in limits.remaining().items()},
    )
    metrics.watch(
        "limit_used_here",
        "What this process uses of a client's limit, which processes may share.",
        ["client", "limit"],
        lambda: {labels: float(n) for labels, n in limits.used_here().items()},
    )
    metrics.watch(
        "client_key_expires_timestamp_seconds",
        (
            "When the next key of a client expires. Soon: add a second key, hand it over, then "
            "remove the first."
        ),
        ["client"],
        _by(lambda: soonest_ends(setup.config, wall())),
    )


def _expose_sharing(metrics: Metrics, sharing: Sharing, limits: SharedLimits) -> None:
    def figure(name: str) -> Source:
        return lambda: {} if (state := sharing.state) is None else {(): getattr(state, name)}

    metrics.watch(
        "shared_up",
        (
            "1 while the shared engine answers. 0: limits hold for this process's share alone; the "
            "log says why."
        ),
        [],
        figure("is_up"),
    )
    metrics.watch("shared_processes", "Processes that share the engine.", [], figure("processes"))
    metrics.watch_count(
        "shared_calls", "Calls that the shared engine has answered.", [], figure("calls")
    )
    metrics.watch_count(
        "shared_timeouts",
        "Calls that the shared engine has not answered in time: look at its latency.",
        [],
        figure("given_up"),
    )
    metrics.watch_count(
        "shared_alone",
        "Requests admitted without the shared engine, by this process's share of the limits.",
        [],
        lambda: {} if sharing.state is None else {(): limits.alone},
    )


def _expose_certificates(metrics: Metrics, setup: Setup, leaves: Leaves) -> None:
    def ends() -> dict[str, float]:
        listeners = {} if setup.tls is None else {"listen_tls": setup.tls.not_after}
        return {**listeners, **leaves.expiries()}

    metrics.watch(
        "certificate_not_after_timestamp_seconds",
        "When a certificate expires. Soon: replace it, and reload.",
        ["certificate"],
        _by(ends),
    )


def _expose_life(metrics: Metrics, drain: Drain, reload: Reload) -> None:
    gauge = metrics.watch
    gauge(
        "draining",
        "1 while the process shuts down; drain_timeout bounds it.",
        [],
        _one(lambda: drain.begun),
    )
    gauge(
        "drain_remaining_requests",
        "Requests that a drain waits for; a second SIGTERM cuts them.",
        [],
        _one(lambda: drain.remaining),
    )
    gauge(
        "drain_remaining_seconds",
        "Until a drain cuts what is left; 0 where there is none.",
        [],
        _one(lambda: drain.remaining_s),
    )
    gauge(
        "config_last_reload_successful",
        (
            "Whether the last reload went well. 0: the log names each mistake, and the "
            "configuration of before is in use."
        ),
        [],
        _one(lambda: reload.succeeded),
    )
    gauge(
        "config_last_reload_success_timestamp_seconds",
        "When the last reload that went well did.",
        [],
        _one(lambda: reload.succeeded_at),
    )


def _expose_losses(metrics: Metrics, sink: Sinks, log: LogWriter | None) -> None:
    metrics.watch_count(
        "records_lost",
        (
            "Records that were not written: a full disk, a locked ledger or a dead collector. "
            "The log says which."
        ),
        ["sink"],
        _by(sink.losses),
    )
    metrics.watch_count(
        "log_lines_lost",
        "Lines of the log that were not written: whoever reads the log is too slow.",
        [],
        _one(lambda: 0 if log is None else log.lost),
    )


def _one(value: Callable[[], float]) -> Source:
    """Return the source of a metric without labels."""
    return lambda: {(): value()}


def _by(values: Callable[[], Mapping[str, float]]) -> Source:
    """Return the source of a metric with one label."""
    return lambda: {(name,): value for name, value in values().items()}
