"""Peak activation memory and latency of a model and its original, at two batch sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from condconv_surgery.reporting.measure.forward_arguments import arguments_for, one_sample, repeated
from condconv_surgery.reporting.measure.latency import Latency, environment, measure_latency
from condconv_surgery.reporting.measure.original_model import Original
from condconv_surgery.reporting.measure.peak_activations import peak_activations


@dataclass(frozen=True)
class Peak:
    """Peak bytes of tensors in a forward pass of ``batch`` images, without weights and input."""

    batch: int
    before: int
    after: int


@dataclass(frozen=True)
class Cost:
    """Peak memory and latency at batch 1 and N.

    latency: empty if it was not measured. environment: hardware and versions of the latency.
    """

    peaks: tuple[Peak, ...]
    latency: tuple[Latency, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "peak_activation_bytes": [asdict(peak) for peak in self.peaks],
            "latency_seconds": [asdict(row) for row in self.latency],
            "environment": dict(self.environment),
        }


def measure_cost(model: nn.Module, inputs: Any = None, *, batch: int = 8, latency: bool = False) -> Cost:
    """Peak memory at batch 1 and ``batch``; with ``latency`` also the time, on the device of the model's weights."""
    one = one_sample(arguments_for(model, inputs))
    batches = {size: repeated(one, size) for size in sorted({1, batch})}
    after = {size: peak_activations(model, arguments) for size, arguments in batches.items()}
    with Original(model).in_place():
        before = {size: peak_activations(model, arguments) for size, arguments in batches.items()}
    peaks = tuple(Peak(size, before[size], after[size]) for size in batches)
    if not latency:
        return Cost(peaks)
    device = next((p.device for p in model.parameters()), None)
    times = tuple(measure_latency(model, arguments, size) for size, arguments in batches.items())
    return Cost(peaks, times, tuple(environment(device).items()) if device else ())
