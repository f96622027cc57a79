"""Loops that take turns, timed by two clocks: the one on the wall, and the processors'.

A loop's readers work ahead, also while the other loop has its turn. So the processor time of a turn is that of this
process within it, and that of the loop's readers from its beginning to the beginning of the loop's next turn.
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
    """Seconds that some steps took, on the wall and of all processors."""

    wall: float
    cpu: float


class Loop:
    """``step()`` again and again; ``readers`` are the processes that the first steps started."""

    def __init__(self, step: Callable[[], object]) -> None:
        before = set(multiprocessing.active_children())
        self.step = step
        for _ in range(WARM_STEPS):
            step()
        self.readers = [p.pid for p in multiprocessing.active_children() if p not in before and p.pid is not None]

    def reader_seconds(self) -> float:
        """Processor time of the readers since they began."""
        return sum(map(process_seconds, self.readers))


def take_turns(loops: Mapping[str, Loop], rounds: int, steps: int) -> dict[str, list[Turn]]:
    """The turns of each loop, one in each round; who is first changes from round to round."""
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
    """How many cores this process and all readers keep busy, on average, while ``loop`` alone runs."""
    for _ in range(WARM_STEPS):  # the other loop's readers fill their queue and rest
        loop.step()
    children = [p.pid for p in multiprocessing.active_children() if p.pid is not None]
    began = time.perf_counter(), time.process_time() + sum(map(process_seconds, children))
    for _ in range(steps):
        loop.step()
    cpu = time.process_time() + sum(map(process_seconds, children)) - began[1]
    return cpu / (time.perf_counter() - began[0])


def process_seconds(pid: int) -> float:
    """Processor time of a living process, in user and in kernel mode (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
