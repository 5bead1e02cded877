"""``twistd llmproxy``: options, and the one place where everything is put together.

:func:`makeService` reads the configuration, and stops the start with every mistake in it; nothing
listens by then.  :class:`ProxyService` builds the parts once the process is its own (twistd may
have forked), listens, and brings them to rest.  The reactor and the clocks enter the program here
and nowhere else.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import IO, Any

from twisted.application.service import IServiceCollection, Service
from twisted.internet.defer import Deferred, DeferredList, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.task import LoopingCall
from twisted.logger import ILogObserver, Logger
from twisted.python import usage
from twisted.python.components import Componentized

from llmproxy.config import Config, ConfigError, load
from llmproxy.front.books import Books, log_access
from llmproxy.front.door import Door
from llmproxy.front.gateway import Gateway
from llmproxy.front.http import Site
from llmproxy.front.listen import listen
from llmproxy.front.tls import ListenerTls
from llmproxy.ops.admin import admin_resource
from llmproxy.ops.drain import Drain
from llmproxy.ops.figures import expose
from llmproxy.ops.reload import Reload
from llmproxy.record.log import JsonLog, log_opener
from llmproxy.record.metrics import Metrics
from llmproxy.record.sinks import open_sinks
from llmproxy.upstream.client import Upstream
from llmproxy.version import version
from llmproxy.wire.loop import calm_collector, tune
from llmproxy.wire.timers import Timers

DEFAULT_CONFIG = "/etc/llmproxy/llmproxy.toml"

_LAG_INTERVAL = 1.0
"""Seconds between the appointments by which the reactor's lag is measured."""

_log = Logger()


class Options(usage.Options):
    """What ``twistd llmproxy`` takes."""

    synopsis = "[options]"
    longdesc = "One shared egress to language-model providers."
    optParameters = [  # noqa: RUF012 - twisted.python.usage reads it from the class
        ["config", "c", DEFAULT_CONFIG, "The configuration file."],
        ["instance", None, "0", "This process's name among several; replaces {instance}."],
    ]


def makeService(options: Options) -> ProxyService:
    """Return the service that ``options`` ask for; called by twistd.

    Raises:
        SystemExit: 1, where the configuration has mistakes; each is a line on standard error.
    """
    from twisted.internet import reactor  # twistd may install another one before this

    def read() -> Config:
        return load(options["config"], instance=options["instance"], environ=os.environ)

    try:
        config = read()
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(1) from None
    return ProxyService(
        config,
        reactor,
        reread=read,
        instance=options["instance"],
        log_file=log_opener(options.parent),
    )


