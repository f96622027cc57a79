"""One convolution for each sample, with its own kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.ops.cost_model import LayerCost
from condconv_surgery.ops.geometry import ConvArguments, ConvGeometry
from condconv_surgery.ops.implementations.implementation import Implementation
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.mix_kernels import mix_kernels
from condconv_surgery.ops.per_sample.per_sample_conv import empty_output
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
        convolve = convolve_in_a_loop if is_exporting() else _loop
        y: Tensor = convolve(x, kernels, *arguments)
        return y


def _loop(
    x: Tensor, kernels: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    # unbind: the gradient of an index is a tensor of zeros as large as the whole batch
    pairs = zip(x.unbind(), kernels.unbind(), strict=True)
    return torch.stack(
        [F.conv2d(one[None], kernel, None, stride, padding, dilation, groups)[0] for one, kernel in pairs]
    )


convolve_in_a_loop = torch.library.custom_op("condconv_surgery::convolve_in_a_loop", _loop, mutates_args=())
"""One node of an exported program, for any batch. The exporter to ONNX writes it as a ``Scan``."""

OPERATOR = torch.ops.condconv_surgery.convolve_in_a_loop.default


@convolve_in_a_loop.register_fake
def _(
    x: Tensor, kernels: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    return empty_output(x, kernels, ConvArguments(stride, padding, dilation, groups))
