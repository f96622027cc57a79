"""Interleaved timing: every contender runs once per repeat, so that other load slows all of them equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    contenders: Mapping[str, Callable[[], object]], repeats: int, at_least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds per contender and repeat, after one warm-up run.

    at_least: within a repeat a contender runs until this many seconds have passed; the mean is recorded.
    """
    counts = {}
    steps = {name: _replayed(run) if _replays else run for name, run in contenders.items()}
    for name, run in steps.items():
        run()
        counts[name] = max(1, round(at_least / max(1e-9, _seconds(run, 1))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in steps.items():
            times[name].append(_seconds(run, counts[name]))
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over repeats of ``name`` / ``base``, each ratio within one repeat."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def milliseconds(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Median repeat of each contender."""
    return {name: 1e3 * sorted(seconds)[len(seconds) // 2] for name, seconds in times.items()}


def use_clock(name: str) -> None:
    """Select the clock: ``wall``; ``cpu``, the processor time of this process, not affected by other processes; or
    ``graph``, the wall time of CUDA graph replays: GPU time, without Python between kernels.

    ``wall`` and ``cpu`` agree for one thread on an idle machine; with several threads only ``wall`` is a latency.
    """
    global _clock, _replays
    _clock = time.process_time if name == "cpu" else time.perf_counter
    _replays = name == "graph"
    if _replays:  # a capture must not use the default stream, which synchronises with all others
        torch.cuda.set_stream(torch.cuda.Stream())


_clock: Callable[[], float] = time.perf_counter
_replays = False


def _seconds(run: Callable[[], object], count: int) -> float:
    start = _finished()
    for _ in range(count):
        run()
    return (_finished() - start) / count


def _finished() -> float:
    """The clock after all queued work has finished, also on a GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return _clock()


def _replayed(run: Callable[[], object]) -> Callable[[], object]:
    """``run`` captured as a CUDA graph, after warm-up runs on a side stream as torch requires."""
    run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
