"""The convolution by operators of torch alone, for what has rules only for those: gradients that are differentiated
again (``create_graph=True``), ``torch.func``, forward-mode differentiation, batches of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from condconv_surgery.ops.geometry import ConvArguments
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.mix_kernels import mix_kernels
from condconv_surgery.ops.per_sample.per_sample_conv import convolve_stacked
from condconv_surgery.ops.tracing_state import is_batch_of_gradients, is_transformed


def convolve_by_torch(x: Tensor, experts: Tensor, mixture: Mixture, arguments: ConvArguments) -> Tensor:
    """``conv(x_b, K_b)`` with the kernels of all samples at once: [B, I, H, W] -> [B, O, H', W']."""
    kernels = mix_kernels(experts, mixture, arguments.groups).to(x.dtype)
    return convolve_stacked(x, kernels.expand(x.shape[0], -1, -1, -1, -1), arguments)


def needs_recording(grad: Tensor) -> bool:
    """Whether the backward pass for ``grad`` must be ``recorded_gradients``: it is differentiated again, transformed,
    or computed for several gradients together (``is_grads_batched=True``)."""
    return torch.is_grad_enabled() or is_transformed() or is_batch_of_gradients(grad)


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
        y = convolve_by_torch(x, experts, Mixture(*parts), arguments)
        wanted = [part for part, needed in zip(tensors, needs, strict=True) if needed and part is not None]
        found = iter(torch.autograd.grad(y, wanted, grad.to(y.dtype), create_graph=True, allow_unused=True))
    return [next(found) if needed and part is not None else None for part, needed in zip(tensors, needs, strict=True)]
