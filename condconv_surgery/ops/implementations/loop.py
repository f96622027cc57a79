"""One convolution for each sample, with its own kernel: in an exported program a ``scan`` over the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.ops.cost_model import LayerCost
from condconv_surgery.ops.geometry import ConvArguments, ConvGeometry
from condconv_surgery.ops.implementations.implementation import Implementation
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.mix_kernels import mix_kernels
from condconv_surgery.ops.tracing_state import is_exporting


class Loop(Implementation):
    """A loop over the samples. Taken where an exporter asks for it: eager torch has faster implementations."""

    name = "loop"
    exportable = False
    scales_kernels = True

    def why_not(self, batch: int, mixture: Mixture, geometry: ConvGeometry, /) -> str | None:
        return None

    def seconds(self, cost: LayerCost, /) -> float:
        return cost.convolution_per_sample() + cost.write_and_read(cost.kernel_bytes)

    def convolve(self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /) -> Tensor:
        x, arguments = geometry.pad(x)
        kernels = mix_kernels(experts, mixture, geometry.groups).to(x.dtype)
        kernels = kernels.expand(x.shape[0], -1, -1, -1, -1)  # [B, O, I/G, kh, kw]
        if is_exporting():
            return _scan(x, kernels, arguments)
        # unbind: the gradient of an index is a tensor of zeros as large as the whole batch
        return torch.stack([_one(*pair, arguments) for pair in zip(x.unbind(), kernels.unbind(), strict=True)])


def _one(x: Tensor, kernel: Tensor, arguments: ConvArguments) -> Tensor:
    return F.conv2d(x.unsqueeze(0), kernel, None, *arguments).squeeze(0)


def _scan(x: Tensor, kernels: Tensor, arguments: ConvArguments) -> Tensor:
    """ONNX's ``Scan``, for any batch. A scan carries a state from sample to sample; this one has none to carry."""
    from torch._higher_order_ops.scan import scan  # torch has no public name for it

    def step(state: Tensor, sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return state.clone(), _one(*sample, arguments)

    y: Tensor = scan(step, x.new_zeros(1), (x, kernels))[1]
    return y
