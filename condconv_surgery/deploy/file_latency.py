"""Latency of an exported network in its runtime against the file of its static original, in one run."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from condconv_surgery.deploy.collapse_mixtures import make_plain, require_collapsible
from condconv_surgery.deploy.detectors import is_detector
from condconv_surgery.deploy.export_model import export, runtime_named
from condconv_surgery.deploy.mean_mixtures import mixture_of_zeros
from condconv_surgery.layers import conditional_layers, routers
from condconv_surgery.runtime.timed_turns import median_and_spread, seconds_of, timed_turns
from condconv_surgery.surgery.copy_model import copy_of


@dataclass(frozen=True)
class FileLatency:
    """Seconds of a call with ``batch`` images: median and interquartile range over ``repeats``.

    original: median of the static original's file, called in turns with it. ratio: median / original.
    forms: how many conditional layers have each. threads: of the runtime.
    """

    batch: int
    median: float
    spread: float
    original: float
    ratio: float
    repeats: int
    threads: int
    forms: dict[str, int]


def file_latency(
    model: nn.Module,
    batches: Sequence[int] = (1, 32),
    *,
    to: str = "onnx",
    form: str = "auto",
    batch: int | None = None,
    size: int | None = None,
    seconds: float = 5.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[FileLatency]:
    """Export ``model`` and its static original for a runtime and time both files there, in turns.

    to, form, batch, size: as ``export`` takes them. A file for one batch is measured with that one: with ``batch``, or
    one image where the runtime takes no other, or a detector. seconds: about how long to measure each batch, at least
    five calls of each. Threads: as many as torch uses.
    clock: ``time.process_time`` on a busy machine, with one thread.
    Raises ``InputError`` for a model without conditional layers, or a folded one, and as ``export``.
    """
    require_collapsible(model)
    runtime = runtime_named(to)
    if batch is None and (runtime.fixed_batch or is_detector(model)):
        batch = 1
    static = copy_of(model)
    static.eval()
    mixtures = {name: mixture_of_zeros(router) for name, router in routers(static).items()}
    make_plain(static, mixtures, set(conditional_layers(static)))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{name}{runtime.suffix}") for name in ("model", "static")]
        result = export(model, files[0], to=to, form=form, batch=batch, size=size)
        export(static, files[1], to=to, batch=batch, size=size)
        loaded = [runtime.load(file, torch.get_num_threads()) for file in files]
    _, *shape = result.shapes[0]
    rows = []
    for count in batches if batch is None else (batch,):
        images = torch.randn(count, *shape)
        calls = [_timed(call, images, clock) for call in loaded]
        times, original = timed_turns(calls, seconds, warm_up=1)  # the first call allocates
        (median, spread), base = median_and_spread(times), statistics.median(original)
        threads = torch.get_num_threads()
        rows.append(FileLatency(count, median, spread, base, median / base, len(times), threads, result.form_counts()))
    return rows


def _timed(call: Callable[[Tensor], object], images: Tensor, clock: Callable[[], float]) -> Callable[[], float]:
    """Calls the file, and returns how long that took."""
    return lambda: seconds_of(lambda: call(images), torch.device("cpu"), clock)