class ProxyService(Service):
    """The daemon: listeners, providers, records, and how they end.

    Args:
        config: the checked configuration.
        reactor: connects, listens and keeps time.
        reread: reads the configuration again at SIGHUP; by default that changes nothing.
        instance: this process's name among several.
        log_file: opens the file for JSON log lines; None leaves the log as it is.
        handle_signals: the process is ours: take SIGTERM and SIGINT (drain, then cut) and SIGHUP
            (reload), and set its garbage collector.
    """

    name = "llmproxy"

    def __init__(
        self,
        config: Config,
        reactor: Any,
        *,
        reread: Callable[[], Config] | None = None,
        instance: str = "0",
        log_file: Callable[[], IO[str]] | None = None,
        handle_signals: bool = True,
    ) -> None:
        self.config = config
        self._reactor = reactor
        self._reread = (lambda: config) if reread is None else reread
        self._instance = instance
        self._log_file = log_file
        self._handle_signals = handle_signals
        self.proxy_ports: list[Any] = []
        self.admin_ports: list[Any] = []
        self.ready = False
        self._told = 0
        self._json_log: JsonLog | None = None
        self._untune: Callable[[], None] = lambda: None

    def setServiceParent(self, parent: Any) -> None:
        """Join the application, and decide how its log is written.

        twistd begins to log only after this, and asks the application for an observer.
        """
        if self._log_file is not None and isinstance(parent, Componentized):
            self._json_log = JsonLog(self._log_file(), wall=time.time)
            parent.setComponent(ILogObserver, self._json_log)
        super().setServiceParent(IServiceCollection(parent, parent))

    # -- start ----------------------------------------------------------------------------------

    def privilegedStartService(self) -> None:
        """Build the parts and listen; ports below 1024 are bound before privileges are shed.

        Raises:
            SystemExit: 1, where a file cannot be opened or an address not be bound.
        """
        super().privilegedStartService()
        if self._handle_signals:  # before anybody can think that we do; what comes is done later
            later = self._reactor.callFromThread
            signal.signal(signal.SIGHUP, lambda *_: later(lambda: self.reload()))
        try:
            self._build()
            self._listen()
        except (OSError, ValueError, CannotListenError) as error:
            sys.stderr.write(f"llmproxy cannot start: {error}\n")
            raise SystemExit(1) from None

    def startService(self) -> None:
        """Everything listens: be ready."""
        super().startService()
        if self.config.proxy.tuned_loop:
            self._untune = tune(self._reactor)
            if self._handle_signals:  # the process is ours
                calm_collector()
        self._lag.start(_LAG_INTERVAL, now=False)
        self.ready = True
        if self._handle_signals:
            self._reactor.callWhenRunning(self._take_signals)
        for site, ports in (("proxy", self.proxy_ports), ("admin", self.admin_ports)):
            for at, port in enumerate(ports):
                where = port.getHost()
                _log.info(
                    "{site} listens on {address}",
                    site=site,
                    tls=site == "proxy" and at >= len(self.config.proxy.listen),
                    address=str(where),
                    port=getattr(where, "port", None),
                )

    def _build(self) -> None:
        config, reactor, clock = self.config, self._reactor, time.monotonic
        self.metrics = Metrics(version())
        self.sink = open_sinks(config.trace, clock=clock, wall=time.time, instance=self._instance)
        self._timers = Timers(reactor)
        self.upstream = Upstream(reactor, clock, config, timers=self._timers)
        self.books = Books(
            self.metrics,
            self.sink,
            access=log_access if self._json_log is None else self._json_log.access,
            clock=clock,
            wall=time.time,
            instance=self._instance,
            session_header=config.trace.session_header,
        )
        self.gateway = Gateway(
            config, self.upstream, self.books, self.metrics, reactor=self._timers, clock=clock
        )
        self.site = Site(
            self.gateway,
            reactor,
            clock,
            config.timeouts,
            config.limits,
            body_limit=self.gateway.routes.body_limit,
            holds_body=self.gateway.holds_body,
            early_refusal=self.gateway.early_refusal,
            abandoned=self.books.abandoned,
            malformed=self.books.malformed,
            door=Door(
                config.proxy.max_connections,
                config.limits.connections_per_address,
                clock=clock,
                wall=time.time,
            ),
        )
        keypair = config.proxy.keypair
        self.tls = None if keypair is None else ListenerTls(keypair)
        self.reload = Reload(self._reread, config, self.tls, time.time, self.sink.reopen)
        self.drain = Drain(
            self.site, reactor, config.proxy.drain_timeout, lambda: self.books.running
        )
        self._lag = LoopingCall(self._measure_lag)
        self._lag.clock = reactor
        self._expected = clock() + _LAG_INTERVAL
        expose(
            self.metrics,
            site=self.site,
            upstream=self.upstream,
            drains=self.gateway.drains,
            sink=self.sink,
            drain=self.drain,
            reload=self.reload,
            tls=self.tls,
        )

    def _listen(self) -> None:
        config, reactor = self.config, self._reactor
        for texts, tls in ((config.proxy.listen, None), (config.proxy.listen_tls, self.tls)):
            for text in texts:
                port = listen(reactor, text, self.site, tls=tls, direct=config.proxy.tuned_loop)
                self.proxy_ports.append(port)
        admin = self._admin_site(config_shown=True)
        self.admin_ports.append(listen(reactor, config.admin.listen, admin))
        if config.admin.metrics_listen is not None:
            metrics = self._admin_site(config_shown=False)
            self.admin_ports.append(listen(reactor, config.admin.metrics_listen, metrics))

    def _admin_site(self, *, config_shown: bool) -> Site:
        resource = admin_resource(
            ready=lambda: self.ready,
            registry=self.metrics.registry,
            config=self.config.redacted if config_shown else None,
        )
        timeouts, limits = self.config.timeouts, self.config.limits
        clock = time.monotonic
        return Site(resource, self._reactor, clock, timeouts, limits, body_limit=lambda _: 0)

    def _measure_lag(self) -> None:
        now = time.monotonic()
        self.metrics.reactor_lag.observe(max(0.0, now - self._expected))
        self._expected = now + _LAG_INTERVAL

    # -- stop -----------------------------------------------------------------------------------

    def _take_signals(self) -> None:
        """Replace Twisted's handlers: its second SIGTERM logs an error and cuts nothing."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._reactor.callFromThread(self._told_to_stop))

    def _told_to_stop(self) -> None:
        self._told += 1
        if self._told == 1:
            self._reactor.stop()
        elif self.drain.begun:
            self.drain.cut()
        # A second signal in the turn of the first finds no drain yet; stopService sees the count.

    def stopService(self) -> Deferred[None]:
        """Stop listening, let running answers end, then close everything else."""
        super().stopService()
        self.ready = False
        closing = DeferredList([_stopped(port) for port in self.proxy_ports])
        closing.addCallback(lambda _: self._rest())
        return closing.addCallback(lambda _: self._close())

    def _rest(self) -> Deferred[None]:
        rested = self.drain.begin()
        if self._told > 1:
            self.drain.cut()
        return rested

    def _close(self) -> Deferred[None]:
        self._untune()
        if self._lag.running:
            self._lag.stop()
        self.gateway.drains.close()
        self.upstream.close()
        self._timers.close()
        closing = DeferredList([_stopped(port) for port in self.admin_ports])
        return closing.addCallback(lambda _: self.sink.close())


def _stopped(port: Any) -> Deferred[Any]:
    return port.stopListening() or succeed(None)
