"""A real browser for tests, where the machine has one: Chromium without a window, spoken to through a pipe.

Its protocol is JSON, a zero byte after each message (https://chromedevtools.github.io/devtools-protocol).
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")


def browser_path() -> str | None:
    """Where Chromium is: as CHROMIUM says, or on the path; None: nowhere."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A tab; `errors` collects what its scripts and its console complain of."""

    def __init__(self, send: Any, receive: Any) -> None:
        self._send, self._receive, self._last, self._session = send, receive, 0, None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **values: Any) -> Any:
        """Call a method and wait for its answer; events on the way are looked at."""
        self._last += 1
        session = {} if self._session is None else {"sessionId": self._session}
        self._send({"id": self._last, "method": method, "params": values, **session})
        while True:
            message = self._receive()
            if message.get("id") == self._last:
                assert "error" not in message, message
                return message["result"]
            self._look_at(message)

    def _look_at(self, event: dict[str, Any]) -> None:
        method, values = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(values["exceptionDetails"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.errors.append(values["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning"):
            self.errors.append(json.dumps(values["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif method == "Page.javascriptDialogOpening":
            self.errors.append(f"dialog: {values['message']}")

    def look(self, width: int = 1200, height: int = 900, scheme: str = "light", scripts: bool = True) -> None:
        """Choose the size of the window, light or dark, and whether scripts run."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)

    def open(self, file: Path, ready: str = "document.documentElement.dataset.ready === 'yes'") -> float:
        """Open a file; return the seconds until this expression is true."""
        began = time.perf_counter()
        self.call("Page.navigate", url=file.resolve().as_uri())
        while time.perf_counter() < began + 60:
            if self.run(f"document.readyState === 'complete' && ({ready})"):
                return time.perf_counter() - began
            time.sleep(0.01)
        raise AssertionError(f"{file} does not come to its end: {self.errors}")

    def run(self, expression: str) -> Any:
        """Evaluate an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key, such as "ArrowRight" or "Tab"."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36}
        codes |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def point_at(self, x: float, y: float) -> None:
        """Move the mouse to a place in the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, file: Path, whole: bool = True) -> None:
        """Write a PNG of the page, or of what is in the window."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def browsing(path: str) -> Iterator[Page]:
    """Start a browser, give one tab, and end it."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        # the browser reads from its descriptor 3 and writes to 4; ours may have these numbers, too
        ours = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (to_read, from_write)]
        script = f"import os, sys; os.dup2({ours[0]}, 3); os.dup2({ours[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
        running = subprocess.Popen(
            [sys.executable, "-c", script, path, *options, f"--user-data-dir={folder}"],
            pass_fds=ours,
            stderr=subprocess.DEVNULL,
        )
        for descriptor in (to_read, from_write, *ours):
            os.close(descriptor)
        try:
            with os.fdopen(to_write, "wb", buffering=0) as out, os.fdopen(from_read, "rb") as into:
                rest = b""

                def send(message: dict[str, Any]) -> None:
                    out.write(json.dumps(message).encode() + b"\0")

                def receive() -> dict[str, Any]:
                    nonlocal rest
                    while b"\0" not in rest:
                        part = into.read1(1 << 20)
                        assert part, "the browser has ended"
                        rest += part
                    message, _, rest = rest.partition(b"\0")
                    return json.loads(message)

                yield Page(send, receive)
        finally:
            running.kill()
            running.wait()
