"""Output of the command line: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any


def say(line: str = "") -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr, flush=True)


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(data, indent=2, allow_nan=False))
