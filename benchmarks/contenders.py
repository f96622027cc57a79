"""Other implementations (timm, the authors of ODConv, a loop) with our experts and router.

All use the mixture from our router, so outputs can be compared, and times differ by the execution alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv_surgery.layers import ConditionalConv2d
from condconv_surgery.ops.conditional_conv2d import conditional_conv2d
from condconv_surgery.ops.implementations import legal_implementations
from condconv_surgery.recipe import Variant

Layer = ConditionalConv2d[Variant]
TORCH_WAYS = ("grouped", "bmm", "unfold", "mix-outputs", "mix-inputs")


def contenders(layer: Layer, torch_ways: bool = False) -> dict[str, Callable[[Tensor], Tensor]]:
    """``ours`` and every other implementation that supports ``layer``, by name.

    torch_ways: also compositions of torch's operators. Without the compiled kernels ``ours`` is another contender,
    which is for the caller to add: the switch is one for the process, and has to be off in the backward pass too.
    """
    others: dict[str, Callable[[Tensor], Tensor]] = {"ours": layer, "loop": SampleLoop(layer)}
    if type(layer.variant).__name__ == "ODConv":
        others["authors"] = AuthorsODConv(layer)
    else:
        others["timm"] = TimmCondConv(layer)
    if torch_ways:
        mixture = layer.route(torch.zeros(2, layer.in_channels, 1, 1, device=layer.weight.device))
        legal = legal_implementations(2, mixture, layer.geometry)
        others |= {name: Forced(layer, name) for name in TORCH_WAYS if name in legal}
    return others


class Forced(nn.Module):
    """One implementation of ``ops.implementations``."""

    def __init__(self, layer: Layer, implementation: str) -> None:
        super().__init__()
        self.layer = layer
        self.implementation = implementation

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        return conditional_conv2d(x, layer.weight, layer.bias, layer.route(x), layer.geometry, self.implementation)


class SampleLoop(nn.Module):
    """A loop over the batch: one kernel and one convolution per sample."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        g, mixture, results = self.layer.geometry, self.layer.route(x), []
        for b, sample in enumerate(x):
            kernel: Tensor = self.layer.weight
            if mixture.gate is not None:
                kernel = mixture.gate[b][:, None, None, None, None] * kernel
            if mixture.spatial is not None:
                kernel = mixture.spatial[b] * kernel
            if mixture.out_scale is not None:
                kernel = mixture.out_scale[b][:, None, None, None] * kernel
            if mixture.in_scale is not None:
                sample = mixture.in_scale[b][:, None, None] * sample
            y = F.conv2d(sample[None], kernel.sum(0), None, g.stride, g.padding, g.dilation, g.groups)
            results.append(y)
        return torch.cat(results)


class AuthorsODConv(nn.Module):
    """``ODConv2d._forward_impl_common`` and ``_forward_impl_pw1x` of the authors' code (github.com/OSVAI/ODConv)."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        g, mixture = self.layer.geometry, self.layer.route(x)
        assert mixture.in_scale is not None
        x = x * mixture.in_scale[:, :, None, None]
        if mixture.gate is None and mixture.spatial is None:
            y = F.conv2d(x, self.layer.weight.squeeze(0), None, g.stride, g.padding, g.dilation, g.groups)
        else:
            batch, _, height, width = x.shape
            kernels = self._attend(batch, mixture.gate, mixture.spatial).view(-1, *g.weight_shape[1:])
            stacked = x.reshape(1, -1, height, width)
            y = F.conv2d(stacked, kernels, None, g.stride, g.padding, g.dilation, g.groups * batch)
            y = y.view(batch, g.out_channels, y.shape[-2], y.shape[-1])
        return y if mixture.out_scale is None else y * mixture.out_scale[:, :, None, None]

    def _attend(self, batch: int, gate: Tensor | None, spatial: Tensor | None) -> Tensor:
        attention: Tensor | float = 1.0  # both attentions first, as in their code: one pass over B*E kernels, not two
        if spatial is not None:
            attention = spatial[:, None, None, None]  # [B, 1, 1, 1, kh, kw]
        if gate is not None:
            attention = attention * gate[:, :, None, None, None, None]  # [B, E, 1, 1, kh or 1, kw or 1]
        weights: Tensor = attention * self.layer.weight.unsqueeze(0)  # [B, E, O, I/G, kh, kw]
        return weights.sum(1)


class TimmCondConv(nn.Module):
    """``timm.layers.CondConv2d`` with our gates as its routing weights."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        from timm.layers.cond_conv2d import CondConv2d

        g = layer.geometry
        self.layer = layer
        self.conv = CondConv2d(
            g.in_channels,
            g.out_channels,
            g.kernel_size,
            g.stride,
            g.padding,
            g.dilation,
            g.groups,
            num_experts=layer.experts,
        )
        self.conv.to(layer.weight.device).weight.data.copy_(layer.weight.detach().flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x, self.layer.route(x).gate)
        return y
