"""A headless Chromium for tests, driven over its DevTools protocol: open a page, ask it, and see what it asked for."""

import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.conftest import PATIENCE, text_of, until

PROGRAM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if p), None)
QUIET = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
    "--allow-file-access-from-files",
)


class NoAnswer(Exception):
    """The browser refused what it was asked."""


class Page:
    """One tab. `reported` holds console errors and exceptions, `asked` the addresses that were requested."""

    def __init__(self, socket):
        self.socket, self.numbers, self.reported, self.asked = socket, itertools.count(1), [], []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                if "error" in message:
                    raise NoAnswer(message)
                return message["result"]
            self.note(message)

    def note(self, message: dict) -> None:
        kind, about = message.get("method"), message.get("params", {})
        if kind == "Network.requestWillBeSent":
            self.asked.append(about["request"]["url"])
        elif kind == "Runtime.exceptionThrown":
            self.reported.append(about["exceptionDetails"]["text"])
        elif kind == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.reported.append(about["entry"]["text"])
        elif kind == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
            self.reported.append(str(about["args"]))

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> "Page":
        self.reported.clear()
        self.asked.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.sees("window.old = true")  # it still answers for a moment when the next one is on its way
        self.call("Page.navigate", url=url)
        return self.arrived(url)

    def arrived(self, url: str) -> "Page":
        """Once a new document is there and whole."""
        there = f"{url.split('#')[0]} complete"
        until(
            lambda: self.sees("window.old ? '' : location.href.split('#')[0] + ' ' + document.readyState") == there,
            f"{url} does not load",
        )
        return self

    def sees(self, expression: str):
        """As `ask`; None where there is nothing to be asked, as between two documents."""
        try:
            return self.ask(expression)
        except NoAnswer:
            return None

    def ask(self, expression: str):
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        codes = {"Tab": 9, "Enter": 13}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes[key],
                **({"text": "\r"} if key == "Enter" and kind == "keyDown" else {}),
            )


@contextlib.contextmanager
def browser():
    """A Page in a browser of its own."""
    import websocket

    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [PROGRAM, *QUIET, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = Path(profile, "DevToolsActivePort")
            until(lambda: len(text_of(port).splitlines()) >= 2, "Chromium does not start", process)
            address, path = text_of(port).splitlines()[:2]
            link = websocket.create_connection(f"ws://127.0.0.1:{address}{path}", timeout=PATIENCE)
            target = _result(link, 1, "Target.createTarget", url="about:blank")["targetId"]
            page = websocket.create_connection(f"ws://127.0.0.1:{address}/devtools/page/{target}", timeout=PATIENCE)
            yield Page(page)
            page.close()
            link.close()
        finally:
            process.kill()
            process.wait()


def _result(link, number: int, method: str, **parameters) -> dict:
    link.send(json.dumps({"id": number, "method": method, "params": parameters}))
    while (message := json.loads(link.recv())).get("id") != number:
        pass
    return message["result"]
