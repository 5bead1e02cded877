"""Makes ``dashboard.json``: what llmproxy's metrics show, for Grafana.

``python monitoring/dashboard.py`` writes it beside itself; it needs ``grafana-foundation-sdk``
(``pip install -e '.[dev]'``).  Queries name what ``/metrics`` has, and nothing else.
"""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

FILE = Path(__file__).with_name("dashboard.json")

_SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
_ALL = 'job="$job", instance=~"$instance"'
_VIA = f'{_ALL}, provider=~"$provider"'
_OF_CLIENT = f'{_ALL}, client=~"$client"'
_OF_ROUTE = f'{_ALL}, route=~"$route"'
_BY = f'{_VIA}, route=~"$route", client=~"$client"'

_BELOW_0 = ("Certificates and keys",)  # what has expired

Query = tuple[str, str]
"""An expression, and what its lines are called."""


def rate(metric: str, by: str, labels: str = _ALL) -> str:
    """Return the rate of a counter, summed by labels."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def quantiles(metric: str) -> list[Query]:
    """Return the 50th, 90th and 99th percentile of a histogram."""
    by = f"sum by (le) (rate({metric}_bucket{{{_ALL}}}[$__rate_interval]))"
    return [(f"histogram_quantile({q}, {by})", f"p{q[2:]:0<2}") for q in ("0.5", "0.9", "0.99")]


def total(metric: str, by: str, labels: str = _ALL) -> str:
    """Return a gauge, summed by labels."""
    return f"sum by ({by}) ({metric}{{{labels}}})"


_WITHOUT_END = "upstream_broken|upstream_idle|unfinished|drained"

ROWS: list[tuple[str, list[tuple[str, str, str, list[Query]]]]] = [
    (
        "Traffic",
        [
            (
                "Requests",
                "reqps",
                "Requests that ended, by the route that they took.",
                [
                    (
                        rate("llmproxy_requests_total", "route, provider", _BY),
                        "{{route}} {{provider}}",
                    )
                ],
            ),
            (
                "Ends",
                "reqps",
                "Why requests ended; the admin site's /streams/ended has the newest of each.",
                [(rate("llmproxy_ended_total", "reason"), "{{reason}}")],
            ),
            (
                "Tokens",
                "short",
                "Tokens a second, as the providers count them.",
                [
                    (
                        rate("llmproxy_tokens_total", "type, model", _VIA + ', client=~"$client"'),
                        "{{model}} {{type}}",
                    )
                ],
            ),
            (
                "Streams",
                "short",
                "Requests that are served; those whose client does not read; those that wait.",
                [
                    (total("llmproxy_active_streams", "job"), "served"),
                    (total("llmproxy_paused_streams", "job"), "paused"),
                    (total("llmproxy_queued_requests", "job", _VIA), "queued"),
                    (total("llmproxy_websocket_connections", "job"), "WebSockets"),
                    (total("llmproxy_tunnels", "job"), "tunnels"),
                ],
            ),
            (
                "Bytes",
                "Bps",
                "Bytes of bodies.",
                [(rate("llmproxy_bytes_total", "direction"), "{{direction}}")],
            ),
            (
                "Connections",
                "short",
                "Open connections of clients and to providers.",
                [
                    (total("llmproxy_client_connections", "job"), "clients"),
                    (
                        total("llmproxy_upstream_connections", "provider, state", _VIA),
                        "{{provider}} {{state}}",
                    ),
                ],
            ),
        ],
    ),
    (
        "Latency",
        [
            ("Head", "s", "Request sent to response's head.", quantiles("llmproxy_head_seconds")),
            (
                "First chunk",
                "s",
                "Request received to first chunk: what a user waits.",
                quantiles("llmproxy_first_chunk_seconds"),
            ),
            (
                "Gap between chunks",
                "s",
                "The provider's pace, pauses of clients left out.",
                quantiles("llmproxy_chunk_gap_seconds"),
            ),
            ("Queue", "s", "Time in a provider's queue.", quantiles("llmproxy_queue_wait_seconds")),
            (
                "Added by the proxy",
                "s",
                "Chunk read to chunk taken by the kernel.",
                quantiles("llmproxy_relay_delay_seconds"),
            ),
            (
                "Reactor lag",
                "s",
                "How late timers are: every stream waits as long.",
                quantiles("llmproxy_reactor_lag_seconds"),
            ),
        ],
    ),
    (
        "Providers and clients",
        [
            (
                "Providers that are ready",
                "short",
                "How many of a route's providers everybody may ask.",
                [
                    (
                        f"min by (route) (llmproxy_route_ready_providers{{{_OF_ROUTE}}})",
                        "{{route}}",
                    )
                ],
            ),
            (
                "Providers that are up",
                "short",
                "0 while a circuit is open.",
                [(f"min by (provider) (llmproxy_provider_up{{{_VIA}}})", "{{provider}}")],
            ),
            (
                "Cooldowns",
                "s",
                "For how long a provider is to be left alone.",
                [
                    (
                        f"max by (provider) (llmproxy_provider_cooldown_seconds{{{_VIA}}})",
                        "{{provider}}",
                    )
                ],
            ),
            (
                "Failures",
                "reqps",
                "Failed tries, by cause.",
                [
                    (
                        rate("llmproxy_upstream_failures_total", "provider, cause", _VIA),
                        "{{provider}} {{cause}}",
                    )
                ],
            ),
            (
                "Refused for a limit",
                "reqps",
                "By client and limit; an empty client is the listener's own limit.",
                [(rate("llmproxy_limited_total", "client, limit"), "{{client}} {{limit}}")],
            ),
            (
                "Limits that are left",
                "percentunit",
                "What clients have left of what they are allowed.",
                [
                    (
                        f"min by (client, limit) (llmproxy_limit_remaining{{{_OF_CLIENT}}}"
                        f" / llmproxy_limit_allowed{{{_OF_CLIENT}}})",
                        "{{client}} {{limit}}",
                    )
                ],
            ),
            (
                "Cut, and sent again",
                "reqps",
                "Responses that stopped before their end, and requests that came again.",
                [
                    (
                        rate("llmproxy_ended_total", "reason", f'{_ALL}, reason=~"{_WITHOUT_END}"'),
                        "{{reason}}",
                    ),
                    (rate("llmproxy_resent_total", "client, first"), "resent {{client}} {{first}}"),
                ],
            ),
        ],
    ),
    (
        "The process",
        [
            (
                "Processor",
                "percentunit",
                "One process uses one processor.",
                [(rate("process_cpu_seconds_total", "instance"), "{{instance}}")],
            ),
            (
                "Memory",
                "bytes",
                "Resident, and what clients have not taken yet.",
                [
                    (total("process_resident_memory_bytes", "instance"), "{{instance}}"),
                    (total("llmproxy_buffered_bytes", "instance"), "{{instance}} buffered"),
                    (total("llmproxy_request_bytes_held", "instance"), "{{instance}} requests"),
                ],
            ),
            (
                "Descriptors",
                "percentunit",
                "A stream takes two.",
                [(f"process_open_fds{{{_ALL}}} / process_max_fds{{{_ALL}}}", "{{instance}}")],
            ),
            (
                "Lost",
                "short",
                "Records and lines of the log that were not written.",
                [
                    (rate("llmproxy_records_lost_total", "sink"), "{{sink}}"),
                    (rate("llmproxy_log_lines_lost_total", "job"), "log"),
                    (rate("llmproxy_tap_degraded_total", "reason"), "degraded {{reason}}"),
                ],
            ),
            (
                "Certificates and keys",
                "s",
                "Until they expire.",
                [
                    (
                        f"min by (certificate)"
                        f" (llmproxy_certificate_not_after_timestamp_seconds{{{_ALL}}}) - time()",
                        "{{certificate}}",
                    ),
                    (
                        f"min by (client)"
                        f" (llmproxy_client_key_expires_timestamp_seconds{{{_ALL}}}) - time()",
                        "key of {{client}}",
                    ),
                ],
            ),
            (
                "Configuration",
                "short",
                "1 while the last reload went well, and while the process shuts down.",
                [
                    (
                        f"min by (instance) (llmproxy_config_last_reload_successful{{{_ALL}}})",
                        "{{instance}} reloaded",
                    ),
                    (f"max by (instance) (llmproxy_draining{{{_ALL}}})", "{{instance}} draining"),
                ],
            ),
        ],
    ),
]


def panel(title: str, unit: str, text: str, queries: list[Query]) -> timeseries.Panel:
    """Return one panel."""
    made = timeseries.Panel().title(title).description(text).unit(unit).datasource(_SOURCE)
    if title not in _BELOW_0:
        made = made.min(0)
    made = made.height(8).span(8).fill_opacity(5)
    for ref_id, (expression, name) in zip("ABCDEF", queries, strict=False):
        query = prometheus.Dataquery().expr(expression).legend_format(name).ref_id(ref_id)
        made = made.with_target(query)
    return made


def variable(name: str, label: str, metric: str) -> dashboard.QueryVariable:
    """Return a variable that has the values of a metric's label.

    All of them is also what has none, as a refused request has no provider, and what is not listed
    yet, as a provider that no request has come to.
    """
    selector = "" if name == "job" else '{job="$job"}'
    made = dashboard.QueryVariable(name).label(label).datasource(_SOURCE)
    made = made.query(f"label_values({metric}{selector}, {name})")
    made = made.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    return made if name == "job" else made.multi(True).include_all(True).all_value(".*")


def text() -> str:
    """Return the dashboard as JSON."""
    made = dashboard.Dashboard("llmproxy").uid("llmproxy").tags(["llmproxy"]).refresh("30s")
    made = made.time("now-3h", "now").timezone("browser").readonly()
    made = made.with_variable(
        dashboard.DatasourceVariable("source").label("Source").type("prometheus")
    )
    made = made.with_variable(variable("job", "Job", "llmproxy_build_info"))
    made = made.with_variable(variable("instance", "Instance", "llmproxy_build_info"))
    for name in ("route", "provider", "client"):
        made = made.with_variable(variable(name, name.title(), "llmproxy_requests_total"))
    for title, panels in ROWS:
        made = made.with_row(dashboard.Row(title))
        for each in panels:
            made = made.with_panel(panel(*each))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
