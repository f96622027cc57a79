"""The operation with experts that are held in int8 or bfloat16: a quarter or half of the memory, and of its traffic.

    w[e,o] = scale[e,o] * q[e,o]

At batch 1 reading the experts is the limit. Where a backend mixes them as they are stored, no expert is written as
floats; elsewhere all are converted at each call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from condconv_surgery.ops.conditional_conv2d import conditional_conv2d, with_mixed_bias
from condconv_surgery.ops.dispatch import fast_rounded
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.mixture import Mixture


def rounded_conv2d(
    x: Tensor,
    experts: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    mixture: Mixture,
    geometry: ConvGeometry,
    implementation: str = "auto",
) -> Tensor:
    """``conditional_conv2d`` with experts [E, O, I/G, kh, kw] in int8, with scales [E, O], or in bfloat16, without."""
    y = fast_rounded(x, experts, scales, mixture, geometry) if implementation == "auto" else None
    if y is not None:
        return with_mixed_bias(y, bias, mixture)
    return conditional_conv2d(x, float_experts(experts, scales, x.dtype), bias, mixture, geometry, implementation)


def float_experts(experts: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The experts as floats, [E, O, I/G, kh, kw]."""
    return experts.to(dtype) if scales is None else (experts.float() * scales[:, :, None, None, None]).to(dtype)
