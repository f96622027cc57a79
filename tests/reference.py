"""The slow, obvious way to compute a conditional convolution. It judges every fast way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.layers import ConvGeometry, Mixture


def convolve(x: Tensor, kernel: Tensor, geometry: ConvGeometry, bias: Tensor | None = None) -> Tensor:
    """One sample [I, H, W] and one kernel, by torch's own layer: every padding and padding mode is nn.Conv2d's."""
    g = geometry
    layer = torch.nn.Conv2d(
        g.in_channels, g.out_channels, g.kernel_size, g.stride, g.padding, g.dilation, g.groups, True, g.padding_mode
    )
    return layer.to(x.dtype)._conv_forward(x.unsqueeze(0), kernel, bias)[0]


def per_sample_loop(
    x: Tensor, experts: Tensor, bias: Tensor | None, mixture: Mixture, geometry: ConvGeometry
) -> Tensor:
    """The definition of ``Mixture``, written out sample by sample and expert by expert."""
    outputs = []
    for b in range(x.shape[0]):
        gate = torch.ones(1, dtype=x.dtype) if mixture.gate is None else mixture.gate[b]
        kernel = sum(gate[e] * experts[e] for e in range(experts.shape[0]))
        if mixture.spatial is not None:
            kernel = kernel * mixture.spatial[b]
        sample = x[b] if mixture.in_scale is None else mixture.in_scale[b][:, None, None] * x[b]
        y = convolve(sample, kernel, geometry)
        if mixture.out_scale is not None:
            y = mixture.out_scale[b][:, None, None] * y
        if bias is not None:
            y = y + sum(gate[e] * bias[e] for e in range(experts.shape[0]))[:, None, None]
        outputs.append(y)
    return torch.stack(outputs)


class SeedODConv2d(torch.nn.Module):
    """The ODConv layer that this project started from, with its faults repaired.

    Repaired: groups (channel attention scales the input, not [I] against [I/G]), non-square kernels (the spatial head
    has kh*kw outputs in the kernel's shape), non-zero padding modes. Kept: four heads behind one linear map without
    batch norm or activation (its ReLU is declared and not used), reduction 4, plain sigmoids, softmax over experts, a
    loop over the batch, and one bias for all experts.
    """

    def __init__(self, geometry: ConvGeometry, experts: int = 3, r: int = 4) -> None:
        super().__init__()
        i, o, (kh, kw) = geometry.in_channels, geometry.out_channels, geometry.kernel_size
        self.geometry = geometry
        self.fc = torch.nn.Linear(i, i // r)
        self.fc_as = torch.nn.Linear(i // r, kh * kw)
        self.fc_ac = torch.nn.Linear(i // r, i)
        self.fc_af = torch.nn.Linear(i // r, o)
        self.fc_an = torch.nn.Linear(i // r, experts)
        self.weight = torch.nn.Parameter(torch.randn(experts, *geometry.weight_shape))
        self.bias = torch.nn.Parameter(torch.randn(o))

    def forward(self, inputs: Tensor) -> Tensor:
        res = []
        for x in inputs:
            pooled = F.adaptive_avg_pool2d(x.unsqueeze(0), (1, 1)).flatten()
            h = self.fc(pooled)
            a_s = torch.sigmoid(self.fc_as(h)).view(self.geometry.kernel_size)[None, None, None, :, :]
            a_c = torch.sigmoid(self.fc_ac(h))[:, None, None]
            a_f = torch.sigmoid(self.fc_af(h))[None, :, None, None, None]
            a_n = torch.softmax(self.fc_an(h), dim=0)[:, None, None, None, None]
            kernel = torch.sum(a_s * a_f * a_n * self.weight, 0)
            res.append(convolve(a_c * x, kernel, self.geometry, self.bias))
        return torch.stack(res, dim=0)
