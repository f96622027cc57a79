"""Gradients that can be differentiated again (``create_graph=True``): by operators of torch, which autograd records."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from condconv_surgery.ops.geometry import ConvArguments
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.mix_kernels import mix_kernels
from condconv_surgery.ops.per_sample.per_sample_conv import convolve_stacked


def recorded_gradients(
    grad: Tensor, tensors: Sequence[Tensor | None], arguments: ConvArguments, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of ``tensors``, those of a convolution with mixed kernels, as functions of them and of ``grad``.

    tensors: x, the experts and the parts of the mixture. needs: which of them are asked for; the others are None.
    """
    with torch.enable_grad():
        # views: the gradient of x is that of the convolution, without the one that reaches it through the router
        tensors = [None if part is None else part.view_as(part) for part in tensors]
        x, experts, *parts = tensors
        assert x is not None
        assert experts is not None
        kernels = mix_kernels(experts, Mixture(*parts), arguments.groups).to(x.dtype)
        y = convolve_stacked(x, kernels, arguments)
        wanted = [part for part, needed in zip(tensors, needs, strict=True) if needed and part is not None]
        found = iter(torch.autograd.grad(y, wanted, grad.to(y.dtype), create_graph=True, allow_unused=True))
    return [next(found) if needed and part is not None else None for part, needed in zip(tensors, needs, strict=True)]
