"""Latency of a forward pass: the model and its original, alternating in one run."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from condconv_surgery.reporting.measure.forward_arguments import materialized
from condconv_surgery.reporting.measure.original_model import Original
from condconv_surgery.runtime.model_call import call
from condconv_surgery.runtime.modes import device_of, in_mode


@dataclass(frozen=True)
class Latency:
    """Seconds per forward pass of ``batch`` images: median and interquartile range over ``repeats``.

    original: median of the original network, measured alternately in the same run. ratio: median / original.
    warm_up: passes of each that were not counted.
    """

    batch: int
    median: float
    spread: float
    original: float
    ratio: float
    repeats: int
    warm_up: int = 0


def measure_latency(
    model: nn.Module, arguments: tuple[Any, ...], batch: int, *, seconds: float = 2.0, warm_up: int = 2
) -> Latency:
    """Time ``model`` and its original in eval mode, on the device of its weights.

    arguments: a batch of ``batch``; meta tensors become noise. seconds: about how long to measure in total, at least
    five passes each. warm_up: uncounted passes of each.
    """
    device = device_of(model)
    inputs = materialized(arguments, device)
    with in_mode(model, training=False), torch.inference_mode():
        times, original = _alternating(model, inputs, device, seconds, warm_up)
    median, base = statistics.median(times), statistics.median(original)
    low, _, high = statistics.quantiles(times, n=4)
    return Latency(batch, median, high - low, base, median / base, len(times), warm_up)


def environment(device: torch.device) -> dict[str, str]:
    """Device, number of threads and version of torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": f"{device.type} ({name})", "threads": str(torch.get_num_threads()), "torch": torch.__version__}


def _alternating(
    model: nn.Module, inputs: tuple[Any, ...], device: torch.device, seconds: float, warm_up: int
) -> tuple[list[float], list[float]]:
    """Seconds of each pass of the model and of its original. Alternating: a slow moment affects both."""
    converted: list[float] = []
    original: list[float] = []
    plain = Original(model)
    begin = time.perf_counter()
    rounds = 0
    while rounds < warm_up + 5 or time.perf_counter() - begin < seconds:
        for swapped, times in ((nullcontext(), converted), (plain.in_place(), original)):
            with swapped:
                elapsed = _timed(lambda: call(model, inputs), device)
            if rounds >= warm_up:
                times.append(elapsed)
        rounds += 1
    return converted, original


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    begin = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
