"""Headless Chromium without a driver: load a page, run a script in it, read the result."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import unescape
from itertools import count
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]


def act(page: str, script: str, folder: Path, width: int = 1200) -> tuple[Any, list[str]]:
    """The JSON value of ``script`` (a function body) after the page has loaded, and the console messages."""
    acting = f"<script>document.body.dataset.found = JSON.stringify((() => {{ {script} }})());</script>"
    file = folder / "acting.html"
    file.write_text(page.replace("</body>", acting + "</body>"), encoding="utf-8")
    done = run(folder, f"--window-size={width},900", "--dump-dom", file.as_uri())
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def press(page: str, keys: Sequence[str], script: str, folder: Path) -> Any:
    """The JSON value of ``script`` (an expression) after real keys: ``Tab``, ``Enter``, ``Space``, or text typed."""
    file = folder / "pressed.html"
    file.write_text(page, encoding="utf-8")
    with devtools(folder) as call:
        session = visit(call, file)
        for key in keys:
            if key not in KEYS:
                call("Input.insertText", session, text=key)
                continue
            code, text = KEYS[key]
            how = {"key": text or key, "code": key, "windowsVirtualKeyCode": code}
            call("Input.dispatchKeyEvent", session, type="keyDown", text=text, **how)
            call("Input.dispatchKeyEvent", session, type="keyUp", **how)
        return value_of(call, session, script)


def visit(call: Any, file: Path, width: int = 1200, scheme: str = "light") -> str:
    """Open a page ``width`` pixels wide, as narrow as a phone too, in a colour scheme; returns when it has loaded."""
    target = call("Target.createTarget", url="about:blank")["targetId"]
    session: str = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    call("Page.enable", session)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    call("Emulation.setDeviceMetricsOverride", session, **size)
    call("Emulation.setEmulatedMedia", session, features=[{"name": "prefers-color-scheme", "value": scheme}])
    call("Page.navigate", session, url=file.as_uri())
    while not value_of(call, session, LOADED):
        time.sleep(0.02)
    return session


def value_of(call: Any, session: str, script: str) -> Any:
    """The JSON value of an expression, of a promise when it is kept."""
    found = call("Runtime.evaluate", session, expression=script, returnByValue=True, awaitPromise=True)
    assert "exceptionDetails" not in found, found["exceptionDetails"]
    return found["result"].get("value")


LOADED = "location.protocol === 'file:' && document.readyState === 'complete'"  # not the initial blank page

KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), "Space": (32, " ")}
"""Virtual key codes, and the text that each key types."""


@contextmanager
def devtools(folder: Path) -> Iterator[Any]:
    """``call(method, session, **parameters)`` of the DevTools protocol, over file descriptors 3 and 4."""
    assert CHROMIUM is not None
    (read_ours, write_theirs), (read_theirs, write_ours) = os.pipe(), os.pipe()
    wired = f'exec "$@" 3<&{read_theirs} 4>&{write_theirs}'
    command = ["bash", "-c", wired, "bash", CHROMIUM, *FLAGS, "--remote-debugging-pipe"]
    browser = subprocess.Popen(
        [*command, f"--user-data-dir={folder / 'profile'}"],
        pass_fds=(read_theirs, write_theirs),
        stderr=subprocess.DEVNULL,
    )
    os.close(read_theirs)
    os.close(write_theirs)
    numbers = count(1)
    with os.fdopen(read_ours, "rb") as responses, os.fdopen(write_ours, "wb", buffering=0) as requests:

        def call(method: str, session: str | None = None, **parameters: Any) -> Any:
            number = next(numbers)
            request = {"id": number, "method": method, "params": parameters}
            requests.write(json.dumps(request | ({"sessionId": session} if session else {})).encode() + b"\0")
            while (response := read_message(responses)).get("id") != number:
                pass  # an event
            assert "result" in response, response
            return response["result"]

        try:
            yield call
        finally:
            browser.kill()
            browser.wait()


def read_message(pipe: Any) -> Any:
    """One JSON message of the DevTools protocol; a zero byte ends it."""
    text = bytearray()
    while (byte := pipe.read(1)) != b"\0":
        assert byte, "Chromium has exited"
        text += byte
    return json.loads(text)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
