"""``twistd llmproxy``: options, and the one place where everything is put together.

:func:`makeService` reads the configuration, and stops the start with every mistake in it; nothing
listens by then.  :class:`ProxyService` builds the parts that last as soon as the process is its own
(twistd may have forked), and shuts them down.  What a configuration is made into is prepared and
put to use by the same steps at the start and at a reload (ADR-0014).  Signals are taken here.  The
reactor and the clocks enter the program here and nowhere else.
"""

from __future__ import annotations

import atexit
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from twisted.application.service import IServiceCollection, Service
from twisted.internet.defer import Deferred
from twisted.logger import ILogObserver, Logger
from twisted.python import usage
from twisted.python.components import Componentized

import twisted
from llmproxy.admin.clients import Clients
from llmproxy.admin.overview import Overview
from llmproxy.admin.providers import Providers
from llmproxy.admin.site import Shown, admin_site
from llmproxy.admin.streams import Streams
from llmproxy.config import Config, ConfigError, load
from llmproxy.gateway.connect import Ways
from llmproxy.gateway.detached import DetachedStreams
from llmproxy.gateway.recorder import Recorder, log_access
from llmproxy.net.loop import SWITCH_S, Lag, tune
from llmproxy.net.timers import Timers
from llmproxy.net.turn_watch import TurnWatch
from llmproxy.ops import failed_start, listeners
from llmproxy.ops.collectors import expose
from llmproxy.ops.drain import Drain
from llmproxy.ops.garbage import Garbage
from llmproxy.ops.listeners import Listeners
from llmproxy.ops.notify import Notify
from llmproxy.ops.process import Process
from llmproxy.ops.reload import Reload, aside
from llmproxy.ops.setup import Setup, raise_limit
from llmproxy.ops.status import Status
from llmproxy.ops.turn_parts import name_parts
from llmproxy.policy.standing import Standing
from llmproxy.record.log import JsonLog, log_opener, log_writer
from llmproxy.record.log_writer import LogFile, LogWriter
from llmproxy.record.metrics import Metrics
from llmproxy.record.sinks import Sinks
from llmproxy.server.connection_limits import ConnectionLimiter
from llmproxy.server.handler import Handler, Router
from llmproxy.server.leaves import Leaves
from llmproxy.server.site import Site
from llmproxy.shared.client_limits import SharedLimits
from llmproxy.shared.places import SharedPlaces
from llmproxy.shared.sharing import Sharing
from llmproxy.shared.standing import SharedStanding
from llmproxy.upstream.credential import Credentials
from llmproxy.version import version

_log = Logger()

