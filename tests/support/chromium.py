"""A real browser that a test steers: Chromium, by its DevTools protocol."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import connect

from tests.support.page import CHROMIUM, OPTIONS, WITHIN

_LISTENS = re.compile(r"DevTools listening on (ws://\S+)")
_FAULTS = ("error", "warning")


class Chromium:
    """One browser with one page.

    Args:
        folder: for its profile.

    Attributes:
        faults: what the page has had to complain of: errors, and what a policy has blocked.
        asked: the URL of each request of the page.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._session: str | None = None
        self.faults: list[str] = []
        self.asked: list[str] = []

    def __enter__(self) -> Self:
        """Start it."""
        with ExitStack() as stack:
            stack.enter_context(self._running())
            self._socket = stack.enter_context(
                connect(self._address, max_size=None, open_timeout=WITHIN)
            )
            self._attach()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self._stack.close()

    @contextmanager
    def _running(self) -> Iterator[None]:
        profile = f"--user-data-dir={self._folder / 'profile'}"
        options = (*OPTIONS, profile, "--remote-debugging-port=0", "--hide-scrollbars")
        with subprocess.Popen(
            [str(CHROMIUM), *options, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                self._address = self._said_by(process)
                yield
            finally:
                process.terminate()
                process.communicate()

    @staticmethod
    def _said_by(process: subprocess.Popen[str]) -> str:
        """Return where a browser listens, which it says once it does."""
        assert process.stderr is not None
        for line in process.stderr:
            if (found := _LISTENS.search(line)) is not None:
                return found[1]
        raise AssertionError("chromium did not start")

    def _attach(self) -> None:
        """Steer the browser's page from now on."""
        self._session = None
        (target,) = (
            one for one in self._call("Target.getTargets")["targetInfos"] if one["type"] == "page"
        )
        session = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = session["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self._call("Emulation.setFocusEmulationEnabled", enabled=True)

    def open(self, url: str) -> None:
        """Open a page, until it is loaded."""
        self._call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'", f"{url} is loaded")

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression on the page, awaited."""
        found = self._call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str, what: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + WITHIN
        while not self.evaluate(condition):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {WITHIN} s: {what}")
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        codes = {"Tab": 9, "Enter": 13}
        for key in keys:
            more = {"text": "\r"} if key == "Enter" else {}
            about = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], **more}
            self._call("Input.dispatchKeyEvent", type="keyDown", **about)
            self._call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        """Type some text into what has the focus."""
        self._call("Input.insertText", text=text)

    def look(self, *, width: int, scheme: str) -> None:
        """Show pages in this width, and as somebody sees them who likes ``light`` or ``dark``."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path) -> None:
        """Write what the whole page looks like, as PNG."""
        found = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def accessible(self) -> list[dict[str, Any]]:
        """Return what assistive programs are told of the page."""
        nodes: list[dict[str, Any]] = self._call("Accessibility.getFullAXTree")["nodes"]
        return [node for node in nodes if not node.get("ignored")]

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            found = json.loads(self._socket.recv(timeout=WITHIN))
            if found.get("id") == self._number:
                assert "error" not in found, found
                result: dict[str, Any] = found["result"]
                return result
            self._note(found)

    def _note(self, message: dict[str, Any]) -> None:
        method, about = message["method"], message["params"]
        if method == "Network.requestWillBeSent":
            self.asked.append(about["request"]["url"])
        elif method == "Log.entryAdded" and about["entry"]["level"] in _FAULTS:
            self.faults.append(about["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.faults.append(str(about["exceptionDetails"]))
