"""Where the values of a report come from: file, data, command, date, versions."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch


@dataclass(frozen=True)
class Provenance:
    """The origin of a report; what is not known is empty. Dates are in UTC.

    file: the model's file, its size and when it was written. data: number of images and where they are from.
    """

    file: str = ""
    data: str = ""
    command: str = ""
    date: str = ""
    versions: str = ""

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) of what is known."""
        return [(name, value) for name, value in asdict(self).items() if value]

    def of_command(self, command: str, source: str) -> Provenance:
        """The same with the command that was typed, and the model that it named, a file or another source."""
        return replace(self, command=command, file=_described(source))


def provenance_now(data: str = "") -> Provenance:
    """Date and versions of this process."""
    own = sys.modules["condconv_surgery"].__version__  # without an import: the package imports its reports
    versions = f"condconv-surgery {own}, torch {torch.__version__}, Python {platform.python_version()}"
    return Provenance(data=data, date=_utc(datetime.now(timezone.utc)), versions=versions)


def _described(source: str) -> str:
    path = Path(source)
    if not path.is_file():
        return source
    facts = path.stat()
    written = _utc(datetime.fromtimestamp(facts.st_mtime, timezone.utc))
    return f"{source} ({facts.st_size:,} bytes, written {written})"


def _utc(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC")
