"""Output of the command line: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from condconv_surgery.errors import listed


def say(line: str = "") -> None:
    """Print a line on stderr, where there is one: a log on a full disk or a closed pipe fails no command."""
    if sys.stderr is not None:  # closed by the shell; print() would take stdout instead
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def say_by_reason(title: str, reasons: Iterable[tuple[str, str]]) -> None:
    """A line for each reason, with the names of all that have it. reasons: (name, reason)."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons:
        names.setdefault(reason, []).append(name)
    for reason, own in names.items():
        say(f"{title:<12}{listed(own)}: {reason}")


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(data, indent=2, allow_nan=False))


def is_first() -> bool:
    """Is this the first process of a run under torchrun? Only it prints."""
    return os.environ.get("RANK", "0") == "0"
