"""MkDocs hook: a line ``<!-- run: condconv convert --help -->`` becomes a block with the output of that command."""

import os
import re
import shlex
import subprocess
import sys
from typing import Any

MARKER = re.compile(r"^<!-- run: condconv (?P<arguments>.*) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for each page before it is rendered."""
    return MARKER.sub(_output, markdown)


def _output(match: re.Match[str]) -> str:
    command = [sys.executable, "-m", "condconv_surgery", *shlex.split(match["arguments"])]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = [line.rstrip() for line in done.stdout.strip("\n").splitlines()]
    return "\n".join(["```text", *lines, "```"])
