"""A conditional layer whose graph has only constant kernels: what runtimes for constant weights, and INT8, need."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from condconv_surgery.deploy.forms.served_layer import ServedLayer
from condconv_surgery.layers import ConditionalConv2d
from condconv_surgery.ops.mixture import Mixture


class ConstantKernels(ServedLayer):
    """Gated sums of static convolutions, scaled for each channel.

        y_b = out_scale_b * sum_e gate[b,e] * conv(in_scale_b * x_b, W_e) + bias_b

    With attention over positions each convolution is a sum over the kernel's positions t, of 1x1 convolutions:

        conv(x, spatial_b * W_e) = sum_t conv(spatial_b,t * shift_t(x), W_e,t)

    layer: whose router and parameters it takes; one with a standardised kernel must have a single expert, no gate.
    by_position: its router gives attention over positions.
    """

    def __init__(self, layer: ConditionalConv2d[Any], by_position: bool) -> None:
        super().__init__(layer)
        experts = layer.weight.detach()
        if layer.standardisation is not None:  # of a single kernel it is a constant
            experts, _ = layer.standardisation(experts, Mixture())
        kernels = [expert.flatten(2).split(1, 2) if by_position else [expert] for expert in experts]
        shape = (1, 1) if by_position else self.geometry.kernel_size
        self.kernels: Any = nn.ModuleList(  # of each expert one, or one for each position
            nn.ParameterList(part.reshape(*part.shape[:2], *shape).clone() for part in parts) for parts in kernels
        )

    def convolve(self, x: Tensor, mixture: Mixture) -> Tensor:
        """See ``ServedLayer``."""
        gate, spatial, in_scale, out_scale = mixture
        if in_scale is not None:
            x = x * in_scale[:, :, None, None]
        fused = self._constant_bias() if gate is None and out_scale is None else None
        parts = self._convolve(x, fused) if spatial is None else self._convolve_by_position(x, spatial)
        if gate is not None:
            parts = [part * gate[:, e : e + 1, None, None] for e, part in enumerate(parts)]
        y = _sum(parts)
        if out_scale is not None:
            y = y * out_scale[:, :, None, None]
        return y if fused is not None else self._add_bias(y, gate)

    def _convolve(self, x: Tensor, bias: Tensor | None) -> list[Tensor]:
        x, arguments = self.geometry.pad(x)
        return [F.conv2d(x, kernel, bias, *arguments) for (kernel,) in self.kernels]

    def _convolve_by_position(self, x: Tensor, spatial: Tensor) -> list[Tensor]:
        x, (stride, (ph, pw), dilation, groups) = self.geometry.pad(x)
        x = F.pad(x, (pw, pw, ph, ph))
        kh, kw = self.geometry.kernel_size
        # how far the first position of the kernel gets over the input
        tall, wide = (x.shape[2 + d] - dilation[d] * (size - 1) for d, size in enumerate((kh, kw)))
        sums: list[list[Tensor]] = [[] for _ in self.kernels]
        for t, (i, j) in enumerate(product(range(kh), range(kw))):
            top, left = i * dilation[0], j * dilation[1]
            seen = x[:, :, top : top + tall, left : left + wide]  # not strided: ncnn has no slice with a step
            seen = seen * spatial[:, i : i + 1, j : j + 1].unsqueeze(1)
            for parts, kernels in zip(sums, self.kernels, strict=True):
                parts.append(F.conv2d(seen, kernels[t], stride=tuple(stride), groups=groups))
        return [_sum(parts) for parts in sums]

    def _constant_bias(self) -> Tensor | None:
        """The bias of every sample, where no gate weighs it: [O] or None."""
        parts = [part for part in (None if self.bias is None else self.bias[0], self.ungated_bias) if part is not None]
        return _sum(parts) if parts else None

    def _add_bias(self, y: Tensor, gate: Tensor | None) -> Tensor:
        if self.bias is not None:
            y = y + (self.bias if gate is None else gate @ self.bias)[:, :, None, None]
        return y if self.ungated_bias is None else y + self.ungated_bias[:, None, None]


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
