"""The one protocol of every figure: pages kept, contenders in turns, medians with quartiles, a quiet machine.

- Freed memory stays with the process for every contender: what a time says does not depend on who asked the system for
  pages first (benchmarks/NOTES.md).
- Contenders run in turns, at least ``MIN_REPEATS`` times; a ratio is taken within a turn.
- The processor time of other processes is measured before and during a measurement, and too much of it is an error.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import interleaved
from condconv_surgery.errors import InputError

MIN_REPEATS = 5
MAX_OTHERS = 0.1
"""Cores that other processes may use: a tenth of one changes a ratio by less than repeats differ."""

SECONDS_BEFORE = 0.5
"""Of looking at other processes before a measurement."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least two values."""
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(lower, median, upper)

    @property
    def inverse(self) -> Spread:
        """Of the ratios the other way round."""
        return Spread(1 / self.upper, 1 / self.median, 1 / self.lower)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lower:.2f}-{self.upper:.2f})"


@dataclass(frozen=True)
class Measurement:
    """Seconds of each contender, ratios to the first one, and the cores that other processes used meanwhile."""

    seconds: dict[str, Spread]
    ratios: dict[str, Spread]
    repeats: int
    threads: int
    others: float

    def as_json(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Measurement:
        """The inverse of ``as_json``."""
        spreads = {
            part: {name: Spread(**spread) for name, spread in values[part].items()} for part in ("seconds", "ratios")
        }
        return cls(**{**values, **spreads})


@dataclass(frozen=True)
class Protocol:
    """repeats: turns of each contender. threads: of torch. max_others: cores that other processes may use.

    Raises ``InputError`` for fewer than ``MIN_REPEATS`` repeats.
    """

    repeats: int = MIN_REPEATS
    threads: int = 2
    max_others: float = MAX_OTHERS

    def __post_init__(self) -> None:
        if self.repeats < MIN_REPEATS:
            raise InputError(
                f"A figure of {self.repeats} repeats.", f"At least {MIN_REPEATS} have quartiles.", "--repeats 5"
            )

    def measure(self, contenders: Mapping[str, Callable[[], object]], at_least: float = 0.0) -> Measurement:
        """Run all contenders in turns; the ratios are to the first one.

        at_least: seconds for which a contender runs in a turn. Raises ``InputError`` on a busy machine.
        """
        keep_pages()
        torch.set_num_threads(self.threads)
        watch = OtherLoad()
        time.sleep(SECONDS_BEFORE)
        self._check(watch.cores(), "before the measurement")
        watch = OtherLoad()
        times = interleaved(contenders, self.repeats, at_least)
        others = watch.cores()
        self._check(others, "during the measurement")
        base = times[next(iter(contenders))]
        ratios = {name: Spread.of([a / b for a, b in zip(of, base, strict=True)]) for name, of in times.items()}
        seconds = {name: Spread.of(of) for name, of in times.items()}
        return Measurement(seconds, ratios, self.repeats, self.threads, others)

    def _check(self, others: float, when: str) -> None:
        if others > self.max_others:
            raise InputError(
                f"Other processes used {others:.2f} cores {when}.",
                f"A figure is taken where they use at most {self.max_others:g}.",
                f"wait, or --max-others {others + 0.1:.1f} for a look that is no figure",
            )


class OtherLoad:
    """The cores that other processes use from now on (Linux)."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._busy, self._own = _busy_seconds(), _own_seconds()

    def cores(self) -> float:
        """On average since the start; never negative."""
        elapsed = max(1e-9, time.perf_counter() - self._start)
        return max(0.0, (_busy_seconds() - self._busy) - (_own_seconds() - self._own)) / elapsed


def keep_pages() -> None:
    """Have the C library keep freed memory instead of returning it to the system; nothing where it is not glibc."""
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)


def _busy_seconds() -> float:
    """Processor time of all processes together since the system started."""
    fields = list(map(int, Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]))
    user, nice, system, _, _, interrupt, soft_interrupt = fields[:7]
    return (user + nice + system + interrupt + soft_interrupt) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])
