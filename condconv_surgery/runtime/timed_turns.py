"""Time calls in turns, so that a slow moment of the machine affects all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

FEWEST = 5
"""Counted calls of each, however long they take."""


def timed_turns(timed: Sequence[Callable[[], float]], seconds: float, warm_up: int) -> list[list[float]]:
    """What each function of ``timed`` returned, call by call: the seconds that it took by a clock of its own.

    seconds: about how long to measure in total. warm_up: uncounted calls of each.
    """
    times: list[list[float]] = [[] for _ in timed]
    begin, rounds = time.perf_counter(), 0
    while rounds < warm_up + FEWEST or time.perf_counter() - begin < seconds:
        for own, call in zip(times, timed, strict=True):
            own.append(call())
        rounds += 1
    return [own[warm_up:] for own in times]


def seconds_of(
    call: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The time of one call, until its work on ``device`` is done."""
    _synchronize(device)
    begin = clock()
    call()
    _synchronize(device)
    return clock() - begin


def median_and_spread(times: Sequence[float]) -> tuple[float, float]:
    """The median and the interquartile range of at least two values."""
    low, median, high = statistics.quantiles(times, n=4)
    return median, high - low


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
