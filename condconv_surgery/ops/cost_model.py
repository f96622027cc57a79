"""The arithmetic of what an implementation (``ops.implementations``) costs: work over measured rates.

    seconds = MACs / rate + bytes written / (fresh or warm bandwidth) + bytes read again / warm bandwidth

for the forward pass of one sample out of a batch of ``NOMINAL_BATCH``, from shapes, dtype and mixture alone: no timing,
and no look at the batch, so that one compiled or exported graph serves every batch. A backward pass does about twice
the work of every implementation and leaves their order as it is. The rates are those of one CPU core in float32, and of
one GPU (``python -m benchmarks implementations`` measures them again beside the estimate). The order of the
implementations depends on quotients of rates, which differ less between machines than the rates do.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from condconv_surgery.ops.geometry import ConvGeometry, known_sides

NOMINAL_BATCH = 32
"""The batch that decides whether a tensor is large; a real one may be symbolic."""


class Rates(NamedTuple):
    """What a device does in a second.

    dense: MACs of a convolution, or of a matrix product with many columns. per_sample: of a convolution with a kernel
    for each sample. depthwise: of a depthwise convolution, which is limited by its activations. half_peak_columns:
    output positions at which a matrix product reaches half of its peak throughput. warm, fresh: bytes read, or written
    to memory that was used before; bytes written to a tensor of ``fresh_from`` bytes or more, for which the allocator
    asks the system for new pages. relayouts: how often the backend reads and writes the activations of a 1x1
    convolution to bring them into its own layout.
    """

    dense: float
    per_sample: float
    depthwise: float
    half_peak_columns: int
    warm: float
    fresh: float
    fresh_from: int
    relayouts: int


CPU = Rates(37e9, 37e9, 2.5e9, half_peak_columns=25, warm=13e9, fresh=1.6e9, fresh_from=32 << 20, relayouts=2)
"""One core of an AMD EPYC with AVX-512, float32."""

GPU = Rates(100e12, 65e12, 2e12, half_peak_columns=25, warm=2.5e12, fresh=2.5e12, fresh_from=0, relayouts=0)
"""An H100, float32 with TF32 products."""

GPU_HALF = GPU._replace(dense=210e12, per_sample=125e12)
"""The same in bfloat16 or float16."""


def rates_of(x: Tensor) -> Rates:
    """Those of the device and the dtype of ``x``."""
    if not x.is_cuda:
        return CPU
    return GPU if x.element_size() > 2 else GPU_HALF


class LayerCost(NamedTuple):
    """One sample's share of a layer, and the seconds that its parts take.

    kernel_bytes: of one kernel; input_bytes, output_bytes: of one sample's activations. one_kernel: all samples share
    one kernel, which is not mixed.
    """

    macs: int
    positions: int
    kernel_bytes: int
    input_bytes: int
    output_bytes: int
    experts: int
    geometry: ConvGeometry
    rates: Rates
    one_kernel: bool

    @classmethod
    def of(cls, x: Tensor, experts: int, geometry: ConvGeometry, rates: Rates, one_kernel: bool) -> LayerCost:
        """That of ``x`` [B, I, H, W]; padding is not counted."""
        height, width = known_sides(x)
        positions, item = (height // geometry.stride[0]) * (width // geometry.stride[1]), x.element_size()
        return cls(
            macs=geometry.weight_numel * positions,
            positions=positions,
            kernel_bytes=geometry.weight_numel * item,
            input_bytes=geometry.in_channels * height * width * item,
            output_bytes=geometry.out_channels * positions * item,
            experts=experts,
            geometry=geometry,
            rates=rates,
            one_kernel=one_kernel,
        )

    def convolution(self, macs: int | None = None) -> float:
        """One convolution for the whole batch; of ``macs``, where these are not those of the layer."""
        macs = self.macs if macs is None else macs
        seconds = macs / (self.rates.dense if self.geometry.groups == 1 else self.rates.depthwise)
        if self.geometry.pointwise:
            seconds += self.rates.relayouts * (self.input_bytes + self.output_bytes) / self.rates.warm
        return seconds

    def convolution_per_sample(self) -> float:
        """A convolution for each sample."""
        return self.macs / (self.rates.per_sample if self.geometry.groups == 1 else self.rates.depthwise)

    def matrix_product(self) -> float:
        """The convolution as a batched matrix product, whose columns are the output positions."""
        # a product of one row is limited by memory traffic, as a depthwise convolution is
        rate = self.rates.depthwise if self.geometry.depthwise else self.rates.dense
        return self.macs / rate * (self.positions + self.rates.half_peak_columns) / max(1, self.positions)

    def write(self, size: int) -> float:
        """Seconds to write ``size`` bytes for each sample."""
        fresh = size * NOMINAL_BATCH >= self.rates.fresh_from
        return size / (self.rates.fresh if fresh else self.rates.warm)

    def write_and_read(self, size: int) -> float:
        """Seconds to write ``size`` bytes for each sample, and to read them again."""
        return self.write(size) + size / self.rates.warm


def scales_belong_in_the_kernel(x: Tensor, geometry: ConvGeometry) -> bool:
    """Whether ``in_scale`` and ``out_scale`` have fewer elements of a kernel to scale than of a sample's activations.

    In the kernel they also cost no memory: nothing of the size of an activation is saved for their gradients.
    """
    return geometry.weight_numel <= geometry.activations(x)
