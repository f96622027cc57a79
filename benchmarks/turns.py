"""Training loops that run in turns, timed by wall clock and by processor time.

The data workers of a loop prefetch also during the turn of the other loop. The processor time of a turn is therefore
that of this process during the turn, plus that of the loop's workers until its next turn begins.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

WARM_STEPS = 5


class Turn(NamedTuple):
    """Seconds of a number of steps: wall clock and processor time."""

    wall: float
    cpu: float


class Loop:
    """Calls ``step()``; ``readers`` are the worker processes that the first steps started."""

    def __init__(self, step: Callable[[], object]) -> None:
        before = set(multiprocessing.active_children())
        self.step = step
        for _ in range(WARM_STEPS):
            step()
        self.readers = [p.pid for p in multiprocessing.active_children() if p not in before and p.pid is not None]

    def reader_seconds(self) -> float:
        """Processor time of the workers since they started."""
        return sum(map(process_seconds, self.readers))


def take_turns(loops: Mapping[str, Loop], rounds: int, steps: int) -> dict[str, list[Turn]]:
    """Turns of each loop, one per round; the order alternates from round to round."""
    own: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    read: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        for name in list(loops) if number % 2 == 0 else reversed(loops):
            read[name].append(loops[name].reader_seconds())
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                loops[name].step()
            own[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    for name, loop in loops.items():
        read[name].append(loop.reader_seconds())
    return {
        name: [Turn(wall, cpu + read[name][i + 1] - read[name][i]) for i, (wall, cpu) in enumerate(own[name])]
        for name in loops
    }


def busy_cores(loop: Loop, steps: int) -> float:
    """Average number of cores that this process and all workers use while only ``loop`` runs."""
    for _ in range(WARM_STEPS):  # the other loop's workers fill their queue and go idle
        loop.step()
    children = [p.pid for p in multiprocessing.active_children() if p.pid is not None]
    began = time.perf_counter(), time.process_time() + sum(map(process_seconds, children))
    for _ in range(steps):
        loop.step()
    cpu = time.process_time() + sum(map(process_seconds, children)) - began[1]
    return cpu / (time.perf_counter() - began[0])


def process_seconds(pid: int) -> float:
    """Processor time of a running process, user plus kernel mode (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
