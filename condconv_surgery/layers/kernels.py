"""The kernels of a few samples, ``K_b = out_b * in_b * spatial_b * sum_e gate[b,e] * experts[e]``, and back.

Both directions are written out, so that no kernel need be kept from forward to backward. Everything is one pass over
the kernels where it can be: at a small map the kernels are larger than the activations, and memory is the limit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from condconv_surgery.layers.mixture import Mixture


def mix_kernels(experts: Tensor, mixture: Mixture, groups: int = 1, out: Tensor | None = None) -> Tensor:
    """``K_b`` for every part of the mixture that is there: [E, O, I/G, kh, kw] -> [B, O, I/G, kh, kw].

    A new tensor, or ``out`` if it is given and there is a gate; the expert itself, [1, O, I/G, kh, kw], when the
    mixture is empty.
    """
    kernels = mix_experts(experts, mixture.gate, out)
    # in place where nothing is recorded: the kernels are warm, and a second block of them would not be
    return scale_kernels(kernels, mixture, groups, kernels is not experts and not torch.is_grad_enabled())


def mix_experts(experts: Tensor, gate: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``sum_e gate[b,e] * experts[e]``: [E, O, I/G, kh, kw] -> [B, O, I/G, kh, kw]; or the expert, without a gate.

    out: memory of that shape to put them in.
    """
    if gate is None:
        return experts
    rows = None if out is None else out.view(len(gate), -1)
    return torch.mm(gate.to(experts.dtype), experts.flatten(1), out=rows).view(-1, *experts.shape[1:])


def scale_kernels(kernels: Tensor, mixture: Mixture, groups: int, in_place: bool) -> Tensor:
    """``kernels`` [B, O, I/G, kh, kw] times every scale of the mixture; themselves when it has none."""
    shape = kernels.shape[1:]
    for scale in _scales(mixture, shape, groups, kernels.dtype):
        by_group = kernels.view(-1, groups, shape[0] // groups, *shape[1:])
        kernels = (by_group.mul_(scale) if in_place else by_group * scale).view(-1, *shape)
        in_place = in_place or not torch.is_grad_enabled()  # the product is ours
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
    grad: Tensor, mixed: Tensor, experts: Tensor, mixture: Mixture, groups: int, grad_experts: Tensor | None
) -> list[Tensor | None]:
    """The gradients of the parts of ``mixture`` from the gradient of ``K``; that of the experts is added in place.

    grad: [B, O, I/G, kh, kw], overwritten. mixed: what ``mix_experts`` gave, overwritten if it is not the expert.
    grad_experts: [E, O, I/G, kh, kw] or None. No division: a scale may be 0.
    """
    gate = mixture.gate
    scales = _unscale(grad, mixed, mixture, groups, in_place=gate is not None)
    flat, flat_experts = grad.view(grad.shape[0], -1), experts.flatten(1)  # [B, |W|], [E, |W|]
    if grad_experts is not None:
        if gate is None:
            grad_experts.view(1, -1).add_(flat.sum(0))
        else:
            grad_experts.view(len(experts), -1).addmm_(gate.to(grad.dtype).t(), flat)
    return [None if gate is None else flat @ flat_experts.t(), *scales]


def _unscale(
    grad: Tensor, mixed: Tensor, mixture: Mixture, groups: int, in_place: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the scales; ``grad`` becomes, in place, that of ``mixed``."""
    _, spatial, in_scale, out_scale = mixture
    if spatial is None and in_scale is None and out_scale is None:
        return None, None, None
    batch, (out, per_group, kh, kw) = grad.shape[0], mixed.shape[1:]
    rows, area = out // groups, kh * kw
    by_in = None if in_scale is None else in_scale.to(grad.dtype).reshape(batch, groups, per_group, 1)
    by_out = None if out_scale is None else out_scale.to(grad.dtype).reshape(batch * groups, rows, 1)
    by_area = None if spatial is None else spatial.to(grad.dtype).reshape(batch, 1, 1, area)
    grad = grad.view(batch * groups, rows, per_group * area)

    product = (mixed.mul_(grad.view_as(mixed)) if in_place else grad.view(batch, *mixed.shape[1:]) * mixed).view_as(
        grad
    )
    columns = grad.new_ones(batch, groups, per_group, area)  # what multiplies the columns: in_scale (x) spatial
    for factor in (by_in, by_area):
        columns = columns if factor is None else columns * factor
    columns = columns.view(batch * groups, 1, per_group * area)
    left = product.sum(1) if by_out is None else (by_out.transpose(1, 2) @ product).squeeze(1)
    left = left.view(batch, groups, per_group, area)  # the filters are summed away
    grads = (
        None if spatial is None else (left if by_in is None else left * by_in).sum((1, 2)).view(batch, kh, kw),
        None if in_scale is None else (left if by_area is None else left * by_area).sum(3).view(batch, -1),
        None if out_scale is None else (product @ columns.transpose(1, 2)).view(batch, out),
    )
    grad.mul_(columns)
    if by_out is not None:
        grad.mul_(by_out)
    return grads
