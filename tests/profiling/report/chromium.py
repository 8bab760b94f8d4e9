"""Drive a headless Chromium over its DevTools pipe with the standard library alone."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SECONDS = 60  # for an answer; a healthy one takes milliseconds
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-extensions", "--disable-sync", "--remote-debugging-pipe"),
)
# Chromium reads commands from descriptor 3 and answers on 4, whichever ones it is given.
_LAUNCH = (
    "import fcntl, os, sys; "
    "spare = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]; "
    "os.dup2(spare[0], 3); os.dup2(spare[1], 4); "
    "os.execvp(sys.argv[3], sys.argv[3:])"
)


def find() -> str | None:
    """Return the path of an installed Chromium, if there is one."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Browser:
    """A running Chromium; commands are DevTools' own."""

    def __init__(self, commands: int, answers: int):
        self._commands = commands
        self._answers = answers
        self._read = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """Send a command and return its result; what happens meanwhile goes to `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def wait_for(self, method: str, session: str) -> None:
        """Wait for an event of a session."""
        seen = 0
        while True:
            for event in self.events[seen:]:
                if event.get("method") == method and event.get("sessionId") == session:
                    return
            seen = len(self.events)
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + _SECONDS
        while b"\0" not in self._read:
            with contextlib.suppress(BlockingIOError):
                if not (chunk := os.read(self._answers, 1 << 20)):
                    raise RuntimeError("Chromium closed its pipe")
                self._read += chunk
                continue
            if time.monotonic() > deadline:
                raise TimeoutError(f"Chromium said nothing in {_SECONDS} s")
            time.sleep(0.002)
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)


class Page:
    """One page in a browser, and all that it logged or requested since it was opened."""

    def __init__(
        self,
        browser: Browser,
        file: pathlib.Path,
        width: int,
        dark: bool = False,
        *,
        scripts: bool = True,
    ):
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Page.navigate", url=file.as_uri())
        browser.wait_for("Page.loadEventFired", self._session)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command to this page."""
        return self._browser.call(method, self._session, **params)

    def resize(self, width: int, height: int = 900) -> None:
        """Set the size of the window, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def run(self, expression: str) -> Any:
        """Evaluate JavaScript in the page and return its value."""
        done = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"]["exception"]["description"])
        return done["result"].get("value")

    def events(self, *methods: str) -> list[dict[str, Any]]:
        """Return what this page reported, of some methods."""
        mine = [e for e in self._browser.events if e.get("sessionId") == self._session]
        return [e["params"] for e in mine if e["method"] in methods]


@contextlib.contextmanager
def start(program: str) -> Iterator[Browser]:
    """Run a Chromium with an empty profile, and end it."""
    to_read, commands = os.pipe()
    answers, to_write = os.pipe()
    os.set_blocking(answers, False)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = [program, *_FLAGS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(to_read), str(to_write), *arguments],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        browser = Browser(commands, answers)
        try:
            yield browser
            browser.call("Browser.close")
            process.wait(timeout=_SECONDS)
        finally:
            process.kill()
            process.wait()
            os.close(commands)
            os.close(answers)
