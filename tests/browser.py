"""Headless Chromium without a driver: load a page, let a script act in it, read back what it found."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
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
    """The JSON value of ``script`` (a function body) after the page has loaded, and what the console said."""
    acting = f"<script>document.body.dataset.found = JSON.stringify((() => {{ {script} }})());</script>"
    file = folder / "acting.html"
    file.write_text(page.replace("</body>", acting + "</body>"), encoding="utf-8")
    done = run(folder, f"--window-size={width},900", "--dump-dom", file.as_uri())
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
