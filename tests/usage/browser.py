"""Debian's Chromium without a window, steered over a pipe by its DevTools protocol: what it says, asks for and shows."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# In a process of its own: in a fork of this one matplotlib closes its fonts, whose files may be 3 or 4 here.
WITH_PIPES_AS_3_AND_4 = """import fcntl, os, sys
ends = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
for fd, number in zip(ends, (3, 4)):
    os.dup2(fd, number)
    os.close(fd)
os.execv(sys.argv[3], sys.argv[3:])
"""
# root has no sandbox; in a container /dev/shm is often small
FLAGS = """--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-extensions --hide-scrollbars
--disable-background-networking --force-color-profile=srgb --remote-debugging-pipe""".split()  # noqa: SIM905


class Browser:
    """One page in one browser; leaves nothing behind."""

    def __enter__(self) -> "Browser":
        assert PROGRAM, "no Chromium here; tests/system_packages.sh installs it"
        self._folder = tempfile.mkdtemp(prefix="hpckv-browser-")
        self._numbers, self._events, self._buffer, self._session = itertools.count(1), [], b"", None
        to_it, self._write = os.pipe()
        self._read, from_it = os.pipe()
        browser = [PROGRAM, *FLAGS, f"--user-data-dir={self._folder}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", WITH_PIPES_AS_3_AND_4, str(to_it), str(from_it), *browser],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(to_it, from_it),
            env={**os.environ, "HOME": self._folder},
        )
        os.close(to_it)
        os.close(from_it)
        try:
            targets = self._call("Target.getTargets")["targetInfos"]
            target = next(one["targetId"] for one in targets if one["type"] == "page")
            self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._session = None
        try:
            self._call("Browser.close")
            self._process.wait(timeout=20)
        except (OSError, AssertionError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, path: Path, *, width: int, is_dark: bool = False, scale: float = 1, medium: str = "") -> None:
        """Load a file and wait until all of it is there."""
        self._events.clear()
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=scale, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._call("Emulation.setEmulatedMedia", media=medium, features=[scheme])
        self._call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()

    def evaluate(self, expression: str):
        """The value of an expression in the page."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    @property
    def complaints(self) -> list[str]:
        """What the console got: errors, warnings, violations of the page's own policy."""
        named = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(event["params"]) for event in self._events if event["method"] in named]

    @property
    def requests(self) -> list[str]:
        """Every address that was asked for."""
        sent = [event for event in self._events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    @property
    def described_images(self) -> dict[str, str]:
        """Name and description of every image that a screen reader comes across."""
        nodes = self._call("Accessibility.getFullAXTree")["nodes"]
        images = [node for node in nodes if not node["ignored"] and node["role"]["value"] in ("image", "img")]
        return {node["name"]["value"]: node.get("description", {}).get("value", "") for node in images}

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def pdf(self) -> bytes:
        """As it is printed on A4."""
        return base64.b64decode(
            self._call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=False)["data"]
        )

    def _call(self, method: str, **parameters) -> dict:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        left = memoryview(json.dumps(message).encode() + b"\0")
        while left:
            left = left[os.write(self._write, left) :]
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _receive(self) -> dict:
        """The next message; events are kept."""
        end = time.monotonic() + 120
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(self._read, 1 << 20) if ready else b""
            assert chunk, "the browser has ended or hangs"
            self._buffer += chunk
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(raw)
        if "method" in message:
            self._events.append(message)
        return message
