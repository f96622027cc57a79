"""Mixing the kernel of one image from experts in float32, bfloat16 and int8.

``python -m benchmarks.compressed_experts`` prints the median of each over that of ``torch.mm`` from float32, measured
in turns, one thread, processor time. *own*: a loop in C++, compiled by g++ for this processor, that reads each expert
once and writes the mixed kernel as float32.
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from condconv_surgery.runtime.timed_turns import seconds_of, timed_turns

EXPERTS = 4
LAYERS = {"3x3, 512 to 512": (512, 4608), "3x3, 256 to 256": (256, 2304), "1x1, 160 to 960": (960, 160)}
"""Filters, and weights of one."""

BYTES = 300_000_000
"""Experts in float32 that are read in turn, so that none stays in a cache."""

SOURCE = r"""
#include <cstdint>
static inline float f(float v) { return v; }
static inline float f(int8_t v) { return v; }
static inline float f(uint16_t v) { union { uint32_t u; float x; } k; k.u = uint32_t(v) << 16; return k.x; }
template <typename T> void mix(const T* w, const float* scale, const float* gate, float* y, int64_t O, int64_t n) {
  for (int64_t o = 0; o < O; o++) {
    const T *a = w + o * n, *b = a + O * n, *c = b + O * n, *d = c + O * n;
    float g[4];
    for (int e = 0; e < 4; e++) g[e] = gate[e] * (scale ? scale[e * O + o] : 1.f);
    for (int64_t i = 0; i < n; i++) y[o * n + i] = g[0] * f(a[i]) + g[1] * f(b[i]) + g[2] * f(c[i]) + g[3] * f(d[i]);
  }
}
extern "C" {
#define MIX(name, T) \
  void name(const T* w, const float* s, const float* g, float* y, int64_t O, int64_t n) { mix(w, s, g, y, O, n); }
MIX(float32, float)
MIX(bfloat16, uint16_t)
MIX(int8, int8_t)
}
"""


def compiled(folder: Path) -> ctypes.CDLL:
    """The loops of ``SOURCE``."""
    source, library = folder / "mix.cpp", folder / "mix.so"
    source.write_text(SOURCE)
    options = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
    subprocess.run(["g++", *options, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def contenders(filters: int, size: int, own: ctypes.CDLL) -> dict[str, Callable[[Tensor, Tensor, Tensor], object]]:
    """Functions of the experts in float32, bfloat16 and int8."""
    gate, scale = torch.rand(1, EXPERTS), torch.rand(EXPERTS, filters)
    half, scaled, out = gate.bfloat16(), gate.t() * scale, torch.empty(1, filters * size)

    def by_torch(w: Tensor, b: Tensor, q: Tensor) -> Tensor:
        experts = q.view(EXPERTS, filters, size)
        kernel = experts[0].float().mul_(scaled[0][:, None])
        for expert, factor in zip(experts[1:], scaled[1:], strict=True):
            kernel.addcmul_(expert.float(), factor[:, None])
        return kernel

    def call(name: str, experts: Tensor, scales: Tensor | None) -> None:
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (experts, scales, gate, out)]
        getattr(own, name)(*pointers, ctypes.c_int64(filters), ctypes.c_int64(size))

    return {
        "float32, torch.mm": lambda w, b, q: torch.mm(gate, w, out=out),
        "bfloat16, torch.mm": lambda w, b, q: torch.mm(half, b),
        "int8, torch": by_torch,
        "float32, own": lambda w, b, q: call("float32", w, None),
        "bfloat16, own": lambda w, b, q: call("bfloat16", b, None),
        "int8, own": lambda w, b, q: call("int8", q, scale),
    }


def measure(filters: int, size: int, own: ctypes.CDLL) -> dict[str, float]:
    """The median seconds of each contender for one layer."""
    count = BYTES // (4 * EXPERTS * filters * size)
    floats = [torch.randn(EXPERTS, filters * size) for _ in range(count)]
    experts = [(w, w.bfloat16(), (w * 30).clamp(-127, 127).to(torch.int8)) for w in floats]
    calls = contenders(filters, size, own)

    def seconds(name: str) -> float:
        mix = calls[name]
        return seconds_of(lambda: [mix(*one) for one in experts], torch.device("cpu"), time.process_time)

    times = timed_turns([partial(seconds, name) for name in calls], 20.0, warm_up=1)
    return {name: statistics.median(of) / count for name, of in zip(calls, times, strict=True)}


def main() -> None:
    """Measure ``LAYERS`` and print a table for each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        own = compiled(Path(folder))
    for layer, (filters, size) in LAYERS.items():
        medians = measure(filters, size, own)
        first = medians.pop("float32, torch.mm")
        print(f"{layer}: float32, torch.mm {first * 1e3:.2f} ms; of that:")
        for name, median in medians.items():
            print(f"  {name:20}{median / first:.2f}")


if __name__ == "__main__":
    main()
