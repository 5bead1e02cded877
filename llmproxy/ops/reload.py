"""SIGHUP: the file is read again, and all of it takes effect, or nothing does (ADR-0014).

The file is read, and the parts that it asks for are made, on a thread of their own.  The parts are
put to use in one turn of the reactor, or not at all; ``ops/setup.py`` makes and uses them.  Logs
and trace files are opened anew first, whatever the file says: that is how logrotate asks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from llmproxy.config import Config, ConfigError
from llmproxy.ops.notify import Reloading
from llmproxy.ops.setup import Prepared, Setup

_SHUTS_DOWN = "no reload: the process shuts down"

_log = Logger()

T = TypeVar("T")


class Reload:
    """Follows the file whenever it is called.

    A call during a reload is served after that one, by reading the file once more.

    Args:
        reread: returns the file as it is now, checked, or raises ``ConfigError``.
        setup: what follows it.
        aside: calls what may block; fires with what came of it.
        wall: seconds since the epoch.
        reopen: opens logs and trace files anew.
        reporting: what is opened around the work, for the service manager.
        report: writes to the log where the process listens now.

    Attributes:
        succeeded: whether the last one did; the start counts as one.
        succeeded_at: when the last one that did was over, in seconds since the epoch.
    """

    def __init__(
        self,
        reread: Callable[[], Config],
        setup: Setup,
        *,
        aside: Callable[[Callable[[], Prepared]], Deferred[Prepared]],
        wall: Callable[[], float],
        reopen: Callable[[], None],
        reporting: Reloading,
        report: Callable[[], None],
    ) -> None:
        self._reread = reread
        self._setup = setup
        self._aside = aside
        self._wall = wall
        self._reopen = reopen
        self._reporting = reporting
        self._report = report
        self._wanted = self._busy = self._over = False
        self._waits: list[str] = []
        self.succeeded = True
        self.succeeded_at = wall()

    def __call__(self) -> None:
        """Begin to follow the file as it is now; it never raises."""
        self._reopen()
        if self._over:
            _log.info(_SHUTS_DOWN)
            return
        self._wanted = True
        if not self._busy:
            Deferred.fromCoroutine(self._follow())

    def end(self) -> None:
        """The process shuts down: what it has is what it keeps."""
        self._over = True

    async def _follow(self) -> None:
        self._busy = True
        try:
            with self._reporting():
                while self._wanted and not self._over:
                    self._wanted = False
                    await self._follow_once()
        finally:
            self._busy = False

    async def _follow_once(self) -> None:
        before = self._setup.config
        try:
            prepared = await self._aside(self._prepare)
            if self._over:
                self._setup.abandon(prepared)
                _log.info(_SHUTS_DOWN)
                return
            self._setup.use(prepared)
        except (ConfigError, OSError, ValueError) as error:
            self._failed(list(getattr(error, "problems", (str(error),))))
        except Exception:
            self.succeeded = False
            _log.failure("reload failed")
        else:
            self._succeeded(changes(before, self._setup.config))

    def _prepare(self) -> Prepared:
        config, self._waits = settled(self._reread(), self._setup.config)
        return self._setup.prepare(config)

    def _failed(self, problems: list[str]) -> None:
        self.succeeded = False
        why = "; ".join(problems)
        _log.error("reload failed, nothing has changed: {why}", why=why, problems=problems)

    def _succeeded(self, changed: list[str]) -> None:
        self.succeeded, self.succeeded_at = True, self._wall()
        _log.info(
            "reloaded; {what}{rest}",
            what=f"changed: {', '.join(changed)}" if changed else "nothing has changed",
            rest=f"; at the next start: {', '.join(self._waits)}" if self._waits else "",
            changed=changed,
            waits=self._waits,
        )
        self._report()


def settled(config: Config, running: Config) -> tuple[Config, list[str]]:
    """Return a configuration that can take effect at once, and the keys that wait for a start.

    Args:
        config: what the file says.
        running: what is in use; its loop, and the transports that belong to it, are to stay.
    """
    kept = {
        name: getattr(running.proxy, name)
        for name in ("tuned_loop", "watch_turns")
        if getattr(config.proxy, name) != getattr(running.proxy, name)
    }
    if not kept:
        return config, []
    proxy = msgspec.structs.replace(config.proxy, **kept)
    return msgspec.structs.replace(config, proxy=proxy), [f"proxy.{name}" for name in kept]


def changes(before: Config, after: Config) -> list[str]:
    """Return the tables that are not the same, as an operator knows them; credentials count."""
    names = []
    for section in before.__struct_fields__:
        old, new = getattr(before, section), getattr(after, section)
        if isinstance(old, dict):
            keys = sorted(old.keys() | new.keys())
            names += [f"{section}.{key}" for key in keys if old.get(key) != new.get(key)]
        elif old != new:
            names.append(section)
    return names


def aside(reactor: Any, call: Callable[[], T]) -> Deferred[T]:
    """Call ``call`` on a thread of its own, which keeps no process from ending.

    Returns:
        fires on the reactor's thread with what it returned, or fails with what it raised.
    """
    done: Deferred[T] = Deferred()

    def run() -> None:
        try:
            result = call()
        except BaseException:
            reactor.callFromThread(done.errback, Failure())
        else:
            reactor.callFromThread(done.callback, result)

    threading.Thread(target=run, name="reload", daemon=True).start()
    return done
