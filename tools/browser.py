"""Headless Chromium, controlled through a pipe, for tests and screenshots of the page.

    python tools/browser.py page.html#40 out.png --width 1200 --height 900 --dark
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from weights.output_file import write_output

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in found if path), None)


class Browser:
    """One page in a fresh profile. events: all that the browser has told so far (errors, requests)."""

    def __init__(self, width: int = 1200, height: int = 900, dark: bool = False, scale: float = 1) -> None:
        self.folder = tempfile.mkdtemp()
        chromium = find_chromium()
        if chromium is None:
            raise FileNotFoundError("no chromium")
        (to_read, self.to), (self.out, to_write) = os.pipe(), os.pipe()

        def as_3_and_4() -> None:
            spare = os.dup(to_read), os.dup(to_write)
            os.dup2(spare[0], 3)
            os.dup2(spare[1], 4)

        self.process = subprocess.Popen(
            [chromium, *FLAGS, f"--user-data-dir={self.folder}", f"--window-size={width},{height}", "about:blank"],
            preexec_fn=as_3_and_4, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.buffer, self.count, self.session, self.events = b"", 0, None, []           # type: ignore[var-annotated]
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for name in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{name}.enable")
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                  mobile=width < 600)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.out)
        shutil.rmtree(self.folder, ignore_errors=True)

    def read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            piece = os.read(self.out, 1 << 20)
            if not piece:
                raise ConnectionError("chromium has ended")
            self.buffer += piece
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)          # type: ignore[no-any-return]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            told = self.read()
            if told.get("id") == self.count:
                if "error" in told:
                    raise RuntimeError(told["error"]["message"])
                return told["result"]       # type: ignore[no-any-return]
            self.events.append(told)

    def open(self, address: str) -> None:
        """address: a file: address, perhaps with a fragment. Waits until the page has run its script."""
        self.call("Page.navigate", url=address)
        deadline = time.monotonic() + 60
        while self.value("document.readyState") != "complete":
            if time.monotonic() > deadline:
                raise TimeoutError(address)
            time.sleep(0.05)
        self.value("typeof ready === 'object' ? ready.then(() => 0) : 0")

    def value(self, expression: str) -> Any:
        """What an expression is worth in the page; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", "exception"))
        return found["result"].get("value")

    def press(self, key: str) -> None:
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=key if key == " " else "")
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screenshot(self, whole: bool = False) -> bytes:
        """PNG of what is in view, or of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def problems(self) -> list[str]:
        """Errors of the page's script, and refusals of its policy."""
        self.value("0")                     # what was told until now is read
        return [json.dumps(one["params"]) for one in self.events
                if one.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]

    def requests(self) -> list[str]:
        """Addresses that were asked for, without what stands in the page itself."""
        self.value("0")
        sent = [one["params"] for one in self.events if one.get("method") == "Network.requestWillBeSent"]
        return [url for one in sent if not (url := one["request"]["url"]).startswith("data:")]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("page", help="page.html, or page.html#TOKEN,ROW")
    flags.add_argument("out", type=Path)
    flags.add_argument("--width", type=int, default=1200)
    flags.add_argument("--height", type=int, default=900)
    flags.add_argument("--scale", type=float, default=1.0)
    flags.add_argument("--dark", action="store_true")
    flags.add_argument("--whole", action="store_true", help="the whole page, not what is in view")
    flags.add_argument("--at", metavar="ID", help="scroll to this element first")
    flags.add_argument("--frames-per-second", action="store_true", help="play, and say how many pictures a second")
    given = flags.parse_args()
    path, _, fragment = given.page.partition("#")
    with Browser(given.width, given.height, given.dark, given.scale) as browser:
        browser.open(Path(path).resolve().as_uri() + (f"#{fragment}" if fragment else ""))
        if given.at:
            browser.value(f"document.getElementById({given.at!r}).scrollIntoView()")
        if given.frames_per_second:
            seconds = browser.value(PLAY)
            print(f"{seconds:.1f} pictures a second")
        time.sleep(0.3)
        write_output(given.out, browser.screenshot(given.whole))
        for problem in browser.problems():
            print(problem)


# The page's own count of the maps it has drawn, over four seconds of playing at its fastest.
PLAY = """new Promise(done => {
    show(0); document.getElementById("speed").value = "30"; play();
    const first = drawnFrames, began = performance.now();
    setTimeout(() => done((drawnFrames - first) / (performance.now() - began) * 1000), 4000);
})"""

if __name__ == "__main__":
    main()
