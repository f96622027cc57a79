"""Interleaved timing: in each repeat every contender runs once, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    contenders: Mapping[str, Callable[[], object]], repeats: int, at_least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each contender in each repeat, after one run that is not counted.

    at_least: within a repeat a contender runs as often as it takes to fill this many seconds; the mean counts.
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
    """The median over repeats of ``name`` / ``base``, each taken within one repeat."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def milliseconds(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The middle repeat of each contender."""
    return {name: 1e3 * sorted(found)[len(found) // 2] for name, found in times.items()}


def use_clock(name: str) -> None:
    """``wall``; ``cpu``, the processor time of this process, which other work on a busy machine does not add to; or
    ``graph``, the wall time of replays of a CUDA graph: a GPU's own time, with no Python between its kernels.

    With one thread and an idle machine the first two agree; with more, only ``wall`` says how long one waits.
    """
    global _clock, _replays
    _clock = time.process_time if name == "cpu" else time.perf_counter
    _replays = name == "graph"
    if _replays:  # a capture must not meet the default stream, on which all others wait
        torch.cuda.set_stream(torch.cuda.Stream())


_clock: Callable[[], float] = time.perf_counter
_replays = False


def _seconds(run: Callable[[], object], count: int) -> float:
    start = _finished()
    for _ in range(count):
        run()
    return (_finished() - start) / count


def _finished() -> float:
    """The time when everything asked for is done, on a GPU too."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return _clock()


def _replayed(run: Callable[[], object]) -> Callable[[], object]:
    """``run`` as a CUDA graph, recorded after runs on a stream of their own, as torch asks for."""
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