DEFAULT_CONFIG = "/etc/llmproxy/llmproxy.toml"


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
        SystemExit: 78, where the configuration has mistakes; each is a line on standard error.
    """
    from twisted.internet import reactor  # twistd may install another one before this

    hold_signals()

    def read() -> Config:
        return load(
            options["config"],
            instance=options["instance"],
            environ=os.environ,
            now=time.time(),
        )

    try:
        config = read()
        if problems := listeners.mistakes(config, os.environ):
            raise ConfigError(problems)
    except ConfigError as error:
        failed_start.report_mistakes(error.problems, os.environ, wall=time.time)
        raise SystemExit(failed_start.MISTAKE) from None
    return ProxyService(
        config,
        reactor,
        reread=read,
        source=options["config"],
        instance=options["instance"],
        log_file=log_opener(options.parent),
        environ=os.environ,
    )


class ProxyService(Service):
    """The daemon: listeners, providers, records, and how they end.

    Args:
        config: the checked configuration.
        reactor: connects, listens and keeps time.
        reread: reads the configuration again at SIGHUP; by default that changes nothing.
        source: the file that the configuration is from, for the log.
        instance: this process's name among several.
        log_file: opens the file for JSON log lines; None leaves the log as it is.
        environ: where the service manager says how to reach it; by default there is no manager.
        handle_signals: the process is ours: take SIGTERM and SIGINT (drain, then cut), SIGHUP
            (reload), SIGUSR1 (log the streams) and SIGUSR2 (reopen files), raise its limit of
            descriptors, and set its garbage collector.

    Attributes:
        proxy_ports, admin_ports: what is listened on, for clients and for operators.
    """

    name = "llmproxy"
    setup: Setup
    notify: Notify

    def __init__(
        self,
        config: Config,
        reactor: Any,
        *,
        reread: Callable[[], Config] | None = None,
        source: str = "",
        instance: str = "0",
        log_file: Callable[[], LogFile] | None = None,
        environ: Mapping[str, str] | None = None,
        handle_signals: bool = True,
    ) -> None:
        self._config = config
        self._reactor = reactor
        self._reread = (lambda: self.setup.config) if reread is None else reread
        self._source = source
        self._instance = instance
        self._log_file = log_file
        self._environ = environ or {}
        self._handle_signals = handle_signals
        self.ready = False
        self._stops_asked = 0
        self._json_log: JsonLog | None = None
        self._log_writer: LogWriter | None = None
        self._untune: Callable[[], None] = lambda: None
        self._turn_watch: TurnWatch | None = None

    def setServiceParent(self, parent: Any) -> None:
        """Join the application, and decide how its log is written.

        twistd begins to log only after this, and asks the application for an observer.
        """
        if self._log_file is not None and isinstance(parent, Componentized):
            file = self._log_file()
            journal = file.is_journal(self._environ)
            self._log_writer = log_writer(file, wall=time.time, journal=journal)
            self._json_log = JsonLog(
                self._log_writer, wall=time.time, later=self._reactor.callLater, journal=journal
            )
            atexit.register(self._json_log.flush)
            parent.setComponent(ILogObserver, self._json_log)
        super().setServiceParent(IServiceCollection(parent, parent))

    # -- start ----------------------------------------------------------------------------------

    def privilegedStartService(self) -> None:
        """Build the parts and listen; ports below 1024 are bound before privileges are shed.

        Raises:
            SystemExit: 1, where a file cannot be opened or an address not be bound.
        """
        super().privilegedStartService()
        if self._log_writer is not None:
            self._log_writer.start()  # twistd has forked by now
            if self._handle_signals:
                self._log_writer.catch_crash()
        if self._source:
            self._report_start()
        try:
            if self._handle_signals:
                self._take_early_signals()
            self._build()
            self.setup.use(self.setup.prepare(self._config))
            self._config = Config()  # the other is the setup's, and is gone with the next one
        except (OSError, ValueError) as error:
            failed_start.report_failure(str(error), self._environ)
            raise SystemExit(failed_start.FAILED) from None

    def _report_start(self) -> None:
        """Begin the log with what runs, and what it goes by."""
        _log.info(
            "llmproxy {version} starts with {config}",
            version=version(),
            config=self._source,
            instance=self._instance,
            python=platform.python_version(),
            twisted=twisted.__version__,
            reactor=type(self._reactor).__name__,
        )

    def startService(self) -> None:
        """Everything listens: be ready."""
        super().startService()
        if self.setup.config.proxy.tuned_loop:
            self._untune = tune(self._reactor, self._turn_watch)
            if self._turn_watch is not None:
                name_parts(self._turn_watch)
            if self._handle_signals:  # the process is ours
                self._garbage.start()
                sys.setswitchinterval(SWITCH_S)
        self._lag.start()
        self.ready = True
        if self._handle_signals:
            self._reactor.callWhenRunning(self._take_signals)
        self._listeners.report()
        self._reactor.callWhenRunning(self.notify.ready)

    def _build(self) -> None:
        """Make the parts that last; nothing listens, and no provider is known yet."""
        reactor, clock, tuned = self._reactor, time.monotonic, self._config.proxy.tuned_loop
        self.metrics = Metrics(version())
        if tuned and self._config.proxy.watch_turns:
            turns = self.metrics.watch_turns()
            self._turn_watch = TurnWatch(clock, time.thread_time, turns.observe)
        self.sinks = Sinks(clock=clock, wall=time.time, instance=self._instance)
        self._timers = Timers(reactor)
        self.detached = DetachedStreams(0, self._timers)
        self.standing = Standing(self._timers, clock, time.time, self.metrics.queue_wait.observe)
        self.limits = SharedLimits(clock, time.time)
        self.shared_standing = SharedStanding(self.standing)
        self.sharing = Sharing(
            reactor,
            self.limits,
            self.shared_standing,
            SharedPlaces(reactor, self.standing.places),
            self._instance,
        )
        self.credentials = Credentials(
            reactor, clock, aside=partial(aside, reactor), environ=self._environ
        )
        self.ways = Ways(reactor, clock)
        self.leaves = Leaves(reactor, time.time, aside=partial(aside, reactor))
        self.recorder = Recorder(
            self.metrics,
            self.sinks,
            access=log_access if self._json_log is None else self._json_log.access,
            clock=clock,
            wall=time.time,
            instance=self._instance,
        )
        self.site = Site(
            Router(Handler()),  # the setup's first configuration brings its own
            reactor,
            clock,
            wall=time.time,
            abandoned=self.recorder.abandoned,
            malformed=self.recorder.malformed,
            limiter=ConnectionLimiter(clock=clock, wall=time.time),
        )
        admin, metrics = self._make_admin_sites(clock)
        self._listeners = Listeners(
            reactor, site=self.site, admin=admin, metrics=metrics, direct=tuned
        )
        self.proxy_ports, self.admin_ports = self._listeners.proxy, self._listeners.admin
        self.drain = Drain(self.site, reactor, 0.0)
        self.setup = Setup(
            reactor,
            clock,
            timers=self._timers,
            metrics=self.metrics,
            recorder=self.recorder,
            sinks=self.sinks,
            credentials=self.credentials,
            detached=self.detached,
            standing=self.standing,
            shared_standing=self.shared_standing,
            limits=self.limits,
            sharing=self.sharing,
            drain=self.drain,
            site=self.site,
            leaves=self.leaves,
            ways=self.ways,
            admin=(admin, metrics),
            listeners=self._listeners,
            raise_limit=raise_limit if self._handle_signals else lambda _: None,
        )
        self.credentials.replaced = lambda name, value: self.setup.upstream.drop(name, value)
        self.reload = Reload(
            self._reread,
            self.setup,
            aside=partial(aside, reactor),
            wall=time.time,
            reopen=self._reopen,
            reporting=lambda: self.notify.reloading(),
            report=self._listeners.report,
        )
        self._status = Status(
            self.site, self.recorder, self.drain, self.reload, time.time, self._instance
        )
        self.notify = Notify(self._environ, reactor, clock, self._status, pid=os.getpid())
        self._lag = Lag(reactor, clock, self.metrics.reactor_lag.observe)
        self._garbage = Garbage(reactor, lambda: self.recorder.running)
        self._expose()

    def _make_admin_sites(self, clock: Callable[[], float]) -> tuple[Site, Site]:
        """Return the site of operators, and the one that has the metrics alone."""
        site = partial(
            admin_site,
            self._reactor,
            clock,
            wall=time.time,
            ready=self._readiness,
            metrics=self.metrics,
        )
        streams = self.streams = Streams(self.site, self.recorder, clock)
        providers = Providers(
            lambda: self.setup.config, lambda: self.setup.upstream.counts(), self.standing
        )
        clients = Clients(lambda: self.setup.config.clients, self.recorder, self.limits)
        flights = self.recorder.flights
        shown = Shown(
            config=lambda: {
                **self.setup.config.redacted(),
                "switched_off": self.standing.switches.rows(),
            },
            streams=streams,
            providers=providers,
            clients=clients,
            flights=flights,
            overview=Overview(lambda: self._status.row(), streams, providers, clients, flights),
            turns=None if self._turn_watch is None else self._turn_watch.rows,
            hosts=lambda: self.setup.config.admin.hosts,
        )
        return site(shown=shown), site(shown=None)

    def _readiness(self) -> tuple[bool, str]:
        """Return whether requests are taken, and in words how."""
        if not self.ready:
            return False, "not ready"
        state = self.sharing.state
        if state is None or state.is_up:
            return True, "ready"
        return True, "ready, but the shared engine is away: this process counts alone"

    def _expose(self) -> None:
        """Let the metrics show what the parts hold."""
        expose(
            self.metrics,
            site=self.site,
            setup=self.setup,
            detached=self.detached,
            standing=self.standing,
            limits=self.limits,
            sharing=self.sharing,
            credentials=self.credentials,
            leaves=self.leaves,
            ways=self.ways,
            sink=self.sinks,
            drain=self.drain,
            reload=self.reload,
            log=self._log_writer,
            process=Process(time.time),
            wall=time.time,
        )

    def _reopen(self) -> None:
        """Open the files anew that logrotate has renamed."""
        self.sinks.reopen()
        if self._log_writer is not None and self._log_file is not None:
            self._log_writer.reopen(self._log_file)

    # -- signals --------------------------------------------------------------------------------

    def _take_early_signals(self) -> None:
        """Take the signals that would end the process, and those that came during the start."""
        calls = {
            signal.SIGHUP: lambda: self.reload(),
            signal.SIGUSR1: lambda: self.streams.log(),
            signal.SIGUSR2: self._asked_to_reopen,
        }
        take_signals(self._reactor, calls)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, calls)

    def _take_signals(self) -> None:
        """Replace Twisted's handlers: its second SIGTERM logs an error and cuts nothing.

        When all is over, further ones are ignored: the interpreter gives the handlers up before it
        ends, and the process would have been killed by a signal.
        """
        calls = dict.fromkeys((signal.SIGTERM, signal.SIGINT), self._asked_to_stop)
        take_signals(self._reactor, calls)
        self._reactor.addSystemEventTrigger("after", "shutdown", ignore_signals, calls)

    def _asked_to_reopen(self) -> None:
        self._reopen()
        _log.info("the log file and the trace file are opened anew")

    def _asked_to_stop(self) -> None:
        self._stops_asked += 1
        if self._stops_asked == 1:
            self._reactor.stop()
        elif self.drain.begun:
            self.drain.cut()
        # A second signal in the turn of the first finds no drain yet; stopService sees the count.

    # -- stop -----------------------------------------------------------------------------------

    def stopService(self) -> Deferred[None]:
        """Stop listening, let running responses end, then close everything else."""
        super().stopService()
        self.ready = False
        self.reload.end()
        self.credentials.stop()
        self.notify.stopping()
        return self._listeners.close_proxy().addCallback(lambda _: self._rest())

    def _rest(self) -> Deferred[None]:
        rested = self.drain.begin()
        if self._stops_asked > 1:
            self.drain.cut()
        return rested.addCallback(lambda _: self._close())

    def _close(self) -> Deferred[None]:
        self._untune()
        self._garbage.stop()
        self._lag.stop()
        self.leaves.stop()
        self.notify.close()
        self.recorder.close_all()
        self.ways.repeats.close()
        self.setup.upstream.close()
        self._timers.close()
        left = self.sharing.stop()
        left.addCallback(lambda _: self._listeners.close_admin())
        return left.addCallback(lambda _: self.sinks.close())


def hold_signals() -> None:
    """Let the signals wait that would end a process which cannot take them yet.

    Who sends one does not know how far the start has come.  A process that knew nothing of the
    signal would end, and one that ignored it would go on with a file that it read before.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))


def take_signals(reactor: Any, calls: Mapping[signal.Signals, Callable[[], None]]) -> None:
    """From now on let each of these signals be a call on the reactor's thread.

    A handler of Python's runs between any two instructions of the main thread.  The one thing that
    it may do safely is to ask the reactor for the call.
    """
    for number, call in calls.items():
        signal.signal(number, partial(_pass_on, reactor, call))


def ignore_signals(numbers: Iterable[signal.Signals]) -> None:
    """Ignore these signals from now on, and those that come in this very moment.

    CPython reports one that came before its handler was replaced and is looked at behind that, as
    an error that nobody can catch.
    """
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if "ignored due to race condition" not in str(unraisable.exc_value):
            report(unraisable)

    sys.unraisablehook = report_others
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _pass_on(reactor: Any, call: Callable[[], None], *_: object) -> None:
    reactor.callFromThread(call)
