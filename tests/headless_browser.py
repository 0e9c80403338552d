"""A headless Chromium by chromedriver's own HTTP (the W3C's WebDriver): no package is needed.

Knows nothing of any page. ``missing()`` says what is not installed here.
"""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the standard's name of an element's id
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,1700",
]


def missing() -> str | None:
    """What a browser test lacks here, or None."""
    absent = [name for name in ("chromedriver",) if shutil.which(name) is None]
    absent += [] if _chromium() else ["chromium"]
    return f"{' and '.join(absent)} not installed" if absent else None


def free_port() -> int:
    """A port of the loopback that nobody listens to just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Browser:
    """Context manager with a window of its own profile; downloads land in ``folder / "downloads"``."""

    def __init__(self, folder: Path):
        self.downloads = folder / "downloads"
        self.profile = folder / "profile"
        self.log = folder / "chromedriver.log"

    def __enter__(self) -> "Browser":
        self.downloads.mkdir(parents=True)
        port = free_port()
        command = ["chromedriver", f"--port={port}", f"--log-path={self.log}"]
        self.driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}"
        until(self._is_ready, "chromedriver answers")
        options = {
            "binary": _chromium(),
            "args": [*ARGUMENTS, f"--user-data-dir={self.profile}"],
            "prefs": {"download.default_directory": str(self.downloads), "download.prompt_for_download": False},
        }
        wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
        try:
            self.session = f"/session/{self._call('POST', '/session', wanted)['sessionId']}"
        except BaseException:
            self._stop_driver()
            raise
        return self

    def __exit__(self, *_) -> None:
        try:
            self._call("DELETE", self.session)
        finally:
            self._stop_driver()

    def open(self, url: str) -> None:
        """Load a page."""
        self._call("POST", f"{self.session}/url", {"url": url})

    def run(self, script: str) -> object:
        """What a script in the page returns."""
        return self._call("POST", f"{self.session}/execute/sync", {"script": script, "args": []})

    def click(self, selector: str) -> None:
        """Scroll the element of a CSS selector into view and click on it."""
        self._on(selector, "click", {})

    def replace(self, selector: str, text: str) -> None:
        """Type ``text`` in place of what stands in a field, and leave the field."""
        keys = {"control": "\ue009", "null": "\ue000", "tab": "\ue004"}
        self._on(selector, "value", {"text": f"{keys['control']}a{keys['null']}{text}{keys['tab']}"})

    def text(self) -> str:
        """The text that the page shows."""
        return str(self.run("return document.body.innerText"))

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self._call("GET", f"{self.session}/screenshot")))

    def _on(self, selector: str, command: str, data: dict[str, object]) -> None:
        place = {"using": "css selector", "value": selector}
        element = self._call("POST", f"{self.session}/element", place)[ELEMENT]
        self._call("POST", f"{self.session}/element/{element}/{command}", data)

    def _is_ready(self) -> bool:
        try:
            return self._call("GET", "/status")["ready"]
        except OSError:
            return False

    def _stop_driver(self) -> None:
        self.driver.terminate()
        self.driver.wait(timeout=30)

    def _call(self, method: str, path: str, data: dict[str, object] | None = None):
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.loads(response.read())["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {json.loads(error.read())['value']['message']}") from None


def until(holds: Callable[[], object], what: str, *, seconds: float = 60):
    """What ``holds()`` returns once it is true. Raises AssertionError where it is not within ``seconds``."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, f"waited {seconds} s in vain until {what}"
        time.sleep(0.1)
    return value


def _chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("google-chrome")
