"""Compiles the kernels of ``ops.backends.triton`` and records their launches, on a machine that needs no GPU.

A process of its own, since the driver that Triton finds is one that only writes down: ``python -m tests.gpu_launches
90`` for compute capability 9.0, an H100, prints, as JSON, for each kernel whether the launch of a second call, which
``triton.launch`` makes by itself, has the arguments of the first, which Triton makes; how many instructions for
tensor cores the machine code has; and how many bytes of shared memory it asks for.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from condconv_surgery.layers import Mixture
from condconv_surgery.ops.backends.triton import dense_kernels as dense
from condconv_surgery.ops.backends.triton import depthwise_kernels as depthwise
from condconv_surgery.ops.backends.triton import launch as launching
from condconv_surgery.ops.backends.triton import mixing_kernels as mixing
from condconv_surgery.ops.backends.triton import pooling_kernels as pooling
from condconv_surgery.ops.backends.triton import router_kernels as gates

launches: list[tuple[Any, ...]] = []


class Launcher:
    """Stands for the C++ that starts a kernel."""

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self, *arguments: object) -> None:
        launches.append(arguments)


class Utilities:
    """Stands for the driver's own functions."""

    def load_binary(self, *_: object) -> tuple[int, ...]:
        return (0, 1, 32, 0, 1024)  # module, function, registers, spilled bytes, most threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Driver:
    """A GPU of this compute capability, times ten, that computes nothing."""

    utils = Utilities()
    launcher_cls = Launcher

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def calls(dtype: torch.dtype, last: bool) -> dict[str, Any]:
    """Every kernel once, with everything in the mixture and with a gate alone, and in its largest parts."""
    size, stride = (3, 3), (2, 1)
    shape = (stride, (1, 1), (1, 1), size)
    layout = torch.channels_last if last else torch.contiguous_format

    def picture(channels: int, height: int = 14) -> Tensor:
        return torch.empty(8, channels, height, 14, dtype=dtype).to(memory_format=layout)

    x, y, experts = picture(32), picture(64, 7), torch.empty(4, 64, 32, *size)
    wide = picture(32, 7)
    gate = Mixture(torch.empty(8, 4))
    full = Mixture(torch.empty(8, 4), torch.empty(8, *size), torch.empty(8, 32), torch.empty(8, 64))
    kernels, channels = torch.empty(8, 64, 9, 32, dtype=dtype), torch.empty(8, 1, 9, 32, dtype=dtype)
    sums = torch.empty_like(experts)

    def linear(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        return torch.empty(outputs, inputs), torch.empty(outputs)

    large, many = picture(256, 28), torch.empty(32, 256, 9, 256, dtype=dtype)
    all_of_32 = Mixture(torch.empty(32, 32), torch.empty(32, *size), torch.empty(32, 256), torch.empty(32, 256))
    square = ((1, 1), (1, 1), (1, 1), size)
    thirty_two, sums_of_large = (torch.empty(32, 256, 256, *size) for _ in range(2))
    pooled, statistics = torch.empty(8, 1024), [torch.empty(64) for _ in range(4)]
    heads = [linear(1024, 64), linear(256, 64), linear(9, 64), linear(4, 64)]
    return {
        "mix": lambda: mixing.mix(experts, gate, dtype),
        "mix everything": lambda: mixing.mix(experts, full, dtype, swap=True, tensor_cores=True),
        "unmix": lambda: mixing.unmix(kernels, experts, gate, sums, False),
        "unmix everything": lambda: mixing.unmix(kernels, experts, full, sums, True),
        "dense": lambda: dense.convolve(x, kernels, y, *shape),
        "dense, input": lambda: dense.gradient_of_input(y, kernels, x, *shape),
        "dense, kernels": lambda: dense.gradient_of_kernels(y, x, kernels, *shape),
        "dense, large": lambda: dense.convolve(large, many, large, *square),
        "dense, large, kernels": lambda: dense.gradient_of_kernels(large, large, many, *square),
        "mix 32": lambda: mixing.mix(thirty_two, all_of_32, dtype),
        "unmix 32": lambda: mixing.unmix(many, thirty_two, all_of_32, sums_of_large, False),
        "depthwise": lambda: depthwise.convolve(x, channels, wide, *shape),
        "depthwise, input": lambda: depthwise.gradient_of_input(wide, channels, x, *shape),
        "depthwise, kernels": lambda: depthwise.gradient_of_kernels(wide, x, *shape),
        "mean": lambda: pooling.mean(x),
        "sigmoid gates": lambda: gates.sigmoid_gates(pooled, linear(32, 1024), 0.5),
        "attention": lambda: gates.attention(pooled, linear(64, 1024), statistics, 1e-5, True, heads, torch.ones(())),
        "attention, wide": lambda: gates.attention(
            pooled, linear(256, 1024), [], 0.0, False, [None, None, None, linear(32, 256)], torch.ones(())
        ),
    }


def same(a: object, b: object) -> bool:
    """Tensors are compared by what the machine code is made for; what hooks would be told, by its type."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    return type(a) is type(b) and (a == b or type(a).__name__ == "LazyDict")


def main() -> None:
    """Compile, call twice, compare."""
    driver.set_active(Driver(int(sys.argv[1])))
    found = {}
    for dtype, last in ((torch.bfloat16, True), (torch.float32, False)):
        for name, call in calls(dtype, last).items():
            launching._compiled.clear()
            launches.clear()
            call()
            (compiled,) = launching._compiled.values()
            call()
            first, second = launches
            alike = len(first) == len(second) and all(map(same, first, second))
            products = compiled.asm["ptx"].count("wgmma.mma_async")
            found[f"{name}, {dtype}"] = {
                "alike": alike,
                "known": len(launching._compiled),
                "tensor cores": products,
                "shared": compiled.metadata.shared,
            }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
