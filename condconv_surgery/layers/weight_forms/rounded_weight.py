"""Experts that a layer holds in int8 or bfloat16, for inference; ``deploy.round_experts`` makes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from condconv_surgery.ops.rounded_conv2d import float_experts


class RoundedWeight(nn.Module):
    """How the ``weight`` of its layer is read: ``w[e,o] = scale[e,o] * q[e,o]`` in int8, as it is in bfloat16.

    scale: [E, O] in float32, of experts in int8, or None.
    """

    scale: Tensor | None

    def __init__(self, scale: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The experts as floats: [E, O, I/G, kh, kw]."""
        return float_experts(weight, self.scale, dtype)

    def extra_repr(self) -> str:
        return "bfloat16" if self.scale is None else "int8"
