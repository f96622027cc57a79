"""Latency of a forward pass: the model and its original, alternating in one run."""

from __future__ import annotations

import platform
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from condconv_surgery.reporting.measure.forward_arguments import materialized
from condconv_surgery.reporting.measure.original_model import Original
from condconv_surgery.runtime.model_call import call
from condconv_surgery.runtime.modes import device_of, in_mode
from condconv_surgery.runtime.timed_turns import median_and_spread, seconds_of, timed_turns


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

    @property
    def doubt(self) -> str:
        """Why the ratio says little, on a machine with other work; empty where passes vary by at most half."""
        variation = self.spread / self.median
        return f"uncertain: passes varied by {variation:.0%}" if variation > 0.5 else ""


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
    (median, spread), base = median_and_spread(times), statistics.median(original)
    return Latency(batch, median, spread, base, median / base, len(times), warm_up)


def environment(device: torch.device) -> dict[str, str]:
    """Device, number of threads and version of torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": f"{device.type} ({name})", "threads": str(torch.get_num_threads()), "torch": torch.__version__}


def _alternating(
    model: nn.Module, inputs: tuple[Any, ...], device: torch.device, seconds: float, warm_up: int
) -> list[list[float]]:
    """Seconds of each pass of the model, and of its original."""
    plain = Original(model)

    def converted() -> float:
        return seconds_of(lambda: call(model, inputs), device)

    def original() -> float:
        with plain.in_place():
            return seconds_of(lambda: call(model, inputs), device)

    return timed_turns([converted, original], seconds, warm_up)
