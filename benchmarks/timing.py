"""Interleaved timing: in each repeat every contender runs once, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    contenders: Mapping[str, Callable[[], object]], repeats: int, at_least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each contender in each repeat, after one run that is not counted.

    at_least: within a repeat a contender runs as often as it takes to fill this many seconds; the mean counts.
    """
    counts = {}
    for name, run in contenders.items():
        run()
        counts[name] = max(1, round(at_least / max(1e-9, _seconds(run, 1))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            times[name].append(_seconds(run, counts[name]))
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over repeats of ``name`` / ``base``, each taken within one repeat."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def milliseconds(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The middle repeat of each contender."""
    return {name: 1e3 * sorted(found)[len(found) // 2] for name, found in times.items()}


def use_clock(name: str) -> None:
    """``wall``, or ``cpu``: the processor time of this process, which other work on a busy machine does not add to.

    With one thread and an idle machine they agree; with more, only ``wall`` says how long one waits.
    """
    global _clock
    _clock = {"wall": time.perf_counter, "cpu": time.process_time}[name]


_clock: Callable[[], float] = time.perf_counter


def _seconds(run: Callable[[], object], count: int) -> float:
    start = _clock()
    for _ in range(count):
        run()
    return (_clock() - start) / count
