"""The kernels of a few samples, ``K_b = out_b * in_b * spatial_b * sum_e gate[b,e] * experts[e]``, and back.

Both directions are written out, so that no kernel need be kept from forward to backward. Everything is one pass over
the kernels where it can be: at a small map the kernels are larger than the activations, and memory is the limit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from condconv_surgery.layers.mixture import Mixture


def mix_kernels(experts: Tensor, mixture: Mixture, groups: int = 1) -> Tensor:
    """``K_b`` for every part of the mixture that is there: [E, O, I/G, kh, kw] -> [B, O, I/G, kh, kw].

    A new tensor; [1, O, I/G, kh, kw], the expert itself, when the mixture is empty.
    """
    shape = experts.shape[1:]
    kernels = experts
    if mixture.gate is not None:
        kernels = (mixture.gate.to(experts.dtype) @ experts.flatten(1)).view(-1, *shape)
    for scale in _scales(mixture, shape, groups, kernels.dtype):
        # in place where nothing is recorded: the kernels are warm, and a second block of them would not be
        in_place = kernels is not experts and not torch.is_grad_enabled()
        by_group = kernels.view(-1, groups, shape[0] // groups, *shape[1:])
        kernels = (by_group.mul_(scale) if in_place else by_group * scale).view(-1, *shape)
    return kernels


def _scales(mixture: Mixture, shape: torch.Size, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """What multiplies the kernels, each to broadcast with [B, G, O/G, I/G, kh, kw]."""
    scales = []
    if mixture.spatial is not None:
        scales.append(mixture.spatial.view(-1, 1, 1, 1, *shape[2:]))
    if mixture.in_scale is not None:
        scales.append(mixture.in_scale.view(-1, groups, 1, shape[1], 1, 1))
    if mixture.out_scale is not None:
        scales.append(mixture.out_scale.view(-1, groups, shape[0] // groups, 1, 1, 1))
    return [scale.to(dtype) for scale in scales]


def unmix_kernels(
    grad: Tensor, experts: Tensor, mixture: Mixture, groups: int, grad_experts: Tensor | None
) -> list[Tensor | None]:
    """The gradients of the parts of ``mixture`` from the gradient of ``K``; that of the experts is added in place.

    grad: [B, O, I/G, kh, kw], overwritten. grad_experts: [E, O, I/G, kh, kw] or None. No division: a scale may be 0.
    """
    batch, (out, per_group, kh, kw) = grad.shape[0], experts.shape[1:]
    gate, spatial, in_scale, out_scale = mixture
    grads: list[Tensor | None] = [None, None, None, None]
    flat_experts = experts.flatten(1)  # [E, |W|]
    rows, area = out // groups, kh * kw
    by_in = None if in_scale is None else in_scale.to(grad.dtype).reshape(batch * groups, per_group, 1)
    by_out = None if out_scale is None else out_scale.to(grad.dtype).reshape(batch * groups, rows, 1)
    by_area = None if spatial is None else spatial.to(grad.dtype).reshape(batch, 1, 1, area)

    if spatial is not None or in_scale is not None or out_scale is not None:
        base = flat_experts if gate is None else gate.to(experts.dtype) @ flat_experts
        product = (grad.view(batch, -1) * base).view(batch * groups, rows, per_group * area)
        weight = _outer(by_in, by_area, batch, groups, per_group, area, grad)  # [B*G, I/G * area]
        if out_scale is not None:
            grads[3] = (product @ weight.unsqueeze(2)).view(batch, out)
        left = product.sum(1) if by_out is None else (by_out.transpose(1, 2) @ product).squeeze(1)
        left = left.view(batch, groups, per_group, area)  # the filters are summed away
        if in_scale is not None:
            grads[2] = (left if by_area is None else left * by_area).sum(3).view(batch, -1)
        if spatial is not None:
            scaled = left if by_in is None else left * by_in.view(batch, groups, per_group, 1)
            grads[1] = scaled.sum((1, 2)).view(batch, kh, kw)
        del product
        if by_out is not None:
            grad.view(batch * groups, rows, -1).mul_(by_out)
        grad.view(batch * groups, rows, -1).mul_(weight.unsqueeze(1))
    flat = grad.view(batch, -1)
    if gate is not None:
        grads[0] = flat @ flat_experts.t()
    if grad_experts is not None:
        if gate is None:
            grad_experts.view(1, -1).add_(flat.sum(0))
        else:
            grad_experts.view(len(experts), -1).addmm_(gate.to(grad.dtype).t(), flat)
    return grads


def _outer(
    by_in: Tensor | None, by_area: Tensor | None, batch: int, groups: int, per_group: int, area: int, like: Tensor
) -> Tensor:
    """What multiplies the columns of a kernel, ``in_scale (x) spatial``: [B*G, I/G * kh*kw]."""
    ones = like.new_ones(batch, groups, per_group, area)
    if by_in is not None:
        ones = ones * by_in.view(batch, groups, per_group, 1)
    if by_area is not None:
        ones = ones * by_area
    return ones.view(batch * groups, -1)
