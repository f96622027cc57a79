"""What each way to convolve (``layers.ways``) costs: multiply-accumulates and bytes over measured rates.

    seconds = MACs / rate + bytes written / (fresh or warm bandwidth) + bytes read again / warm bandwidth

for the forward pass of one sample out of a batch of ``NOMINAL_BATCH``, from shapes, dtype and mixture alone: no timing,
and no look at the batch, so that one compiled or exported graph serves every batch. A backward pass does each way's
work about twice more and leaves their order as it is. The rates are those of one CPU core in float32
(``python -m benchmarks ways`` measures them again and prints the estimate beside); the order of the ways depends on
their quotients, which differ less between machines than the rates do.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from condconv_surgery.layers.mixture import ConvGeometry, Mixture
from condconv_surgery.layers.ways import one_kernel_for_all

NOMINAL_BATCH = 32
"""The batch that decides whether a tensor is large; a real one may be symbolic."""

NOMINAL_SIDE = 14
"""Height or width where that is symbolic: a comparison of it would bind the exported program to one range of sizes."""

MACS_A_SECOND = 37e9
"""A dense convolution, and a matrix product with many columns."""

STACKED_MACS_A_SECOND = 2.5e9
"""A depthwise convolution, which is limited by its activations."""

HALF_FULL_COLUMNS = 25
"""A matrix product with so many columns (output positions) runs at half of its rate."""

WARM_BYTES_A_SECOND = 13e9
"""Reading, or writing memory that was used before."""

FRESH_BYTES_A_SECOND = 1.6e9
"""Writing a tensor of ``FRESH_BYTES`` or more, whose pages the allocator asks for anew."""

FRESH_BYTES = 32 << 20


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
    work = Work.of(x, geometry)
    scales = [scale for scale in (mixture.in_scale, mixture.out_scale) if scale is not None]
    in_kernel = way == "blocks" and scales_belong_in_the_kernel(x, geometry)
    one_kernel = one_kernel_for_all(mixture) and not (in_kernel and scales)
    seconds = _multiplied(way, work, experts, geometry) + _moved(way, work, experts, geometry, one_kernel)
    if mixture.in_scale is not None and not in_kernel:
        seconds += _written_and_read(work.taken)
    if mixture.out_scale is not None and not in_kernel:
        seconds += _written_and_read(work.given)
    return seconds


def _multiplied(way: str, work: Work, experts: int, geometry: ConvGeometry) -> float:
    """The convolution itself, or the matrix product that it is."""
    if way in ("bmm", "unfold") or (way == "blocks" and geometry.pointwise):
        return work.macs / MACS_A_SECOND * (work.positions + HALF_FULL_COLUMNS) / max(1, work.positions)
    macs = experts * work.macs if way == "outputs" else work.macs
    seconds = macs / (MACS_A_SECOND if geometry.groups == 1 else STACKED_MACS_A_SECOND)
    if geometry.pointwise:  # as much work again in bringing activations into the backend's layout and back
        seconds += 2 * (work.taken + work.given) / WARM_BYTES_A_SECOND
    return seconds


def _moved(way: str, work: Work, experts: int, geometry: ConvGeometry, one_kernel: bool) -> float:
    """Kernels, and what else a way makes between the input and the output."""
    if way == "static":
        return 0.0
    if way == "outputs":
        return _written_and_read(experts * work.given)
    if way == "blocks":  # mixed into a warm buffer, brought into the backend's layout; blocks copied into one output
        kernels = 0 if one_kernel else 2 * work.kernel
        return (kernels + (work.given if geometry.groups > 1 else 0)) / WARM_BYTES_A_SECOND
    seconds = _written_and_read(work.kernel)
    if way == "grouped":
        seconds += _written(work.kernel)  # all of them in the backend's layout at once
    elif way == "loop":
        seconds += _written_and_read(work.given)
    elif way == "unfold":
        kh, kw = geometry.kernel_size
        seconds += _written_and_read(work.taken * kh * kw // (geometry.stride[0] * geometry.stride[1]))
    elif way == "bmm" and geometry.stride != (1, 1):
        seconds += _written(work.taken // (geometry.stride[0] * geometry.stride[1]))
    return seconds


def _written(size: int) -> float:
    fresh = size * NOMINAL_BATCH >= FRESH_BYTES
    return size / (FRESH_BYTES_A_SECOND if fresh else WARM_BYTES_A_SECOND)


def _written_and_read(size: int) -> float:
    return _written(size) + size / WARM_BYTES_A_SECOND
