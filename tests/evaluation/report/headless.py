"""A browser for tests: the few commands of the WebDriver protocol that they need, over HTTP and the standard library alone."""

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)
_ELEMENT = (
    "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element
)


def programs():
    """Paths of Chromium and its driver, or None where either is missing."""
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """Headless Chromium with a fresh profile, for a `with` block."""

    def __init__(self, profile):
        self._profile = profile

    def __enter__(self):
        browser, driver = programs()
        self._driver = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            port = next(
                found[1]
                for line in self._driver.stdout
                if (found := re.search(r"successfully on port (\d+)", line))
            )
            self._root = f"http://127.0.0.1:{port}"
            options = {"binary": browser, "args": [*FLAGS, f"--user-data-dir={self._profile}"]}
            logs = {"browser": "ALL"}
            made = self._call(
                "POST",
                "/session",
                {
                    "capabilities": {
                        "alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
                    }
                },
            )
        except BaseException:
            self.__exit__()
            raise
        self._root += f"/session/{made['sessionId']}"
        return self

    def __exit__(self, *_):
        if "/session/" in getattr(self, "_root", ""):
            self._call("DELETE", "")
        self._driver.terminate()
        self._driver.wait(10)
        self._driver.stdout.close()

    def _call(self, method, path, body=None):
        data = None if method in ("GET", "DELETE") else json.dumps(body or {}).encode()
        request = urllib.request.Request(
            self._root + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()[:2000]) from None

    def open(self, path):
        """Opens a file."""
        self._call("POST", "/url", {"url": path.resolve().as_uri()})

    def element(self, css):
        return self._call("POST", "/element", {"using": "css selector", "value": css})[_ELEMENT]

    def click(self, css):
        """A real click, at the element's middle: refused where something covers it."""
        self._call("POST", f"/element/{self.element(css)}/click")

    def keys(self, css, text):
        """Types into an element; arrows are \\ue012 (left) and \\ue014 (right)."""
        self._call("POST", f"/element/{self.element(css)}/value", {"text": text})

    def run(self, script, *arguments):
        """The value of `return ...` in the page."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def screenshot(self):
        """The window as PNG bytes."""
        return base64.b64decode(self._call("GET", "/screenshot"))

    def command(self, name, **parameters):
        """One command of Chromium's own debugging protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def log(self):
        """What the console has been told since the last call: errors, warnings, refused requests."""
        return self._call("POST", "/se/log", {"type": "browser"})

    def wait(self, script, seconds=10.0):
        """Until `return ...` is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"not within {seconds} s: {script}"
            time.sleep(0.05)
