"""Cost of ``convert``: peak memory relative to the size of both models, and seconds, with and without the proof.

Each conversion runs in its own process; its memory after the imports is subtracted. ``python -m benchmarks convert``.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchvision
from torch import nn

from condconv_surgery.recipe import CondConv
from condconv_surgery.surgery import convert


@dataclass(frozen=True)
class ConversionCost:
    """One conversion. Sizes in bytes: parameters and buffers of the original and of the converted model, and the peak
    resident memory of the process from before the original is built to the end of the conversion, minus its start."""

    model: str
    experts: int
    prove: bool
    seconds: float
    original: int
    converted: int
    peak: int

    @property
    def ratio(self) -> float:
        """Peak over the size of the two models."""
        return self.peak / (self.original + self.converted)


def measure_conversion(name: str, experts: int, prove: bool, threads: int) -> ConversionCost:
    """Convert torchvision's ``name`` in a new process."""
    command = [sys.executable, "-m", "benchmarks.conversion_cost", name, str(experts), str(int(prove)), str(threads)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return ConversionCost(**json.loads(answer.splitlines()[-1]))


def conversion_table(results: list[ConversionCost]) -> str:
    """One line per conversion."""
    lines = [
        f"{'model':20} {'experts':>7} {'proof':>5} {'seconds':>8} {'both MiB':>9} {'peak MiB':>9} {'peak/both':>9}"
    ]
    for r in results:
        both = (r.original + r.converted) / 2**20
        lines.append(
            f"{r.model:20} {r.experts:7} {'yes' if r.prove else 'no':>5} {r.seconds:8.2f} {both:9.0f} "
            f"{r.peak / 2**20:9.0f} {r.ratio:9.2f}"
        )
    return "\n".join(lines)


def _convert_here(name: str, experts: int, prove: bool) -> ConversionCost:
    before = _resident()
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    begin = time.perf_counter()
    converted = convert(model, CondConv(experts=experts), prove=prove).model
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return ConversionCost(name, experts, prove, seconds, _size(model), _size(converted), peak)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def _size(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    cost = _convert_here(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")
    sys.stdout.write(f"{json.dumps(asdict(cost))}\n")
