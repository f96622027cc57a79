"""What each way to convolve (``ops.implementations``) costs: multiply-accumulates and bytes over measured rates.

    seconds = MACs / rate + bytes written / (fresh or warm bandwidth) + bytes read again / warm bandwidth

for the forward pass of one sample out of a batch of ``NOMINAL_BATCH``, from shapes, dtype and mixture alone: no timing,
and no look at the batch, so that one compiled or exported graph serves every batch. A backward pass does each way's
work about twice more and leaves their order as it is. The rates are those of one CPU core in float32, and of one GPU
(``python -m benchmarks ways`` measures them again and prints the estimate beside); the order of the ways depends on
their quotients, which differ less between machines than the rates do.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations import one_kernel_for_all
from condconv_surgery.ops.mixture import Mixture

NOMINAL_BATCH = 32
"""The batch that decides whether a tensor is large; a real one may be symbolic."""

NOMINAL_SIDE = 14
"""Height or width where that is symbolic: a comparison of it would bind the exported program to one range of sizes."""


class Rates(NamedTuple):
    """What a device does in a second.

    dense: MACs of a convolution, or of a matrix product with many columns. each: of a convolution with a kernel for
    each sample. stacked: of a depthwise convolution, which is limited by its activations. half_full: so many columns
    (output positions) of a matrix product are computed at half of its rate. warm, fresh: bytes read, or written to
    memory that was used before; written to a tensor of ``fresh_from`` bytes or more, whose pages the allocator asks.
    turned: how often the backend reads and writes the activations of a 1x1 convolution to bring them into its layout.
    """

    dense: float
    each: float
    stacked: float
    half_full: int
    warm: float
    fresh: float
    fresh_from: int
    turned: int


CPU = Rates(37e9, 37e9, 2.5e9, half_full=25, warm=13e9, fresh=1.6e9, fresh_from=32 << 20, turned=2)
"""One core of an AMD EPYC with AVX-512, float32."""

GPU = Rates(100e12, 65e12, 2e12, half_full=25, warm=2.5e12, fresh=2.5e12, fresh_from=0, turned=0)
"""An H100, float32 with TF32 products."""

GPU_HALF = GPU._replace(dense=210e12, each=125e12)
"""The same in bfloat16 or float16."""


def rates_of(x: Tensor) -> Rates:
    """Those of the device and the dtype of ``x``."""
    if not x.is_cuda:
        return CPU
    return GPU if x.element_size() > 2 else GPU_HALF


class Work(NamedTuple):
    """One sample's share of a layer: multiply-accumulates, and bytes of a kernel, of the input and of the output."""

    macs: int
    positions: int
    kernel: int
    taken: int
    given: int

    @classmethod
    def of(cls, x: Tensor, geometry: ConvGeometry) -> Work:
        """That of ``x`` [B, I, H, W]; margins are not looked at."""
        height, width = (side if isinstance(side, int) else NOMINAL_SIDE for side in x.shape[2:])
        positions, item = (height // geometry.stride[0]) * (width // geometry.stride[1]), x.element_size()
        return cls(
            macs=geometry.weight_numel * positions,
            positions=positions,
            kernel=geometry.weight_numel * item,
            taken=geometry.in_channels * height * width * item,
            given=geometry.out_channels * positions * item,
        )


def scales_belong_in_the_kernel(x: Tensor, geometry: ConvGeometry) -> bool:
    """Whether ``in_scale`` and ``out_scale`` touch fewer numbers in a kernel than in the activations of a sample.

    In the kernel they also cost no memory: nothing of the size of an activation is kept for their gradients.
    """
    return geometry.weight_numel <= geometry.activations(x)


def estimate(way: str, x: Tensor, experts: int, mixture: Mixture, geometry: ConvGeometry) -> float:
    """Seconds for one sample of ``x`` [B, I, H, W] by ``way``, which must be legal for it; ``x`` may be on meta."""
    work, rates = Work.of(x, geometry), rates_of(x)
    scales = [scale for scale in (mixture.in_scale, mixture.out_scale) if scale is not None]
    in_kernel = way == "blocks" and scales_belong_in_the_kernel(x, geometry)
    one_kernel = one_kernel_for_all(mixture) and not (in_kernel and scales)
    seconds = _multiplied(way, work, experts, geometry, rates)
    seconds += _moved(way, work, experts, geometry, one_kernel, rates)
    if mixture.in_scale is not None and not in_kernel:
        seconds += _written_and_read(work.taken, rates)
    if mixture.out_scale is not None and not in_kernel:
        seconds += _written_and_read(work.given, rates)
    return seconds


def _multiplied(way: str, work: Work, experts: int, geometry: ConvGeometry, rates: Rates) -> float:
    """The convolution itself, or the matrix product that it is."""
    if way in ("bmm", "unfold") or (way == "blocks" and geometry.pointwise):
        rate = rates.stacked if geometry.depthwise else rates.dense  # a product of one row is limited by memory too
        return work.macs / rate * (work.positions + rates.half_full) / max(1, work.positions)
    macs = experts * work.macs if way in ("outputs", "inputs") else work.macs
    dense = rates.each if way == "blocks" else rates.dense
    seconds = macs / (dense if geometry.groups == 1 else rates.stacked)
    if geometry.pointwise:
        seconds += rates.turned * (work.taken + work.given) / rates.warm
    return seconds


def _moved(way: str, work: Work, experts: int, geometry: ConvGeometry, one_kernel: bool, rates: Rates) -> float:
    """Kernels, and what else a way makes between the input and the output."""
    if way == "static":
        return 0.0
    if way in ("outputs", "inputs"):  # one large kernel for all, in the dtype and layout of the activations
        activations = work.given if way == "outputs" else work.taken
        return _written_and_read(experts * activations + experts * work.kernel // NOMINAL_BATCH, rates)
    if way == "blocks":  # mixed into a warm buffer, brought into the backend's layout; blocks copied into one output
        kernels = 0 if one_kernel else 2 * work.kernel
        copied = work.given if geometry.groups > 1 and rates is CPU else 0
        return (kernels + copied) / rates.warm
    seconds = _written_and_read(work.kernel, rates)
    if way == "grouped":
        seconds += _written(work.kernel, rates)  # all of them in the backend's layout at once
    elif way == "loop":
        seconds += _written_and_read(work.given, rates)
    elif way == "unfold":
        kh, kw = geometry.kernel_size
        seconds += _written_and_read(work.taken * kh * kw // (geometry.stride[0] * geometry.stride[1]), rates)
    elif way == "bmm" and geometry.stride != (1, 1):
        seconds += _written(work.taken // (geometry.stride[0] * geometry.stride[1]), rates)
    return seconds


def _written(size: int, rates: Rates) -> float:
    fresh = size * NOMINAL_BATCH >= rates.fresh_from
    return size / (rates.fresh if fresh else rates.warm)


def _written_and_read(size: int, rates: Rates) -> float:
    return _written(size, rates) + size / rates.warm
