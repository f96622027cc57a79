"""What the modules have in common that stand in the place of a conditional layer in a graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from condconv_surgery.layers import ConditionalConv2d, ConditionalLinear
from condconv_surgery.ops.mixture import Mixture


class ServedLayer(nn.Module):
    """The router, geometry and biases of a conditional layer; for inference. Shapes as ``ConditionalConv2d``."""

    def __init__(self, layer: ConditionalConv2d[Any]) -> None:
        super().__init__()
        self.router, self.geometry = layer.router, layer.geometry
        self.is_linear = isinstance(layer, ConditionalLinear)
        self.bias, self.ungated_bias = layer.bias, layer.ungated_bias

    def forward(self, x: Tensor, mixture: Mixture | None = None) -> Tensor:
        """x: [B, I, H, W], or [B, I] in the place of an ``nn.Linear``. mixture: see ``ConditionalConv2d``."""
        if self.is_linear:
            x = x[:, :, None, None]
        if mixture is None:
            assert self.router is not None
            mixture = self.router(x)
        y = self.convolve(x, mixture)
        return y.flatten(1) if self.is_linear else y

    def convolve(self, x: Tensor, mixture: Mixture) -> Tensor:
        """[B, I, H, W] -> [B, O, H', W'], with the bias."""
        raise NotImplementedError
