"""A page in a real browser: Chromium, driven through its DevTools protocol over a WebSocket."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from typing import Any

from websockets.sync.client import connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
]


class Browser:
    """A Chromium of one's own with one page; ``events`` are those that the page's DevTools have sent so far.

    The values of ``evaluate`` are JSON. Every wait ends: what takes longer than ``patience_s`` is an AssertionError.
    """

    def __init__(self, patience_s: float = 30):
        self.patience_s, self.events, self._numbers = patience_s, [], itertools.count(1)
        self._folder, self._stack = tempfile.mkdtemp(prefix="chromium-"), contextlib.ExitStack()
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self._folder}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self.port = int(self._until(self._read_port, "Chromium's port"))
            found = self._until(lambda: [its for its in self.targets() if its["type"] == "page"], "a page")
            self._socket = self._stack.enter_context(
                connect(found[0]["webSocketDebuggerUrl"], max_size=None, ping_interval=None)
            )
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def targets(self) -> list[dict]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/json/list", timeout=self.patience_s) as answer:
            return json.load(answer)

    def call(self, method: str, **parameters) -> dict[str, Any]:
        """Call a method of DevTools; its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=self.patience_s))
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self.events.append(message)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float | None = None) -> Any:
        """Until the expression is true in the page; its value."""
        return self._until(lambda: self.evaluate(expression), expression, seconds)

    def type(self, selector: str, value: str) -> None:
        """Set a field as a user does, whose page hears of it."""
        script = "{const its = document.querySelector(%s); its.value = %s;"
        script += " for (const kind of ['input', 'change']) its.dispatchEvent(new Event(kind, {bubbles: true}));}"
        self.evaluate(script % (json.dumps(selector), json.dumps(value)))

    def click(self, selector: str) -> None:
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def text(self, selector: str) -> str:
        return self.evaluate(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''")

    def look_like(self, width: int, height: int, scheme: str = "light", is_phone: bool = False) -> None:
        """A window of this size, in a light or dark color scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if is_phone else 1, "mobile": is_phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: str, is_whole: bool = False) -> None:
        """What is seen, or the whole page, as PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=is_whole)
        with open(path, "wb") as file:
            file.write(base64.b64decode(answer["data"]))

    def set_hidden(self, is_hidden: bool) -> None:
        """Whether another tab is in front of the page, which hears of it as of a user's."""
        if is_hidden:
            self._front = self.call("Target.createTarget", url="about:blank")["targetId"]
        else:
            self.call("Target.closeTarget", targetId=self._front)
        self.wait_for(f"document.hidden === {str(is_hidden).lower()}")

    def requests(self) -> list[tuple[float, str]]:
        """Seconds and path of each request that the page has made."""
        self.evaluate("0")  # which takes what has arrived
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [(its["timestamp"], "/" + its["request"]["url"].split("/", 3)[-1]) for its in sent]

    def complaints(self) -> list[str]:
        """What a console has shown as an error or a warning: exceptions, violations of the policy, failed requests."""
        self.evaluate("0")
        found = []
        for event in self.events:
            its = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(its["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled" and its["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(its["args"]))
            elif event["method"] == "Log.entryAdded" and its["entry"]["level"] in ("error", "warning"):
                found.append(f"{its['entry']['text']} {its['entry'].get('url', '')}")
        return found

    def _read_port(self) -> str:
        assert self._process.poll() is None, "Chromium has ended"
        with contextlib.suppress(OSError), open(os.path.join(self._folder, "DevToolsActivePort")) as file:
            return file.readline().strip()
        return ""

    def _until(self, condition, what: str, seconds: float | None = None) -> Any:
        end = time.monotonic() + (seconds or self.patience_s)
        while not (value := condition()):
            assert time.monotonic() < end, f"not in time: {what}"
            time.sleep(0.05)
        return value

    def close(self) -> None:
        self._stack.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
