"""The batch stacked into the channels: one convolution with B*G groups (Yang et al. 2019, section 3)."""

from __future__ import annotations

from torch import Tensor

from condconv_surgery.ops.cost_model import LayerCost
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations.implementation import Implementation, needs_different_kernels
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.mix_kernels import mix_kernels
from condconv_surgery.ops.per_sample.per_sample_conv import convolve_stacked


class Grouped(Implementation):
    """One grouped convolution with the mixed kernels of all samples."""

    name = "grouped"

    def why_not(self, batch: int, mixture: Mixture, geometry: ConvGeometry, /) -> str | None:
        return needs_different_kernels(mixture)

    def seconds(self, cost: LayerCost, /) -> float:
        # the kernels, and all of them once more in the backend's layout
        return cost.convolution() + cost.write_and_read(cost.kernel_bytes) + cost.write(cost.kernel_bytes)

    def convolve(self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /) -> Tensor:
        x, arguments = geometry.pad(x)
        return convolve_stacked(x, mix_kernels(experts, mixture).to(x.dtype), arguments)
