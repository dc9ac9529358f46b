"""Debian's Chromium without a window, steered over a pipe by its DevTools protocol: what it says, asks for and shows."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page in one browser; leaves nothing behind."""

    def __enter__(self) -> "Browser":
        self._folder = tempfile.mkdtemp(prefix="hpckv-browser-")
        self._numbers, self._events, self._buffer = itertools.count(1), [], b""
        to_it, self._write = os.pipe()
        self._read, from_it = os.pipe()

        def as_3_and_4() -> None:
            kept = os.dup(to_it), os.dup(from_it)  # either may be 3 or 4 itself
            for fd, number in zip(kept, (3, 4), strict=True):
                os.dup2(fd, number, inheritable=True)

        # root has no sandbox; in a container /dev/shm is often small
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-extensions",
        ]
        flags += [
            "--disable-background-networking",
            "--force-color-profile=srgb",
            "--hide-scrollbars",
            f"--user-data-dir={self._folder}",
        ]
        self._process = subprocess.Popen(
            [PROGRAM, *flags, "--remote-debugging-pipe", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=as_3_and_4, close_fds=False, env={**os.environ, "HOME": self._folder}, start_new_session=True,
        )  # fmt: skip
        os.close(to_it)
        os.close(from_it)
        self._session = None
        targets = self._call("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *_) -> None:
        self._session = None
        try:
            self._call("Browser.close")
            self._process.wait(timeout=20)
        except (OSError, subprocess.TimeoutExpired):
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
