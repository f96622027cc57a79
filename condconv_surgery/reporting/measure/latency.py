"""How long a forward pass takes, the model and its original by turns in one run."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from condconv_surgery.reporting.measure.original_model import Original
from condconv_surgery.reporting.measure.report_inputs import materialized
from condconv_surgery.runtime.modes import in_mode


@dataclass(frozen=True)
class Latency:
    """Seconds per forward pass of ``batch`` images: median and interquartile range over ``repeats``.

    original: the median of the plain network, timed by turns in the same run. ratio: median / original. warm_up: passes
    of each that were not counted.
    """

    batch: int
    median: float
    spread: float
    original: float
    ratio: float
    repeats: int
    warm_up: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_latency(
    model: nn.Module, arguments: tuple[Any, ...], batch: int, *, seconds: float = 2.0, warm_up: int = 2
) -> Latency:
    """Time ``model`` against its original in eval mode, where its weights are.

    arguments: of a batch of ``batch``; meta tensors become noise. seconds: about how long to measure in all, at least
    five times each. warm_up: passes of each before the clock counts.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = materialized(arguments, device)
    with in_mode(model, training=False), torch.inference_mode():
        mine, original = _by_turns(model, inputs, device, seconds, warm_up)
    median, base = statistics.median(mine), statistics.median(original)
    low, _, high = statistics.quantiles(mine, n=4)
    return Latency(batch, median, high - low, base, median / base, len(mine), warm_up)


def environment(device: torch.device) -> dict[str, str]:
    """What a time depends on: the machine, the number of threads, the version of torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": f"{device.type} ({name})", "threads": str(torch.get_num_threads()), "torch": torch.__version__}


def _by_turns(
    model: nn.Module, inputs: tuple[Any, ...], device: torch.device, seconds: float, warm_up: int
) -> tuple[list[float], list[float]]:
    """Alternating, so that a slow moment of the machine meets both alike."""
    mine: list[float] = []
    original: list[float] = []
    plain = Original(model)
    begin = time.perf_counter()
    rounds = 0
    while rounds < warm_up + 5 or time.perf_counter() - begin < seconds:
        for place, times in ((nullcontext(), mine), (plain.in_place(), original)):
            with place:
                taken = _timed(lambda: model(*inputs), device)
            if rounds >= warm_up:
                times.append(taken)
        rounds += 1
    return mine, original


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
