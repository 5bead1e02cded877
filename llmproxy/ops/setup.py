"""What a configuration is made into, and how that replaces what was in use (ADR-0014).

Some parts last as long as the process: the site with its connections, the records, the listeners.
The other parts are made for one configuration, and a request ends with those that it began with.  A
start and a reload are the same two steps: prepare all of it, then put it to use in one turn.

The limit of file descriptors is set here, too.  A limit that is too low shows only under load, as
connections that fail one by one; so it is raised, or the log says so, with each configuration.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import resource
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from twisted.logger import Logger

from llmproxy.config import Config
from llmproxy.gateway.connect import Connect, Ways
from llmproxy.gateway.detached import DetachedStreams
from llmproxy.gateway.forward import Forward
from llmproxy.gateway.gateway import Gateway
from llmproxy.gateway.pace import PATH, Marks, PacedStreams, PacePage
from llmproxy.gateway.pace_page import proxy_files
from llmproxy.gateway.recorder import Recorder
from llmproxy.net.addresses import AddressGuard
from llmproxy.ops.drain import Drain
from llmproxy.ops.listeners import Listeners
from llmproxy.policy.limits import DAY_S, NOTHING_SPENT, Spent
from llmproxy.policy.standing import Standing
from llmproxy.record.ledger_steps import LedgerError
from llmproxy.record.metrics import Metrics
from llmproxy.record.sinks import Sinks, Writers
from llmproxy.record.trace import timestamp
from llmproxy.server.handler import Handler, Router
from llmproxy.server.leaves import Leaves, PreparedLeaves
from llmproxy.server.site import Site
from llmproxy.server.tls import ListenerTls
from llmproxy.shared.client_limits import SharedLimits
from llmproxy.shared.sharing import Sharing
from llmproxy.shared.standing import SharedStanding
from llmproxy.upstream.client import Upstream
from llmproxy.upstream.credential import CommandCredential, Credentials
from llmproxy.upstream.way_out import WayOut, tunnel_resolver

RESERVE = 512
"""Descriptors for everything else: listeners, the admin site, files, rejected connections."""

_LARGEST_TABLE = 2**16
"""Descriptors for which the kernel gets memory beforehand: 512 KiB."""

_log = Logger()


class Prepared(NamedTuple):
    """What a configuration was made into, and is not in use yet; listeners come last."""

    config: Config
    tls: ListenerTls | None
    leaves: PreparedLeaves | None
    credentials: Mapping[str, CommandCredential]
    upstream: Upstream
    gateway: Gateway
    connect: Connect
    forward: Forward
    paced: PacedStreams
    writers: Writers
    spent: Spent


class Setup:
    """What is in use now.

    Args:
        reactor: connects.
        clock: monotonic seconds.
        timers: keeps the deadlines of requests.
        metrics: counts.
        recorder: keeps records.
        sinks: keeps traces.
        credentials: those that commands print.
        detached: the responses that are read on.
        standing: what is known of providers.
        shared_standing: what other processes know of them.
        limits: what clients use.
        sharing: what is shared with other processes.
        drain: how the process will shut down.
        site: serves clients.
        leaves: the TLS of intercepted hosts.
        ways: the CONNECTs that are under way.
        admin: the sites that serve operators.
        listeners: where all of them are reached.
        raise_limit: sees to the descriptors for so many clients, or raises ``OSError``.

    Attributes:
        config: what all of it follows.
        upstream: sends requests to providers.
        tls: what the TLS listeners show, where there are some.
    """

    def __init__(
        self,
        reactor: Any,
        clock: Callable[[], float],
        *,
        timers: Any,
        metrics: Metrics,
        recorder: Recorder,
        sinks: Sinks,
        credentials: Credentials,
        detached: DetachedStreams,
        standing: Standing,
        shared_standing: SharedStanding,
        limits: SharedLimits,
        sharing: Sharing,
        drain: Drain,
        site: Site,
        leaves: Leaves,
        ways: Ways,
        admin: tuple[Site, ...],
        listeners: Listeners,
        raise_limit: Callable[[int], None],
    ) -> None:
        self._reactor = reactor
        self._clock = clock
        self._timers = timers
        self._metrics = metrics
        self._recorder = recorder
        self._sinks = sinks
        self._credentials = credentials
        self._detached = detached
        self._standing = standing
        self._shared_standing = shared_standing
        self._limits = limits
        self._sharing = sharing
        self._drain = drain
        self._site = site
        self._leaves = leaves
        self._ways = ways
        self._names = tunnel_resolver(reactor, clock)
        self._marks = Marks()
        self._pages: dict[bytes, Handler] = {
            PATH + b"/" + name: PacePage(recorder, file) for name, file in proxy_files().items()
        }
        self._admin = admin
        self._listeners = listeners
        self._raise_limit = raise_limit
        self.config = Config()
        self.upstream = Upstream(reactor, clock, self.config, timers=timers)
        self.tls: ListenerTls | None = None

    def prepare(self, config: Config) -> Prepared:
        """Make what ``config`` asks for, on any thread; nothing that is in use may notice.

        Raises:
            OSError: a file cannot be opened.
            ValueError: OpenSSL would not use a certificate, or the authority has expired.
        """
        if any(route.websocket for route in config.routes):
            importlib.import_module("llmproxy.stream.websocket")  # before the first one comes
        keypair = config.proxy.keypair
        credentials = self._credentials.prepare(config)
        upstream = Upstream(
            self._reactor, self._clock, config, timers=self._timers, before=self.upstream
        )
        gateway = Gateway(
            config,
            upstream,
            self._recorder,
            self._metrics,
            credentials=credentials,
            detached=self._detached,
            standing=self._standing,
            shared_standing=self._shared_standing,
            limits=self._limits,
            reactor=self._timers,
            clock=self._clock,
        )
        guard = AddressGuard(
            lambda: self._listeners.addresses, allow_private=config.tunnel.allow_private
        )
        way_out = WayOut(self._reactor, self._names, config, guard, self._timers)
        connect = Connect(
            config,
            self._recorder,
            self._metrics,
            self._ways,
            leaf=self._leaves.tls_for,
            way_out=way_out,
        )
        forward = Forward(
            config,
            self._recorder,
            self._metrics,
            self._ways,
            way_out=way_out,
            limits=self._limits,
            reactor=self._timers,
            clock=self._clock,
        )
        paced = PacedStreams(
            config,
            gateway.rules,
            self._recorder,
            self._metrics,
            self._marks,
            limits=self._limits,
            reactor=self._reactor,
            clock=self._clock,
        )
        tls = None if keypair is None else ListenerTls(keypair)
        leaves = self._leaves.prepare(config.intercept)
        writers = self._sinks.prepare(config.trace)
        spent = self._spent_today(config)
        self._sharing.prepare(config.shared)
        return Prepared(
            config,
            tls,
            leaves,
            credentials,
            upstream,
            gateway,
            connect,
            forward,
            paced,
            writers,
            spent,
        )

    def _spent_today(self, config: Config) -> Spent:
        """Return what clients have used today, if a limit asks for it and the ledger knows it."""
        trace = config.trace
        is_kept = trace.ledger is not None or trace.postgres is not None
        if not is_kept or not self._limits.unknown(config.clients):
            return NOTHING_SPENT
        today = self._limits.today()
        try:
            return Spent(today, self._sinks.tokens_since(trace, timestamp(today * DAY_S)))
        except LedgerError as error:
            _log.warn("the tokens of today begin at zero, as they cannot be read: {why}", why=error)
            return NOTHING_SPENT

    def abandon(self, prepared: Prepared) -> None:
        """Let go of what was prepared; it will not be used."""
        self._sinks.abandon(prepared.writers)

    def use(self, prepared: Prepared) -> None:
        """Put it to use in this turn; what it takes the place of ends with what runs on it.

        Where that cannot be, all is as it was, and what was prepared is let go of.

        Raises:
            OSError: an address cannot be bound, or the descriptors are not allowed.
            ValueError: an endpoint is none.
        """
        config, tls = prepared.config, prepared.tls
        # The listeners that stay know this one; it shows what is prepared once nothing can fail.
        lasting = tls if tls is None or self.tls is None else self.tls
        try:
            self._raise_limit(config.proxy.max_connections)
            listeners = self._listeners.prepare(config, lasting)
        except BaseException:
            self.abandon(prepared)
            raise

        if lasting and tls and config.proxy.keypair != self.config.proxy.keypair:
            lasting.show(tls)
        self._follow(prepared)
        self.config, self.tls = config, lasting
        self._listeners.use(listeners, reuse_port=config.proxy.reuse_port)

    def _follow(self, prepared: Prepared) -> None:
        config, gateway = prepared.config, prepared.gateway
        self._sinks.use(prepared.writers)
        self._recorder.follow(config.trace.session_header)
        self._recorder.write_access(config.log.access)
        self._detached.allow(config.limits.drains)
        self._standing.follow(config)
        self._limits.follow(config.clients, prepared.spent)
        self._sharing.follow(config.shared)
        self._drain.timeout = config.proxy.drain_timeout
        self._site.limiter.limit(
            config.proxy.max_connections, config.limits.connections_per_address
        )
        methods = {b"CONNECT": prepared.connect}
        paths = {PATH: prepared.paced, **self._pages}
        self._site.serve(Router(gateway, paths, methods, urls=prepared.forward))
        for site in (self._site, *self._admin):
            site.follow(config.timeouts, config.limits)
        prepared.upstream.take_over(self.upstream)
        self.upstream = prepared.upstream
        self._credentials.use(prepared.credentials)
        self._leaves.follow(prepared.leaves)


def needed(max_connections: int) -> int:
    """Return how many descriptors so many clients may need: one for each, and a provider's."""
    return 2 * max_connections + RESERVE


def raise_limit(max_connections: int) -> None:
    """Raise the soft limit to what ``max_connections`` may need, or as far as the hard one allows.

    Where that is not enough the log says so.

    The kernel's table of descriptors gets its full size at once, too.  It grows by doubling, and in
    a process with threads each step waits until every processor has seen it: 10 to 40 ms in which
    nothing is forwarded.

    Raises:
        OSError: the limit cannot be raised although the hard one would allow it.
    """
    want = needed(max_connections)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = want if hard == resource.RLIM_INFINITY else min(want, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        except (OSError, ValueError) as error:
            raise OSError(
                f"the limit of file descriptors cannot be raised from {soft} to {allowed}: {error}"
            ) from error
    _grow_table(min(allowed, _LARGEST_TABLE))
    if allowed < want:
        _log.warn(
            "{allowed} file descriptors are allowed, and max_connections = {connections} may need "
            "{needed}: raise LimitNOFILE, or lower max_connections",
            allowed=allowed,
            connections=max_connections,
            needed=want,
        )


def _grow_table(count: int) -> None:
    """Let the kernel's table have room for ``count`` descriptors."""
    with open(os.devnull, "rb") as file, suppress(OSError):
        os.close(fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, count - 1))
