"""The live view: states come in a thread, keys in the main one, and either changes the picture."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from queue import Empty, SimpleQueue

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from llmproxy.admin.overview import State
from llmproxy.cli.table import shown
from llmproxy.cli.top.filters import FILTERS, FilterError, parsed, written
from llmproxy.cli.top.keyboard import Keyboard
from llmproxy.cli.top.screen import SORTS, View, picture, visible
from llmproxy.cli.top.site import Follower, Site, SiteError

_AGAIN_S = 2
_GLANCE_S = 0.1
HINT = "q quit   ? all keys"
HELP = f"""\
q quit   up/down or k/j select   x end the selected stream   r reverse
/ filter, as client=NAME phase=paused   Tab clients or abnormal ends first
sort: {" ".join(f"{key} {name}" for key, name in SORTS.items())}"""


class _Reader(threading.Thread):
    """Follows a site in a thread, again and again.

    Args:
        site: what is followed.
        query: what is asked for; :meth:`ask` changes it.
        put: is called with each state, or with why there is none.
    """

    def __init__(
        self, site: Site, query: dict[str, str], put: Callable[[State | SiteError], object]
    ) -> None:
        super().__init__(daemon=True)
        self._site = site
        self._query = query
        self._put = put
        self._follower: Follower | None = None
        self._changed = threading.Event()

    def ask(self, query: dict[str, str]) -> None:
        """Ask for something else from now on."""
        self._query = query
        self._changed.set()
        if (follower := self._follower) is not None:
            follower.stop()

    def run(self) -> None:
        """Follow, until the process ends."""
        while True:
            self._changed.clear()
            try:
                with closing(self._site.follow(self._query)) as self._follower:
                    for state in self._follower.states(State):
                        if self._changed.is_set():
                            break
                        self._put(state)
            except SiteError as error:
                if not self._changed.is_set():
                    self._put(error)
                    self._changed.wait(again_s(error))


def again_s(error: SiteError) -> int:
    """Return the seconds after which the site is asked again."""
    return _AGAIN_S if error.retry_s is None else error.retry_s


class LiveView:
    """The live view of a site.

    Args:
        site: what is followed.
        query: the parameters of ``/events`` to begin with.
        console: the terminal.
    """

    def __init__(self, site: Site, query: dict[str, str], console: Console) -> None:
        self._site = site
        self._query = query
        self._console = console
        self._view = View(sort=query.get("sort", "-age"), filter=written(query), note=HINT)
        self._state: State | None = None
        self._lost = ""
        self._told = ""  # the note of a kill, while a filter or an answer is typed
        self._arrived: SimpleQueue[State | SiteError | str] = SimpleQueue()
        self._reader = _Reader(site, dict(query), self._arrived.put)
        self._typed: str | None = None  # a filter that is being typed
        self._doomed: str | None = None  # the stream that the question is about
        self._is_over = False
        self._is_suspended = False
        self._is_back = False

    def run(self) -> None:
        """Show it, until ``q`` or a signal that ends it; the terminal is as before in the end.

        A signal is acted on between two pictures: an exception could come at any place.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGTSTP, self._suspend)
        signal.signal(signal.SIGCONT, self._come_back)
        self._reader.start()
        keyboard = Keyboard()
        self._show(keyboard)
        while not self._is_over:
            if self._is_suspended:
                self._wait_for_foreground()
            self._is_suspended = self._is_back = False
            self._show(keyboard)

    def _stop(self, *_: object) -> None:
        self._is_over = True

    def _suspend(self, *_: object) -> None:
        self._is_suspended = True

    def _come_back(self, *_: object) -> None:
        self._is_back = True

    def _wait_for_foreground(self) -> None:
        """Stop the process as Ctrl-Z does; return when it goes on."""
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._suspend)

    def _show(self, keyboard: Keyboard) -> None:
        """Take the terminal, and give it back at the end, or where a signal asks for that."""
        with keyboard, Live(console=self._console, screen=True, auto_refresh=False) as live:
            size = self._console.size  # before it is drawn: it may change meanwhile
            live.update(self._picture(), refresh=True)
            while not (self._is_over or self._is_suspended or self._is_back):
                is_new = self._take()
                try:
                    key = keyboard.read(0 if is_new else _GLANCE_S)
                except EOFError:
                    self._is_over = True
                    return
                if key is not None:
                    self._press(key)
                if is_new or key is not None or size != self._console.size:
                    size = self._console.size
                    live.update(self._picture(), refresh=True)

    def _take(self) -> bool:
        """Take what has arrived; return whether that was anything."""
        is_new = False
        with suppress(Empty):
            while True:
                found = self._arrived.get_nowait()
                is_new = True
                if isinstance(found, str):
                    self._told = found
                    if self._typed is None and self._doomed is None:
                        self._rest()
                elif isinstance(found, SiteError):
                    again = f"trying again in {again_s(found)} s"
                    self._lost = f"{time.strftime('%H:%M:%S')} {shown(str(found))}; {again}"
                else:
                    self._state, self._lost = found, ""
                    self._forget_the_gone(found)
        return is_new

    def _forget_the_gone(self, state: State) -> None:
        """Select no stream, and ask about none, that is not in the window any more."""
        names = {row.id for row in state.streams}
        if self._view.selected not in names:
            self._view.selected = None
        if self._doomed is not None and self._doomed not in names:
            is_all = len(state.streams) == state.total
            why = "has ended" if is_all else "has ended, or is not among those shown any more"
            self._view.note = f"The stream {shown(self._doomed)} {why}."
            self._doomed = None

    def _picture(self) -> RenderableType:
        note = self._view.note
        if self._state is None:
            return Text(f"{self._lost or 'Connecting ...'}\n{note}")
        self._view.width, self._view.height = self._console.size
        if self._lost:
            self._view.note = self._lost if note == HINT else f"{self._lost}\n{note}"
        made = picture(self._state, self._view)
        self._view.note = note
        return made

    def _rest(self) -> None:
        """Say how a kill went, or which keys there are."""
        self._view.note, self._told = self._told or HINT, ""

    # -- keys -----------------------------------------------------------------------------------

    def _press(self, key: str) -> None:
        """Act on a key."""
        if self._typed is not None:
            self._type(key)
        elif self._doomed is not None:
            self._answer(key)
        elif key == "q":
            self._is_over = True
        elif key in ("up", "k", "down", "j"):
            self._select(-1 if key in ("up", "k") else 1)
        elif key == "x":
            self._ask_to_end()
        elif key == "/":
            self._typed = written(self._query)
            self._view.note = f"filter: {shown(self._typed)}_"
        elif key == "tab":
            self._view.is_clients_first = not self._view.is_clients_first
        elif key == "r":
            self._sort(self._view.sort.removeprefix("-"), not self._view.sort.startswith("-"))
        elif key in SORTS:
            self._sort(SORTS[key], True)
        else:
            self._view.note = HINT if self._view.note == HELP else HELP

    def _sort(self, name: str, descending: bool) -> None:
        self._view.sort = self._query["sort"] = f"-{name}" if descending else name
        self._reader.ask(dict(self._query))

    def _select(self, step: int) -> None:
        if self._state is None:
            return
        names = [row.id for row in self._state.streams[: visible(self._state, self._view)]]
        if not names:
            self._view.selected = None
            return
        if self._view.selected in names:
            place = names.index(self._view.selected) + step
        else:
            place = 0 if step > 0 else len(names) - 1
        self._view.selected = names[max(0, min(place, len(names) - 1))]

    def _type(self, key: str) -> None:
        typed = self._typed or ""
        if key == "escape":
            self._typed = None
            self._rest()
            return
        if key == "enter":
            try:
                self._filter(parsed(typed))
            except FilterError as error:
                self._view.note = f"filter: {shown(typed)}_   {shown(str(error))}"
            return
        if key == "back":
            typed = typed[:-1]
        elif len(key) == 1:
            typed += key
        self._typed = typed
        self._view.note = f"filter: {shown(typed)}_"

    def _filter(self, wanted: dict[str, str]) -> None:
        for name in FILTERS:
            self._query.pop(name, None)
        self._query |= wanted
        self._view.filter = written(self._query)
        self._typed = None
        self._rest()
        self._reader.ask(dict(self._query))

    def _ask_to_end(self) -> None:
        if self._view.selected is None:
            self._view.note = "Select a stream first, with up and down."
            return
        self._doomed = self._view.selected
        self._view.note = f"End the stream {shown(self._doomed)}? y/n"

    def _answer(self, key: str) -> None:
        doomed, self._doomed = self._doomed, None
        self._rest()
        if key == "y" and doomed is not None:
            self._view.note = f"Ending the stream {shown(doomed)} ..."
            threading.Thread(target=self._end, args=(doomed,), daemon=True).start()

    def _end(self, name: str) -> None:
        """End a stream, in a thread of its own: a daemon may be slow to respond."""
        try:
            self._site.end_stream(name)
        except SiteError as error:
            self._arrived.put(shown(str(error)))
        else:
            self._arrived.put(f"The stream {shown(name)} is ended.")
